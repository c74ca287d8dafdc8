"""The numpy backend: the generic one, with NumPy's ``out=`` and indexing where those save a pass over memory.

Its products are NumPy's BLAS, whose bits may depend on the number of threads; everything else is NumPy's ufuncs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rectilinear.backends.contract import Array, Keep, Probe, Wanted
from rectilinear.backends.generic import SUM_BLOCK, GenericBackend, may_underflow
from rectilinear.extras import how_to_install


class NumpyBackend(GenericBackend):
    """See `rectilinear.backends.contract.Backend` for what each primitive is given and gives."""

    name = "numpy"
    library = "numpy"

    def probe(self) -> Probe:
        try:
            from threadpoolctl import threadpool_info
        except ImportError:
            note = f"its BLAS kernel and threads are not known without threadpoolctl: {how_to_install('bench')}"
            return Probe(True, note, version=np.__version__, device="cpu")
        blas: dict[str, Any] = next((pool for pool in threadpool_info() if pool["user_api"] == "blas"), {})
        kernel = " ".join(str(blas[key]) for key in ("internal_api", "architecture") if blas.get(key))
        return Probe(True, version=np.__version__, device="cpu", threads=blas.get("num_threads"), simd=kernel or None)

    def namespace(self, x: Array) -> Any:
        return np

    @may_underflow
    def affine_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> Array:
        z = _product(x, w, out)
        if b is not None:
            z += b if b.ndim == 1 else b[..., None, :]
        return z

    @may_underflow
    def affine_backward(
        self,
        dout: Array,
        x: Array,
        w: Array,
        keep: Keep | None,
        wanted: Wanted,
        out: tuple[Array | None, Array | None, Array | None],
    ) -> tuple[Array | None, Array | None, Array | None]:
        dz = dout if keep is None else self.relu_backward(dout, keep, None)
        (want_dx, want_dw, want_db), (to_dx, to_dw, to_db) = wanted, out
        dx = _product(dz, w.mT, to_dx) if want_dx else None
        dw = _product(x.mT, dz, to_dw) if want_dw else None
        db = _sum_rows(dz, to_db) if want_db else None
        return dx, dw, db

    @may_underflow
    def bias_backward(self, dout: Array, out: Array | None) -> Array:
        return _sum_rows(dout, out)

    def relu_forward(self, x: Array, out: Array | None) -> Array:
        if not _CLIP_SELECTS:
            return _select(x, np.less(x, _ZERO[x.dtype]), out)
        result = x.clip(_ZERO[x.dtype], _INFINITY[x.dtype], out)
        return result if type(result) is np.ndarray else np.asarray(result)  # 0-d

    def relu_backward(self, dout: Array, keep: Keep, out: Array | None) -> Array:
        return _select(dout, np.less(keep, _ZERO[keep.dtype]) if type(keep) is np.ndarray else ~keep.to_bool(), out)

    @may_underflow
    def softmax_loss(self, x: Array, y: Array, out: Array | None) -> tuple[Array, Array]:
        n = x.shape[0]
        if n == 0:
            return x.dtype.type(np.nan), np.empty_like(x) if out is None else out
        rows = np.arange(n)
        # Far apart finite scores may overflow to -inf here, whose exp is the right 0.
        with np.errstate(over="ignore", invalid="ignore"):
            dx = np.subtract(x, np.maximum.reduce(x, 1, keepdims=True), out)
            picked = dx[rows, y]
            np.exp(dx, dx)
            total = np.add.reduce(dx, 1, keepdims=True)
            # Divided first: the sum of a mean within range may be beyond it.
            loss = np.add.reduce((np.log(total[:, 0]) - picked) / n)
            dx /= total
            dx[rows, y] -= _ONE[x.dtype]
            dx /= n
        return loss, dx

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        return np.asarray(x, dtype=dtype)

    def to_numpy(self, x: Array) -> Any:
        return x


_FLOATS: list[Any] = [np.dtype(np.float32), np.dtype(np.float64)]
# As arrays, they save each call the conversion, 0.4 us.
_ZERO = {dtype: np.zeros((), dtype) for dtype in _FLOATS}
_BITS = {dtype: np.dtype(f"i{dtype.itemsize}") for dtype in _FLOATS}
_INFINITY = {dtype: np.full((), np.inf, dtype) for dtype in _FLOATS}
_ONE = {dtype: np.ones((), dtype) for dtype in (*_FLOATS, np.dtype(np.int8))}


def _clip_selects() -> bool:
    """Whether NumPy's ``clip(0, inf)`` is ReLU: keeps NaN and -0.0, as the usual ``x < lower ? lower : x`` does.

    It is NumPy's fastest pass of the kind (0.4 to 0.8 of the time of ``maximum(x, 0)``, which loses -0.0), but no promise of NumPy's.
    """
    special = [-0.0, 0.0, np.nan, -np.nan, np.inf, -np.inf, -1.0, 1.0, 5e-324, -5e-324, 1e-45, -1e-45]
    for dtype in _FLOATS:
        for x in (np.array(special * 7, dtype), np.array(special * 14, dtype)[::2], np.array(special * 14, dtype)[::-2]):
            got, want = x.clip(_ZERO[dtype], _INFINITY[dtype]), np.where(x < 0, _ZERO[dtype], x)
            if got.tobytes() != want.tobytes():
                return False
    return True


_CLIP_SELECTS = _clip_selects()


def _dot_reports() -> bool:
    """Whether NumPy's ``dot`` tells of overflow, as ``matmul`` does: since NumPy 2.3 (https://github.com/numpy/numpy/pull/28442)."""
    large = np.full((2, 2), np.finfo(np.float64).max)
    try:
        with np.errstate(over="raise"):
            large.dot(large)
    except FloatingPointError:
        return True
    return False


