"""(d) Genuine `cupy.ndarray` objects, made without a device over host memory: dispatch, layout, error paths, and whole passes.

Type, strides, flags and pointers are CuPy's own; what would compute or copy on a device is replaced, since there is none.
"""

from __future__ import annotations

from typing import Any

import gpu_cases
import numpy as np
import pytest
from array_api_compat import is_cupy_array
from genuine import Genuine, genuine, on_host
from host_backend import Host
from numpy.lib.array_utils import byte_bounds

import rectilinear
from rectilinear import graphs, reach
from rectilinear.backends import cupy_backend, cupy_gemm, registry
from rectilinear.backends.contract import Probe
from rectilinear.backends.cupy_backend import CupyBackend, Runtime
from rectilinear.backends.cupy_lt import Plans
from rectilinear.dispatch import library_name, resolve
from rectilinear.keepmask import KeepMask


@pytest.fixture(params=["plans", "gemm"])
def backend(host: Host, request: pytest.FixtureRequest) -> CupyBackend:
    """The backend on genuine arrays and the kernels built for the CPU; products by the stand-in's cuBLASLt, or by NumPy."""
    cp = Genuine()
    for module in host.modules.values():
        module.cp = cp
    plans = request.param == "plans"
    runtime = Runtime(cp, host.modules.__getitem__, lambda *given: Plans(*given, host.lt) if plans else cupy_gemm.Gemm(*given))
    return CupyBackend(lambda: runtime, lambda backend: Probe(True))


def test_whole_passes(backend: CupyBackend) -> None:
    rng = np.random.default_rng(1)
    x, w, b, dout = (rng.standard_normal(shape).astype("f4") for shape in ((40, 6), (6, 24), (24,), (40, 24)))
    on = [genuine(a) for a in (x, w, b, dout)]
    y, mask = backend.affine_relu_forward(*on[:3], None)
    assert type(y) is type(on[0])
    assert np.allclose(on_host(y), (x @ w + b).clip(0), atol=1e-5)
    gradients = backend.affine_backward(on[3], on[0], on[1], mask, (True,) * 3, (None,) * 3)
    dz = np.where(KeepMask(on_host(mask.bits), mask.shape).to_bool(), dout, 0)
    for got, want in zip(gradients, (dz @ w.T, x.T @ dz, dz.sum(0)), strict=True):
        assert np.allclose(on_host(got), want, atol=1e-5)
    assert np.array_equal(on_host(backend.relu_backward(on[3], mask, None)), dz)
    out = genuine(np.zeros((40, 24), "f4"))
    assert backend.affine_forward(*on[:3], out) is out


@pytest.mark.parametrize("dtype", gpu_cases.DTYPES)
def test_widths_follow_pointers_and_rows(dtype: str) -> None:
    T = gpu_cases.numpy_dtype(dtype)
    width = 16 // T.itemsize
    memory = np.zeros(1024, np.uint8)
    start = -memory.ctypes.data % 16
    aligned = genuine(memory[start : start + 512].view(T))
    shifted = genuine(memory[start + T.itemsize : start + 512 + T.itemsize].view(T))
    assert cupy_backend._wide_aligned(aligned)
    assert not cupy_backend._wide_aligned(aligned, shifted)
    assert cupy_backend._width(T.itemsize, 4 * width, True) == width
    assert cupy_backend._width(T.itemsize, 4 * width + 1, True) == 1
    assert cupy_backend._width(T.itemsize, 4 * width, False) == 1


def test_alignment_is_read_from_genuine_pointers_and_strides() -> None:
    memory = np.zeros(65, np.uint8)
    start = -memory.ctypes.data % 8
    assert cupy_backend._aligned(genuine(memory[start : start + 16].view("f4")), None) is not None
    odd = genuine(memory[start + 1 : start + 17].view("f4"))
    copied = []

    class Copies:
        @staticmethod
        def ndarray(shape: Any, dtype: Any, data: Any, strides: Any) -> Any:
            copied.append((shape, dtype, data.ptr, strides))
            return genuine(on_host(odd).view(np.uint8).reshape(shape).copy()).view()

    with pytest.raises(Exception, match="cudaErrorInsufficientDriver"):  # .copy() of the genuine array: there is no device
        cupy_backend._aligned(odd, Copies)
    assert copied == [((4, 4), np.uint8, odd.data.ptr, (4, 1))]


@pytest.mark.parametrize(
    ("view", "want"),
    [
        (lambda a: a[0], ("N", 6, 0)),
        (lambda a: a[0].T, ("T", 6, 0)),
        (lambda a: a, ("N", 6, 24)),
        (lambda a: a.swapaxes(1, 2), ("T", 6, 24)),
        (lambda a: a[:, :, :3], ("N", 6, 24)),
        (lambda a: a[:, ::2], ("N", 12, 24)),
        (lambda a: a[0, :1], ("N", 6, 0)),
        (lambda a: a[0, :, :1], ("N", 6, 0)),
        (lambda a: a[:1], ("N", 6, 0)),
    ],
)
def test_cublas_geometry_of_genuine_views(view: Any, want: tuple[str, int, int]) -> None:
    op, *lies = want
    assert cupy_gemm.column_major_strides(view(genuine(np.zeros((3, 4, 6), "f4")))) == (op == "T", *lies)


@pytest.mark.parametrize("view", [lambda a: a[:, :, ::2], lambda a: a[:, ::-1], lambda a: a[::-1]])
def test_cublas_geometry_asks_for_a_copy(view: Any) -> None:
    assert cupy_gemm.column_major_strides(view(genuine(np.zeros((3, 4, 6), "f4")))) is None


