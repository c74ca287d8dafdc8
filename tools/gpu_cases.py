"""What every CUDA kernel is given and what must come out: one list for the tests on the CPU and for tools/gpu_check.py on a GPU.

A case runs one kernel through the backend's own launch code. Inputs are made from integers, the same on every machine and with every
NumPy. Where the order of the arithmetic is fixed, outputs are compared bit for bit: with NumPy where it rounds alike, and by digest
with what the kernel source computed on the CPU (tests/cuda/digests.json).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rectilinear.backends import cupy_backend, cupy_small
from rectilinear.keepmask import KeepMask

DTYPES = ("float32", "float64", "float16", "bfloat16")

# (groups, rows, columns): single elements, tails of tiles and warps, rows of 16 bytes and not, one and two stages of the column sum.
SHAPES = (
    (1, 1, 1),
    (1, 3, 10),
    (2, 7, 33),
    (1, 9, 64),
    (3, 5, 16),
    (1, 33, 257),
    (1, 70, 136),
    (2, 300, 24),
    (1, 1100, 8),
    (1, 2100, 3),
    (1, 2300, 16),
)
FLAT_SIZES = (1, 7, 256, 1000, 2049, 9001)
# (groups, n, d, m) of small layers: single elements, edges of tiles of 32, one to eight slabs of 64 of each summed extent, tiles that
# blocks share and not.
SMALL_SHAPES = (
    (1, 1, 1, 1),
    (1, 3, 5, 10),
    (2, 7, 33, 9),
    (1, 33, 64, 40),
    (1, 65, 130, 36),
    (1, 130, 20, 150),
    (3, 2, 40, 65),
    (2, 40, 460, 36),
    (1, 300, 33, 40),
    (2, 200, 10, 200),
)
KINDS = (
    "bias_add",
    "bias_add_none",
    "bias_relu_mask",
    "bias_relu_mask_none",
    "bias_relu_mask_rounded",
    "colsum",
    "colsum_one_block",
    "mask_colsum",
    "mask_colsum_db",
    "mask_colsum_two_blocks",
    "preact_colsum",
    "preact_colsum_two_blocks",
    "relu",
    "relu_offset",
    "relu_backward",
    "relu_backward_offset",
    "mask_backward",
    "softmax_loss",
    "sgd_step",
    "sgd_step_offset",
    "sgd_step_plain",
    "small_forward",
    "small_forward_affine",
    "small_forward_none",
    "small_backward",
    "small_backward_mask",
    "small_backward_preact",
    "small_backward_dw",
)


class _Rates(NamedTuple):
    lr: float
    momentum: float
    weight_decay: float


_RATES = _Rates(0.05, 0.9, 0.01)


@dataclass(frozen=True)
class Case:
    """One kernel on one shape."""

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.dtype}-{'x'.join(map(str, self.shape))}"


def cases(dtype: str, kinds: tuple[str, ...] = KINDS) -> Iterator[Case]:
    for kind in kinds:
        if kind.startswith("small"):
            yield from (Case(kind, dtype, shape) for shape in SMALL_SHAPES if dtype != "float64")
            continue
        for shape in ((size,) for size in FLAT_SIZES) if kind.startswith(("relu", "sgd")) else SHAPES:
            yield Case(kind, dtype, shape)


# ---------------------------------------------------------------- inputs


def numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def sum_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def uniform(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float64 of 24 bits in [-2, 2), from a mixed counter (splitmix64)."""
    i = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed * 1_000_003 + 1)
    i = i * np.uint64(0x9E3779B97F4A7C15)
    i = (i ^ (i >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    i = (i ^ (i >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    i ^= i >> np.uint64(31)
    return ((i >> np.uint64(40)).astype(np.float64) / 2.0**22 - 2.0).reshape(shape)


def with_specials(values: np.ndarray, dtype: np.dtype, every: int) -> np.ndarray:
    """`values` in dtype, every so many replaced: zeros, subnormals of both signs, infinities, NaN of both signs."""
    array = values.astype(dtype)
    tiny = np.finfo(np.float32).tiny if dtype.itemsize == 2 and dtype.kind != "f" else np.finfo(dtype).tiny
    small, nan = np.array(tiny, np.float64) / 4, np.array(np.nan)
    list_of = [0.0, -0.0, small, -small, np.inf, -np.inf, nan, -nan, -tiny, tiny]
    flat = array.reshape(-1)
    where = slice(every // 2, None, every)
    flat[where] = np.resize(np.array(list_of, np.float64).astype(dtype), flat[where].size)
    return array


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Host arrays by name: z (pre-activations, in the sums' dtype unless rounded), b, dout, keep, x, w, y."""
    dtype, seed = numpy_dtype(case.dtype), len(case.name) * 31 + sum(case.shape)
    if case.kind.startswith("small"):
        return _small_inputs(case, dtype, seed)
    if case.kind.startswith("bias"):
        z = with_specials(uniform(case.shape, seed), dtype, 5).astype(dtype if "rounded" in case.kind else sum_dtype(dtype))
        b = uniform((case.shape[0], case.shape[2]), seed + 1).astype(dtype)
        b[..., ::7] = -0.0  # meets every special of z unchanged
        return {"z": z, "b": b}
    if case.kind == "softmax_loss":
        x = (8 * uniform(case.shape[-2:], seed)).astype(dtype)
        labels = np.arange(x.shape[0], dtype=np.int64) * 7 % x.shape[1]
        return {"x": x, "y": labels}
    if case.kind in ("relu", "relu_offset"):
        return {"x": with_specials(uniform(case.shape, seed), dtype, 3)}
    if case.kind.startswith("sgd"):
        return {
            name: with_specials(uniform(case.shape, seed + i), dtype, every)
            for i, (name, every) in enumerate((("w", 3), ("dw", 5), ("v", 7)))
        }
    keep = with_specials(uniform(case.shape, seed), dtype, 3)
    # A sum over specials is NaN and shows nothing: where db is summed, they stand where keep is false.
    summed = "colsum" in case.kind
    dout = uniform(case.shape, seed + 2).astype(dtype) if summed else with_specials(uniform(case.shape, seed + 2), dtype, 4)
    if _selects(case):
        dout[negative(keep)] = np.nan
    return {"dout": dout, "keep": keep}


def _small_inputs(case: Case, dtype: np.dtype, seed: int) -> dict[str, np.ndarray]:
    groups, n, d, m = case.shape
    x, w = uniform((groups, n, d), seed).astype(dtype), uniform((groups, d, m), seed + 1).astype(dtype)
    if "forward" in case.kind:
        x[0, n // 2, d // 2] = np.nan if n > 1 else x[0, n // 2, d // 2]  # a row of NaN: kept, and its neighbours are not touched
        return {"x": x, "w": w, "b": uniform((groups, m), seed + 2).astype(dtype)}
    keep, dout = with_specials(uniform((groups, n, m), seed + 3), dtype, 3), uniform((groups, n, m), seed + 4).astype(dtype)
    if "mask" in case.kind or "preact" in case.kind:
        dout[negative(keep)] = np.nan
    return {"x": x, "w": w, "dout": dout, "keep": keep}


def negative(a: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of NaN
        return a < 0


def mask_of(keep: np.ndarray) -> KeepMask:
    return KeepMask(np.packbits(~(negative(keep)), axis=-1, bitorder="little"), keep.shape)


# ---------------------------------------------------------------- running a case


def run(backend: Any, case: Case, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a case on this backend, as host arrays. Uses the backend's launch code, past its cuBLAS products."""
    on = _put(backend, case, given)
    keep = backend.asarray(mask_of(given["keep"])) if "keep" in given and "mask" in case.kind else on.get("keep")
    out: dict[str, Any] = {}
    if case.kind.startswith("small"):
        out = _run_small(backend, case, on, keep)
    elif case.kind.startswith("bias"):
        y = backend._empty(case.shape, numpy_dtype(case.dtype))
        mask = backend._empty((*case.shape[:-1], -(-case.shape[-1] // 8)), np.uint8) if "mask" in case.kind else None
        without = "none" in case.kind or "rounded" in case.kind
        backend._bias("bias_relu_mask" if "mask" in case.kind else "bias_add", on["z"], None if without else on["b"], y, mask)
        out = {"y": y, "mask": mask}
    elif case.kind == "mask_colsum_db":
        out["db"] = backend.affine_backward(on["dout"], on["dout"], on["dout"], keep, (False, False, True), (None, None, None))[2]
    elif "colsum" in case.kind:
        few = {"colsum_one_block": 1, "mask_colsum_two_blocks": 2, "preact_colsum_two_blocks": 2}.get(case.kind)
        with _blocks(backend, few) if few else nullcontext():
            if _selects(case):
                out["dz"], out["db"] = backend._select_and_sum(on["dout"], keep, True, None)
            else:
                out["db"] = backend.bias_backward(on["dout"], None)
    elif case.kind in ("relu", "relu_offset"):
        out["y"] = backend.relu_forward(on["x"], None)
    elif case.kind == "softmax_loss":
        out["loss"], out["dx"] = backend.softmax_loss(on["x"], on["y"], None)
    elif case.kind.startswith("sgd"):
        # Twice the same: a parameter that decays, and one that does not.
        plain, (w, dw, v), (w2, dw2, v2) = "plain" in case.kind, on.values(), _put(backend, case, given).values()
        rates = _RATES._replace(momentum=0.0, weight_decay=0.0) if plain else _RATES
        if backend.sgd_step((w, w2), (dw, dw2), () if plain else (v, v2), 1, *rates) is None:
            raise ValueError(f"{case.name}: the kernel does not take these")
        out = {"w": w, "v": v, "w2": w2, "v2": v2}
    else:
        out["dx"] = backend.relu_backward(on["dout"], keep, None)
    return {name: backend.to_numpy(array) for name, array in out.items() if array is not None}


def _put(backend: Any, case: Case, given: dict[str, np.ndarray]) -> dict[str, Any]:
    """The inputs on the device, a copy at each call."""
    if "offset" in case.kind:  # pointers that are not 16-byte aligned
        return {name: backend.asarray(np.append(array[:1], array))[1:] for name, array in given.items()}
    return {name: backend.asarray(array) for name, array in given.items()}


def _run_small(backend: Any, case: Case, on: dict[str, Any], keep: Any) -> dict[str, Any]:
    """Through the public primitives, which have to choose the small kernels."""
    layer, size = cupy_small.Layer(*case.shape), numpy_dtype(case.dtype).itemsize
    chosen = cupy_small.share_forward(layer, size) if "forward" in case.kind else cupy_small.share_backward(layer, size, True)
    if not chosen:
        raise ValueError(f"{case.name} is not a small layer any more: choose another shape")
    if case.kind == "small_forward_affine":
        return {"y": backend.affine_forward(on["x"], on["w"], on["b"], None)}
    if "forward" in case.kind:
        y, mask = backend.affine_relu_forward(on["x"], on["w"], None if "none" in case.kind else on["b"], None)
        return {"y": y, "mask": mask._bits}
    keep = keep if "mask" in case.kind or "preact" in case.kind else None
    wanted = (False, True, False) if "dw" in case.kind else (True, True, True)
    got = backend.affine_backward(on["dout"], on["x"], on["w"], keep, wanted, (None, None, None))
    return dict(zip(("dx", "dw", "db"), got, strict=True))


def _selects(case: Case) -> bool:
    """Whether it is a column sum with dz beside it."""
    return case.kind.removesuffix("_two_blocks") in ("mask_colsum", "preact_colsum")


@contextmanager
def _blocks(backend: Any, count: int) -> Iterator[None]:
    """Let so few blocks sum all rows, and so each thread more than a chunk of them, in several turns: that takes a very long array else."""
    chosen = cupy_backend._blocks_of_sum
    cupy_backend._blocks_of_sum = lambda *of: count
    backend._column_sum.cache_clear()  # which remembers what was chosen
    try:
        yield
    finally:
        cupy_backend._blocks_of_sum = chosen
        backend._column_sum.cache_clear()


# ---------------------------------------------------------------- what must come out


def expected(case: Case, given: dict[str, np.ndarray], flush: bool) -> dict[str, np.ndarray]:
    """The outputs whose bits NumPy knows. `flush`: the machine takes float32 subnormals for 0 in sums."""
    dtype = numpy_dtype(case.dtype)
    if case.kind.startswith("small"):
        return {}
    if case.kind.startswith("bias"):
        v = given["z"]
        if "none" not in case.kind and "rounded" not in case.kind:
            with np.errstate(invalid="ignore", over="ignore"):
                v = _flushed(_flushed(v, flush) + _flushed(given["b"].astype(v.dtype)[:, None, :], flush), flush)
        with np.errstate(over="ignore", invalid="ignore"):
            t = v.astype(dtype)
        if "relu" not in case.kind:
            return {"y": t}
        return {"y": _selected(t, t), "mask": mask_of(t).bits}
    if case.kind in ("relu", "relu_offset"):
        return {"y": _selected(given["x"], given["x"])}
    if case.kind.startswith("sgd"):
        return _moved(case, given, flush)
    if "backward" in case.kind:
        return {"dx": _selected(given["dout"], given["keep"])}
    if _selects(case):
        return {"dz": _selected(given["dout"], given["keep"])}
    return {}


def _moved(case: Case, given: dict[str, np.ndarray], flush: bool) -> dict[str, np.ndarray]:
    """Every operation rounded by itself."""
    dtype, want = numpy_dtype(case.dtype), {}
    w, dw, v = (_flushed(given[name].astype(sum_dtype(dtype)), flush) for name in ("w", "dw", "v"))
    lr, momentum, weight_decay = (sum_dtype(dtype).type(rate) for rate in _RATES)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        for suffix, decays in (("", True), ("2", False)):
            move = dw
            if decays and "plain" not in case.kind:
                move = _flushed(_flushed(weight_decay * w, flush) + move, flush)
            move = _flushed(-lr * move, flush)
            if "plain" not in case.kind:
                move = _flushed(move + _flushed(momentum * v, flush), flush)
            want["w" + suffix] = _flushed(w + move, flush).astype(dtype)
            want["v" + suffix] = given["v"] if "plain" in case.kind else move.astype(dtype)
    return want


def errors(case: Case, given: dict[str, np.ndarray], got: dict[str, np.ndarray], flush: bool = True) -> list[str]:
    """What is wrong with the outputs of a case; empty if nothing."""
    found = [
        f"{case.name}: {name} differs in {int((bits(got[name]) != bits(want)).sum())} of {want.size} elements"
        for name, want in expected(case, given, flush).items()
        if got[name].shape != want.shape or got[name].dtype != want.dtype or (bits(got[name]) != bits(want)).any()
    ]
    if case.kind.startswith("small"):
        return _small_errors(case, given, got)
    for name, want, bound in _bounded(case, given):
        error = np.abs(got[name].astype(np.float64) - want)
        if got[name].shape != want.shape or not (error <= bound).all():
            found.append(f"{case.name}: {name} is off by {np.max(error - bound):.3g} more than its bound")
    return found


def _bounded(case: Case, given: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(output, exact value, bound on the error)."""
    dtype = numpy_dtype(case.dtype)
    eps, half_ulp = np.finfo(sum_dtype(dtype)).eps, {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(case.dtype, 0)
    if "colsum" in case.kind:
        dz = given["dout"].astype(np.float64)
        dz = dz if case.kind.startswith("colsum") else np.where(negative(given["keep"]), 0, dz)
        want, size = dz.sum(axis=-2), np.abs(dz).sum(axis=-2)
        # The longest chain of additions: a chunk, the chunks of a thread, two trees, the blocks.
        rows = case.shape[-2]
        yield "db", want, (min(rows, 110) * eps * size + half_ulp * np.abs(want)) + rows * np.finfo(np.float32).tiny
    if case.kind == "softmax_loss":
        x, y = given["x"].astype(np.float64), given["y"]
        e = np.exp(x - x.max(axis=1, keepdims=True))
        p = e / e.sum(axis=1, keepdims=True)
        n, c = x.shape
        losses = -np.log(p[np.arange(n), y])
        want = (p - (np.arange(c) == y[:, None])) / n
        yield "dx", want, (20 * eps + half_ulp) * np.maximum(p, np.abs(want * n)) / n + np.finfo(np.float32).tiny + _least(case.dtype)
        yield "loss", losses.mean(), ((c + n + 60) * eps) * (1 + np.abs(x).max()) + half_ulp * losses.mean()


def _small_errors(case: Case, given: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> list[str]:
    """A quarter of the summed extent, whole slabs of it, is the longest chain of additions; the four sums and the bias come on top."""
    x, w = (given[name].astype(np.float64) for name in ("x", "w"))
    if "forward" in case.kind:
        b = given["b"].astype(np.float64)[:, None, :] * ("none" not in case.kind)
        z, size = x @ w + b, np.abs(x) @ np.abs(w) + np.abs(b)
        bound = _small_bound(case, x.shape[-1], size, z)
        found = _off(case, "y", got["y"], z, bound) if "affine" in case.kind else []
        if "mask" in got:
            unpacked = np.unpackbits(got["mask"], axis=-1, bitorder="little")
            keep = unpacked[..., : z.shape[-1]] != 0
            if unpacked[..., z.shape[-1] :].any() or not ((keep == ~negative(z)) | (np.abs(z) <= bound)).all():
                found.append(f"{case.name}: mask is wrong")
            found += _off(case, "y", got["y"], np.where(keep, z, 0), bound)
        return found
    dz = given["dout"].astype(np.float64)
    if "mask" in case.kind or "preact" in case.kind:
        dz = np.where(negative(given["keep"]), 0, dz)
    turned = x.swapaxes(1, 2), w.swapaxes(1, 2)
    wants = {
        "dx": (dz @ turned[1], np.abs(dz) @ np.abs(turned[1]), dz.shape[-1]),
        "dw": (turned[0] @ dz, np.abs(turned[0]) @ np.abs(dz), dz.shape[-2]),
        "db": (dz.sum(axis=-2), np.abs(dz).sum(axis=-2), dz.shape[-2]),
    }
    named = [(name, got[name], *wants[name]) for name in wants if name in got]
    return [line for name, a, want, size, depth in named for line in _off(case, name, a, want, _small_bound(case, depth, size, want))]


def _small_bound(case: Case, depth: int, size: np.ndarray, want: np.ndarray) -> np.ndarray:
    half_ulp = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(case.dtype, 0)
    chain = -(-depth // 64) * 16 + 4
    return chain * np.finfo(np.float32).eps * size + half_ulp * np.abs(want) + depth * np.finfo(np.float32).tiny + _least(case.dtype)


def _off(case: Case, name: str, got: np.ndarray, want: np.ndarray, bound: np.ndarray) -> list[str]:
    right = (np.abs(got.astype(np.float64) - want) <= bound) | (np.isnan(got.astype(np.float64)) & np.isnan(want))
    return [] if got.shape == want.shape and right.all() else [f"{case.name}: {name} is beyond its bound in {(~right).sum()} elements"]


def _least(dtype: str) -> float:
    """Half of the least positive number, what rounding to it may lose."""
    return {"float16": 2.0**-25, "bfloat16": 2.0**-134}.get(dtype, 0.0)


def _selected(values: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return np.where(negative(keep), np.zeros((), values.dtype), values)


def _flushed(a: np.ndarray, flush: bool) -> np.ndarray:
    """Float32 subnormals replaced by zeros of their sign; GPUs flush no float64."""
    if not flush or a.dtype != np.float32:
        return a
    return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)


def bits(a: np.ndarray) -> np.ndarray:
    """The bit patterns, with one for every NaN: payloads and signs of computed NaNs are the hardware's own affair."""
    if a.dtype == np.uint8:
        return a
    unsigned = a.view(f"u{a.itemsize}")
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of NaN
        return np.where(np.isnan(a), unsigned.dtype.type(2 ** (8 * a.itemsize) - 1), unsigned)


def digest(got: dict[str, np.ndarray]) -> str:
    """Of all outputs; the same on every machine that does the same arithmetic."""
    sha = hashlib.sha256()
    for name in sorted(got):
        sha.update(name.encode() + np.ascontiguousarray(bits(got[name])).astype(bits(got[name]).dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()[:16]
