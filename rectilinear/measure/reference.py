"""Inputs of a case, its exact results in float64, and the check of what a subject computed.

x and w are integers of 11 and 3 bits times a power of two, and b lies half a unit beside them: z = x w + b is exact in float32
and never 0 or near it, in whatever order a library sums. So every subject keeps the same elements in the ReLU, whichever
way it treats z = 0, and backward can be checked as tightly as forward. 11 bits are more than bfloat16 holds, and dout is
normally distributed: a subject that computes in less than its dtype does not pass.

In 16 bits x has 7 bits, which bfloat16 holds, and b is at most 32 units of z: where x w is so near to -b that adding b could change its
sign, it is an integer of units that 8 bits hold, so that a subject that rounds before it adds the bias keeps the same elements too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import log2, prod, sqrt
from typing import Any

import numpy as np

from rectilinear.measure.cases import HALF_ITEMSIZE, Case

Arrays = dict[str, Any]
Results = tuple[np.ndarray, ...]

LEARNING_RATE = 0.125
_X_UNIT = 2.0**-9
_HALF_X_UNIT = 2.0**-5
_REPEAT = 1_000_003
"""Random numbers are drawn once and repeated beyond this many, to save time; a prime, so that no row repeats another."""
_LARGEST = 32.0
"""How far the largest error may lie above the root mean square that is allowed."""
_HALF_ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""What rounding to 16 bits may add to the error, as a share of the value: eps, twice what one rounding can do. Sums are float32's."""


def _fill(draw: Callable[[int], np.ndarray], shape: tuple[int, ...], dtype: str) -> np.ndarray:
    size = prod(shape)
    return np.resize(draw(min(size, _REPEAT)).astype(numpy_dtype(dtype)), shape)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of a case; NumPy knows bfloat16 once ml_dtypes is loaded."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)


def _affine_data(rng: np.random.Generator, lead: tuple[int, ...], n: int, d: int, m: int, dtype: str) -> Arrays:
    half = dtype in HALF_ITEMSIZE
    most, unit = (64, _HALF_X_UNIT) if half else (1024, _X_UNIT)
    x = _fill(lambda k: rng.integers(-most, most + 1, k) * unit, (*lead, n, d), dtype)
    w, b, _ = _layer_data(rng, lead, d, m, dtype, unit)
    return {"x": x, "w": w, "b": b}