_DOT_REPORTS = _dot_reports()

# Elements of a result that ``dot`` sets to 0 first in less time than it saves. Measured on a Zen 4; float64 is even there.
_SMALL_PRODUCT = 10_000
# Elements of operands beyond which starting sooner is nothing: ``dot`` copies what BLAS does not take as it lies, a view of stride 0 too.
_SMALL_OPERANDS = 1_000_000


def _product(a: Array, b: Array, out: Array | None) -> Array:
    """a b, by ``dot`` where that is quicker.

    It starts in 0.4 us where ``matmul`` takes 1.0, and calls BLAS for k = 1, where ``matmul`` does without in 8 times the time. Not
    where k = 1 and an operand is a single element: there 0 times NaN is 0 to it (https://github.com/numpy/numpy/issues/27902).
    """
    if _DOT_REPORTS and a.ndim == 2:
        (n, k), m = a.shape, b.shape[1]
        small = n * m <= _SMALL_PRODUCT and (n + m) * k <= _SMALL_OPERANDS
        if (small if k != 1 else n > 1 and m > 1) and (out is None or out.flags.carray):
            return a.dot(b, out)
    return np.matmul(a, b, out)


# Up to this size the calls that it takes to do without branches cost more than these (measured: 1.2 us against 3 ns an element).
_FEW = 384


def _select(dout: Array, drop: Array, out: Array | None) -> Array:
    """dout where not `drop`, else 0. `out` may be dout. `drop` is used up.

    Large arrays by their bits: ``where`` and masked copies branch at every element, which on random signs took ten times as long.
    """
    if dout.size <= _FEW:
        if out is None:
            result = dout.copy("K")
        elif out is dout:
            result = out
        else:
            result = np.positive(dout, out)
        np.putmask(result, drop, _ZERO[dout.dtype])
        return result
    keep = drop.view(np.int8)
    np.subtract(keep, _ONE[keep.dtype], keep)  # all ones where kept
    bits = _BITS[dout.dtype]
    if out is not None and (out is dout or _begin_together(out, dout)):  # then it is dout, seen through another view
        whole = dout.view(bits)
        np.bitwise_and(whole, keep, whole)
        return out
    result = np.empty_like(dout) if out is None else out
    whole = result.view(bits)
    np.copyto(whole, keep)  # widened by a pass of its own: a ufunc that has to widen an operand does it in pieces, for longer
    np.bitwise_and(dout.view(bits), whole, whole)
    return result


def _begin_together(a: Array, b: Array) -> bool:
    return bool(np.may_share_memory(a, b) and a.__array_interface__["data"] == b.__array_interface__["data"])


# Bytes of a long row of `_sum_rows`: starting on a sum takes as long as adding up some hundred elements.
_LONG_ROW = 16384
_ONES = {dtype: np.ones(SUM_BLOCK, dtype) for dtype in _FLOATS}


def _sum_rows(a: Array, out: Array | None) -> Array:
    """`generic.sum_rows` in few and long loops: sums of at most `SUM_BLOCK` terms, and then sums of those.

    Rows that lie side by side are added as one long row, so that several sums are under way at once.
    """
    shape = a.shape
    if shape[-2] <= SUM_BLOCK:
        return _add_rows(a, out)
    n, m = shape[-2:]
    # At least 32 terms to a sum, so that what is left shrinks.
    abreast = max(1, min(_LONG_ROW // (m * a.itemsize), n // 32)) if m and a.flags.c_contiguous else 1
    terms = min(n // abreast, SUM_BLOCK)
    blocks = n // abreast // terms
    whole = blocks * terms * abreast
    sums = np.empty((*a.shape[:-2], blocks * abreast + (whole < n), m), a.dtype)
    parts = a[..., :whole, :].reshape(*a.shape[:-2], blocks, terms, abreast * m)
    into = np.reshape(sums[..., : blocks * abreast, :], (*a.shape[:-2], blocks, abreast * m), copy=False)
    _add_rows(parts, into)
    if whole < n:
        _sum_rows(a[..., whole:, :], sums[..., -1, :])
    return _sum_rows(sums, out)


def _add_rows(a: Array, out: Array | None) -> Array:
    """Sum of at most `SUM_BLOCK` rows: the product with a row of ones, where BLAS takes `a` as it lies, for half of the time."""
    flags = a.flags
    if not (flags.c_contiguous and flags.aligned):
        return np.add.reduce(a, -2, None, out)  # positions and names alike, but for the time that names take
    ones = _ONES[a.dtype][: a.shape[-2]]
    if _DOT_REPORTS and a.ndim == 2 and (out is None or out.flags.carray):
        return ones.dot(a, out)
    return np.matmul(ones, a, out)
