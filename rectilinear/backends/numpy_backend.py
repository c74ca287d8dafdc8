"""The numpy backend: the generic one, with NumPy's ``out=`` and indexing where those save a pass over memory.

Its products are NumPy's BLAS, whose bits may depend on the number of threads; everything else is NumPy's ufuncs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rectilinear.backends.contract import Array, Keep, Probe, Wanted
from rectilinear.backends.generic import GenericBackend, sum_rows
from rectilinear.keepmask import KeepMask


class NumpyBackend(GenericBackend):
    """See `rectilinear.backends.contract.Backend` for what each primitive is given and gives."""

    name = "numpy"
    library = "numpy"

    def probe(self) -> Probe:
        from threadpoolctl import threadpool_info

        blas: dict[str, Any] = next((pool for pool in threadpool_info() if pool["user_api"] == "blas"), {})
        kernel = " ".join(str(blas[key]) for key in ("internal_api", "architecture") if blas.get(key))
        return Probe(True, version=np.__version__, device="cpu", threads=blas.get("num_threads"), simd=kernel or None)

    def namespace(self, x: Array) -> Any:
        return np

    def affine_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> Array:
        z = np.matmul(x, w, out=out)
        if b is not None:
            z += b[..., None, :]
        return z

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
        dx = np.matmul(dz, w.swapaxes(-1, -2), out=out[0]) if wanted[0] else None
        dw = np.matmul(x.swapaxes(-1, -2), dz, out=out[1]) if wanted[1] else None
        db = self.bias_backward(dz, out[2]) if wanted[2] else None
        return dx, dw, db

    def bias_backward(self, dout: Array, out: Array | None) -> Array:
        db = sum_rows(np, dout)
        if out is None:
            return db
        out[...] = db
        return out

    def relu_forward(self, x: Array, out: Array | None) -> Array:
        return _select(x, x < 0, out)

    def relu_backward(self, dout: Array, keep: Keep, out: Array | None) -> Array:
        return _select(dout, ~keep.to_bool() if isinstance(keep, KeepMask) else keep < 0, out)

    def softmax_loss(self, x: Array, y: Array, out: Array | None) -> tuple[Array, Array]:
        n = x.shape[0]
        if n == 0:
            return x.dtype.type(np.nan), np.empty_like(x) if out is None else out
        rows = np.arange(n)
        # Far apart finite scores may overflow to -inf here, whose exp is the right 0.
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            dx = np.subtract(x, x.max(axis=1, keepdims=True), out=out)
            picked = dx[rows, y]
            np.exp(dx, out=dx)
            total = dx.sum(axis=1, keepdims=True)
            # Divided first: the sum of a mean within range may be beyond it.
            loss = ((np.log(total[:, 0]) - picked) / x.dtype.type(n)).sum()
            dx /= total
        dx[rows, y] -= 1
        dx /= n
        return loss, dx

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        return np.asarray(x, dtype=dtype)

    def to_numpy(self, x: Array) -> Any:
        return x


# Up to this size one call more costs more than the branches that it saves (measured: 1 us against 3 ns an element).
_FEW = 1024


def _select(x: Array, drop: Array, out: Array | None) -> Array:
    """x where not `drop`, else 0. `out` may be x.

    Large arrays by their bits: ``where`` and masked copies branch at every element, which on random signs took ten times as long.
    """
    if out is None and x.size <= _FEW:
        return np.where(drop, 0, x)
    bits = np.dtype(f"i{x.itemsize}")
    mask = np.subtract(np.asarray(drop).view(np.int8), 1, dtype=bits)  # all ones where kept
    if out is None:
        return np.bitwise_and(x.view(bits), mask, out=mask).view(x.dtype)
    np.bitwise_and(x.view(bits), mask, out=out.view(bits))
    return out