def _layer_data(
    rng: np.random.Generator, lead: tuple[int, ...], d: int, m: int, dtype: str, x_unit: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """w and b for inputs that are multiples of x_unit, and the unit of which z is then a multiple."""
    w_unit = 2.0 ** -round(log2(3.0 * sqrt(d)))
    w = _fill(lambda k: rng.integers(-4, 5, k) * w_unit, (*lead, d, m), dtype)
    most = 32 if dtype in HALF_ITEMSIZE else 2048
    b = _fill(lambda k: (rng.integers(-most, most, k) + 0.5) * (x_unit * w_unit), (*lead, m), dtype)
    return w, b, x_unit * w_unit / 2


def _net_data(rng: np.random.Generator, n: int, widths: tuple[int, ...], dtype: str) -> Arrays:
    """Here x has 7 bits only, so that the second hidden layer is still exact in float32."""
    unit = 2.0**-5
    data = {"x": _fill(lambda k: rng.integers(-64, 65, k) * unit, (n, widths[0]), dtype), "y": rng.integers(0, widths[-1], n)}
    for i, (d, m) in enumerate(itertools.pairwise(widths)):
        data[f"w{i}"], data[f"b{i}"], unit = _layer_data(rng, (), d, m, dtype, unit)
    return data


def inputs(case: Case) -> Arrays:
    """The arguments of a case by name, NumPy arrays, the same for every subject and run; C-contiguous but for w of `step_fortran`."""
    rng = np.random.default_rng(20240501)
    normal = rng.standard_normal
    if case.kind in ("infer", "train"):
        return _net_data(rng, case.shape[0], case.widths, case.dtype)
    if case.kind == "softmax":
        return {"x": _fill(normal, case.shape, case.dtype), "y": rng.integers(0, case.shape[1], case.shape[0])}
    if case.kind in ("db", "relu_forward", "relu_backward"):
        data = {"dout": _fill(normal, case.shape, case.dtype)}
        return data if case.kind == "db" else data | {"x": _fill(lambda k: normal(k + 7)[7:], case.shape, case.dtype)}
    *lead, n, d, m = case.shape
    data = _affine_data(rng, tuple(lead), n, d, m, case.dtype)
    if case.kind == "step_fortran":
        data["w"] = np.asfortranarray(data["w"])
    return data | {"dout": _fill(normal, (*lead, n, m), case.dtype)}


def expected(case: Case, data: Arrays) -> tuple[Results, tuple[int, ...]]:
    """What the pass has to return, and for each result how many terms its elements sum (0: none, it has to be equal)."""
    x: Any = data.get("x")
    dout: Any = data.get("dout")
    if case.kind == "relu_forward":
        return (np.where(x < 0, 0, x).astype(case.dtype),), (0,)
    if case.kind == "relu_backward":
        return (np.where(x < 0, 0, dout).astype(case.dtype),), (0,)
    if case.kind == "db":
        return (_sum_rows(dout),), (case.shape[0],)
    if case.kind == "softmax":
        return _softmax(_f64(x), data["y"]), (case.shape[0], case.shape[1])
    if case.kind == "infer":  # the hidden layers are exact
        return (_net_forward(data)[1][-1],), (case.widths[-2],)
    if case.kind == "train":
        params = _train(data)
        return params, tuple(case.shape[0] + max(case.widths) for _ in params)
    n, d, m = case.shape[-3:]
    z, out, dx, dw, db = _affine_relu(case.shape, data)
    terms = {"z": d, "out": d, "dx": m, "dw": n, "db": n}
    names = {"affine": ("z",), "forward": ("out",), "backward": ("dx", "dw", "db")}.get(case.kind, ("out", "dx", "dw", "db"))
    exact = {"z": z, "out": out, "dx": dx, "dw": dw, "db": db}
    return tuple(exact[name] for name in names), tuple(terms[name] for name in names)


_kept: dict[tuple[Any, ...], Results] = {}


def _affine_relu(shape: tuple[int, ...], data: Arrays) -> Results:
    """z, out, dx, dw, db in float64. Kept for one shape and dtype: the passes over it follow one another and share them."""
    key = (*shape, str(data["dout"].dtype))
    if key not in _kept:
        _kept.clear()
        x, w, b, dout = (_f64(data[k]) for k in ("x", "w", "b", "dout"))
        z = x @ w + b[..., None, :]
        dz = np.where(z < 0, 0.0, dout)
        _kept[key] = z, np.where(z < 0, 0.0, z), dz @ w.swapaxes(-1, -2), x.swapaxes(-1, -2) @ dz, dz.sum(axis=-2)
    return _kept[key]


def _softmax(x: np.ndarray, y: np.ndarray) -> Results:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    rows = np.arange(len(x))
    loss = -np.log(p[rows, y]).mean()
    p[rows, y] -= 1.0
    return np.asarray(loss), p / len(x)


def _net_params(data: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(_f64(data[f"w{i}"]), _f64(data[f"b{i}"])) for i in range(sum(name.startswith("w") for name in data))]


def _net_forward(data: Arrays) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each layer's input, and its output before the ReLU."""
    hidden, zs = [_f64(data["x"])], []
    for w, b in _net_params(data):
        zs.append(hidden[-1] @ w + b)
        hidden.append(np.where(zs[-1] < 0, 0.0, zs[-1]))
    return hidden[:-1], zs


def _train(data: Arrays) -> Results:
    """The parameters after one step, w0, b0, w1, b1, ..."""
    params, (hidden, zs) = _net_params(data), _net_forward(data)
    count = len(params)
    _, dz = _softmax(zs[-1], data["y"])
    after: list[np.ndarray] = []
    for i in reversed(range(count)):
        w, b = params[i]
        after[:0] = [w - LEARNING_RATE * (hidden[i].T @ dz), b - LEARNING_RATE * dz.sum(axis=0)]
        dz = np.where(zs[i - 1] < 0, 0.0, dz @ w.T) if i else dz
    return tuple(after)


def _f64(a: Any) -> np.ndarray:
    return np.asarray(a, dtype=np.float64)


def _sum_rows(a: np.ndarray) -> np.ndarray:
    """Column sums in float64 of blocks, so that 1e8 float32 elements need no float64 copy of themselves."""
    return np.asarray(sum(block.sum(axis=0, dtype=np.float64) for block in np.array_split(a, max(1, a.size // 10**6))))


def wrong(case: Case, got: Results, want: Results, terms: tuple[int, ...]) -> str | None:
    """Say what is wrong with the results of a subject; None if nothing is.

    The root mean square error may be ``sqrt(K + 16) eps`` times that of the exact values, K the number of terms summed, and no
    element may be off by more than 32 times that. Sums of 16-bit numbers are float32's, and rounded once or twice.
    """
    if len(got) != len(want):
        return f"{len(got)} results, not {len(want)}"
    for i, (g, exact, k) in enumerate(zip(got, want, terms, strict=True)):
        if g.shape != exact.shape or str(g.dtype) != case.dtype:
            return f"result {i} is {g.dtype} {g.shape}, not {case.dtype} {exact.shape}"
        if k == 0:
            if not np.array_equal(g, exact):
                return f"result {i} differs in {int(np.count_nonzero(g != exact))} of {g.size} elements"
            continue
        error = np.abs(g.astype(np.float64) - exact)
        rounding = _HALF_ROUNDING.get(case.dtype, 0.0)
        eps = float(np.finfo(np.float32 if rounding else case.dtype).eps)
        allowed = (sqrt(k + 16) * eps + rounding) * _rms(exact)
        # Written so that NaN fails.
        if not (_rms(error) <= allowed and float(error.max(initial=0.0)) <= _LARGEST * allowed):
            largest = float(error.max())
            return f"result {i} is off by {_rms(error):.2g} (root mean square), {largest:.2g} (largest), where {allowed:.2g} is allowed"
    return None


def _rms(a: np.ndarray) -> float:
    return sqrt(float(np.vdot(a, a)) / max(a.size, 1))


def check(case: Case, data: Arrays, got: Results) -> str | None:
    """`wrong` against `expected`."""
    want, terms = expected(case, data)
    return wrong(case, got, want, terms)