def test_out_that_kernels_cannot_write_is_told_apart(backend: CupyBackend) -> None:
    out = genuine(np.zeros((4, 6), "f4"))
    assert backend._result((4, 6), np.dtype("f4"), out) is out
    for other in (out.T, out[:, ::2], out[::-1]):
        assert backend._result(other.shape, np.dtype("f4"), other) is not other


# ---------------------------------------------------------------- dispatch


def test_arrays_are_recognised() -> None:
    a = genuine(np.zeros((2, 2), "f4"))
    assert library_name(a) == "cupy"
    assert library_name(KeepMask(genuine(np.zeros((2, 2), "u1")), (2, 16))) == "cupy"


def test_mixing_libraries_names_them() -> None:
    a, b = genuine(np.zeros((2, 2), "f4")), np.zeros((2, 2), "f4")
    for x, w in ((a, b), (b, a)):
        with pytest.raises(TypeError, match=r"affine_forward: x is a \w+ array but w is a \w+ array.*rectilinear.to_numpy"):
            rectilinear.affine_forward(x, w, None)


def test_two_devices_in_one_call_are_an_error(backend: CupyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "serving", lambda library: backend)
    a, b = genuine(np.zeros((2, 2), "f4")), genuine(np.zeros((2, 2), "f4"), device=1)
    with pytest.raises(TypeError, match=r"affine_forward: x is on device .*0.* but w is on device .*1"):
        rectilinear.affine_forward(a, b, None)


def test_bad_calls_are_told_before_anything_is_launched(host: Host, backend: CupyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "serving", lambda library: backend)
    x, w = genuine(np.zeros((2, 3), "f4")), genuine(np.zeros((4, 2), "f4"))
    with pytest.raises(rectilinear.ShapeError, match="x has 3 features per sample"):
        rectilinear.affine_forward(x, w, None)
    with pytest.raises(rectilinear.DTypeError, match="complex64"):
        rectilinear.relu_forward(genuine(np.zeros(3, "c8")))
    with pytest.raises(rectilinear.ShapeError, match="out has shape"):
        rectilinear.relu_forward(x, out=w)
    assert host.launched == []


def test_public_functions_on_genuine_arrays(backend: CupyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """resolve() takes them to the backend as they are: no conversion, no copy, one dtype."""
    monkeypatch.setattr(registry, "serving", lambda library: backend)
    rng = np.random.default_rng(2)
    x, w, b, dout = (rng.standard_normal(shape).astype("f4") for shape in ((9, 4), (4, 8), (8,), (9, 8)))
    out, cache = rectilinear.affine_relu_forward(genuine(x), genuine(w), genuine(b))
    assert library_name(out) == "cupy"
    assert isinstance(cache[1], KeepMask)
    dx, dw, db = rectilinear.affine_relu_backward(genuine(dout), cache)
    dz = np.where(x @ w + b >= 0, dout, 0)
    for got, want in ((dx, dz @ w.T), (dw, x.T @ dz), (db, dz.sum(0))):
        assert np.allclose(on_host(got), want, atol=1e-5)
    call = resolve("relu_forward", ("x",), (genuine(np.zeros(3, gpu_cases.numpy_dtype("bfloat16"))),))
    assert call.compute == call.dtype  # 16-bit types are the backend's own business


# ---------------------------------------------------------------- capture


def test_a_captured_call_tells_genuine_arrays_apart() -> None:
    host = np.zeros((4, 6), "f4")
    mask = KeepMask(genuine(np.zeros((2, 2), "u1")), (2, 16))

    def signature(*args: Any) -> tuple[Any, ...]:
        given = graphs._Arguments()
        for x in args:
            graphs._look(x, given)
        assert not given.refused
        assert len(given.arrays) == 2
        return tuple(given.signature)

    usual = signature(genuine(host), [mask])
    assert usual == signature(genuine(np.ones((4, 6), "f4")), [mask])
    assert hash(usual) == hash(signature(genuine(host), [mask]))
    others = (host.astype("f8"), host.astype("i4"), host.T, host[:, ::2], host[::-1], np.zeros(25, "f4")[1:].reshape(4, 6))
    different = [signature(genuine(other), [mask]) for other in others]
    different += [signature(genuine(host, device=1), [mask]), signature(genuine(host), (mask,))]
    assert len({usual, *different}) == len(different) + 1
    given = graphs._Arguments()
    graphs._look(host, given)
    assert "numpy.ndarray" in given.refused[0]


@pytest.mark.parametrize("view", [lambda a: a, lambda a: a.T, lambda a: a[::-1, ::2], lambda a: a[:0], lambda a: a[1:2, 3:]])
def test_the_extent_of_an_array(view: Any) -> None:
    host = view(np.zeros((4, 6), "f4"))
    low, span = graphs._extent(genuine(host))
    start, end = byte_bounds(host)
    assert span == (end - start if host.size else 0)
    assert low == (start - host.ctypes.data if host.size else 0)


def test_what_a_function_holds_of_genuine_arrays() -> None:
    a, b = genuine(np.zeros(3, "f4")), genuine(np.zeros(3, "f4"))
    places = {"a": [a], "mask": KeepMask(genuine(np.zeros((1, 1), "u1")), (1, 8))}

    def function() -> Any:
        return places, b

    found = reach.arrays_in((function,), is_cupy_array)
    assert {id(array) for array in found} == {id(a), id(b), id(places["mask"]._bits)}
    before = reach.edges_from((function,), is_cupy_array)
    held = reach.held(before, reach.edges_from((function,), is_cupy_array), is_cupy_array)
    assert held.in_place()
    places["a"][0] = b
    assert not held.in_place()
