"""(c) The stand-in is honest: each of its names is in the real CuPy with that signature, and it refuses what CuPy refuses."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import standin
from host_backend import Host


def real_signature(real: Any) -> list[str]:
    """Parameter names of something of CuPy; of compiled ones, from the first line of the docstring."""
    try:
        names = [name for name, p in inspect.signature(real).parameters.items() if p.kind is not p.VAR_KEYWORD]
    except (ValueError, TypeError):
        head = re.match(r"[\w.]+\((.*?)\)(?: ->.*)?$", (real.__doc__ or "").splitlines()[0])
        assert head, f"{real!r} has no signature to read"
        names = [part.split("=")[0].split()[-1].lstrip("*") for part in head[1].split(", ") if part not in ("", "*", "/", "\\*")]
    return [name for name in names if name != "self"]


def own_signature(own: Any) -> list[str]:
    return [name for name in inspect.signature(own).parameters if name != "self"]


FUNCTIONS = ["empty", "asarray", "asnumpy", "ascontiguousarray", "reshape", "unpackbits"]
METHODS = ["reshape", "swapaxes", "view", "copy", "astype", "fill", "get"]
PROPERTIES = ["shape", "dtype", "ndim", "size", "itemsize", "nbytes", "strides", "flags", "device", "data", "T"]
PRIVATE = ["_c_contiguous", "_f_contiguous"]  # what flags are made of


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    import cupy

    assert set(own_signature(getattr(standin.StandIn(), name))) <= set(real_signature(getattr(cupy, name)))


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    import cupy

    own, real = own_signature(getattr(standin.ndarray, name)), real_signature(getattr(cupy.ndarray, name))
    assert set(own) <= set(real)
    positional = [n for n in own if inspect.signature(getattr(standin.ndarray, name)).parameters[n].kind.name != "KEYWORD_ONLY"]
    assert [n for n in real if n in positional] == positional, "another order"


def test_properties_and_nothing_else() -> None:
    import cupy

    for name in (*PROPERTIES, *PRIVATE):
        assert hasattr(cupy.ndarray, name), name
    public = {name for name in vars(standin.ndarray) if not name.startswith("_")}
    assert public == {*PROPERTIES, *METHODS, "tolist", "item"}
    operators = {name for name in vars(standin.ndarray) if name.startswith("__") and callable(getattr(standin.ndarray, name))}
    assert operators - {"__index__"} <= set(dir(cupy.ndarray))
    assert {"tolist", "item"} <= set(dir(cupy.ndarray))


def test_array_constructor() -> None:
    """The genuine constructor, with the arguments that the backend gives it."""
    import cupy

    host = np.arange(12, dtype=np.uint8)
    pointer = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0), 0)
    real = cupy.ndarray((2, 3, 1), np.uint8, pointer, (6, 2, 1))
    own = standin.ndarray((2, 3, 1), np.uint8, standin.MemoryPointer(host.ctypes.data, host), (6, 2, 1))
    for name in ("shape", "strides", *PRIVATE):
        assert getattr(real, name) == getattr(own, name), name
    assert (real.data.ptr, real.data.device_id) == (own.data.ptr, own.data.device_id)
    assert own.get().ravel().tolist() == [0, 2, 4, 6, 8, 10]


def test_memory_pointer() -> None:
    import cupy

    real, own = cupy.cuda.MemoryPointer, standin.MemoryPointer
    assert own_signature(standin.pointer_to) == real_signature(real) == ["mem", "offset"]
    assert own_signature(own.copy_from_device_async) == real_signature(real.copy_from_device_async)
    assert {"ptr", "device_id", "__add__"} <= set(dir(real))
    host = np.zeros(8, np.uint8)
    pointer = real(cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0), 0)
    assert (pointer + 3).ptr == (own(pointer.ptr, host) + 3).ptr


def test_matmul() -> None:
    import cupy

    assert "out" in inspect.signature(cupy.matmul).parameters
    assert re.search(r"matmul\(x1, x2, /, out=None", cupy.matmul.__doc__)
    assert own_signature(standin.StandIn().matmul) == ["x1", "x2", "out"]


def test_device() -> None:
    import cupy

    public = {name for name in vars(standin.Device) if not name.startswith("_")} | {"id"}
    for name in public:
        assert hasattr(cupy.cuda.Device, name), name
    assert real_signature(cupy.cuda.Device) == ["device"]
    assert own_signature(standin.Device) == ["device"]
    assert {"__enter__", "__exit__", "__eq__"} <= set(dir(cupy.cuda.Device))


def test_cublas() -> None:
    """CuPy's module does not import without cuBLAS, which weighs half a gigabyte; its signatures and constants lie in the file."""
    import cupy_backends

    file = next((Path(cupy_backends.__file__).parent / "cuda" / "libs").glob("cublas.*.so")).read_bytes()
    parameters = own_signature(standin.Cublas.gemmStridedBatchedEx)
    head = re.search(rb"gemmStridedBatchedEx\((intptr_t handle[^)]*)\)", file)
    assert head is not None
    assert [part.split()[-1] for part in head[1].decode().split(", ")] == parameters
    for name in vars(standin.Cublas):
        if name.startswith("CUBLAS"):
            assert b"\0" + name.encode() + b"\0" in file, name


def test_cublas_constants_are_those_of_the_header() -> None:
    """cublas_api.h as CuPy's own numbers of the same enumerations have it, where CuPy repeats them."""
    import cupy

    constants = [name for name in vars(standin.Runtime) if name.startswith("CUDA_R")]
    assert len(constants) == 4
    for name in constants:
        assert getattr(cupy.cuda.runtime, name) == getattr(standin.Runtime, name), name
    assert callable(cupy.cuda.device.get_cublas_handle)


@pytest.mark.parametrize("own", [standin.Stream, standin.Event, standin.MemoryPool, standin.Graph, standin.Memory, standin.Runtime])
def test_what_the_script_for_a_gpu_uses(own: type) -> None:
    import cupy

    real = cupy.cuda.runtime if own is standin.Runtime else getattr(cupy.cuda, own.__name__)
    for name, value in vars(own).items():
        if not name.startswith("_"):
            assert hasattr(real, name), name
            if inspect.isfunction(value):
                assert set(own_signature(value)) <= set(real_signature(getattr(real, name))), name
    if "__init__" in vars(own):
        assert own_signature(own) == real_signature(real)[: len(own_signature(own))]
    for name in ("get_elapsed_time", "get_current_stream", "using_allocator"):
        assert own_signature(getattr(standin, name)) == real_signature(getattr(cupy.cuda, name)), name
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
    for name in ("num_regs", "local_size_bytes", "shared_size_bytes"):
        assert hasattr(cupy.RawKernel, name)
    assert callable(cupy.get_default_memory_pool)


def test_raw_module_and_kernel() -> None:
    import cupy
    import host_build

    assert {"code", "options"} <= set(real_signature(cupy.RawModule))
    assert real_signature(cupy.RawModule.get_function) == own_signature(host_build.HostModule.get_function)
    assert own_signature(host_build.HostKernel.__call__) == real_signature(cupy.RawKernel.__call__)[:3]


# ---------------------------------------------------------------- refusals


@pytest.fixture
def cp() -> standin.StandIn:
    return standin.StandIn()


def test_fresh_memory_is_poisoned(cp: standin.StandIn) -> None:
    assert np.isnan(cp.empty((3, 4), np.float32).get()).all()
    assert (cp.empty(5, np.uint8).get() == 255).all()


def test_no_implicit_conversion(cp: standin.StandIn) -> None:
    import cupy

    words = "Implicit conversion to a NumPy array is not allowed"
    host = np.zeros(3, "f4")
    memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0)
    for array in (cp.empty(3, "f4"), cupy.ndarray((3,), "f4", cupy.cuda.MemoryPointer(memory, 0))):
        with pytest.raises(TypeError, match=words):
            np.asarray(array)


def test_no_mixing_with_numpy(cp: standin.StandIn) -> None:
    a = cp.empty((2, 2), "f4")
    for operands in ((a, a.get()), (a.get(), a)):
        with pytest.raises(TypeError, match="Unsupported type"):
            cp.matmul(*operands)
    with pytest.raises(TypeError):
        cp.ascontiguousarray(a.get())
    with pytest.raises(TypeError):
        a[...] = a.get()
    for operand in (a.get(), np.array(0.0)):
        for operate in (lambda x, y: x * y, lambda x, y: x > y, lambda x, y: x == y):
            with pytest.raises(TypeError):
                operate(a, operand)
            with pytest.raises(TypeError):
                operate(operand, a)


@pytest.mark.parametrize(
    "ask", [bool, int, float, list, lambda a: bool(a == 1), lambda a: bool(a < 0), lambda a: a.item(), lambda a: a.tolist()]
)
def test_no_hidden_waiting(cp: standin.StandIn, ask: Any) -> None:
    with pytest.raises(RuntimeError, match="hidden wait"):
        ask(cp.empty(1, "f4"))


def test_matmul_refuses_what_would_copy_or_round(cp: standin.StandIn) -> None:
    a = cp.empty((2, 2), "f4")
    with pytest.raises(ValueError, match="C-contiguous memory"):
        cp.matmul(a, a, out=cp.empty((2, 2), "f4", order="F"))
    with pytest.raises(ValueError, match="C-contiguous memory"):
        cp.matmul(a, a, out=a)
    with pytest.raises(ValueError, match="one dtype of at least 32 bits"):
        cp.matmul(cp.empty((2, 2), "f2"), cp.empty((2, 2), "f2"))
    with pytest.raises(ValueError, match="one dtype of at least 32 bits"):
        cp.matmul(a, a, out=cp.empty((2, 2), "f8"))
    with standin.Device(1), pytest.raises(ValueError, match="same as the current device"):
        cp.matmul(a, a)


# ---------------------------------------------------------------- memory and capture


@pytest.fixture
def capturing(cp: standin.StandIn) -> Iterator[standin.Stream]:
    """A stream that is current, and captured with a pool of its own."""
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    with stream, cp.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        yield stream
        if stream.is_capturing():
            stream.end_capture()


def test_freed_memory_is_poisoned_and_given_out_again(cp: standin.StandIn) -> None:
    array = cp.empty(100, "f4")
    array.fill(1)
    address, bare = array.data.ptr, standin._bare(array._host)
    assert not np.isnan(bare).any()
    view = array[3:]
    del array
    assert not np.isnan(bare).any(), "a view keeps it"
    del view
    assert np.isnan(bare).all()
    assert cp.empty(100, "f4").data.ptr == address


def test_memory_of_a_pool_that_is_gone_goes_to_others(cp: standin.StandIn) -> None:
    pool = cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc):
        array, kept = cp.empty(77_777, "f4"), cp.empty(77_777, "f4")
    address = array.data.ptr
    del array
    assert (pool.used_bytes(), pool.total_bytes()) == (311_296, 2 * 311_296)
    with cp.cuda.using_allocator(cp.cuda.MemoryPool().malloc):
        assert cp.empty(77_777, "f4").data.ptr != address
    del pool
    fresh = cp.cuda.MemoryPool()  # which has nothing of its own to give, as the default pool may have
    with cp.cuda.using_allocator(fresh.malloc):
        others = [cp.empty(77_777, "f4") for _ in range(3)]
    assert address in [other.data.ptr for other in others]
    assert kept.data.ptr not in [other.data.ptr for other in others]


def test_what_is_captured_happens_when_the_graph_is_launched(cp: standin.StandIn, host: Host) -> None:
    x = cp.asarray(np.array([1, -2], "f4"))
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    with stream, cp.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        x += 1
        y = (x * 2).copy()
        z = cp.empty(2, "f4")
        z.fill(7)
        host.modules["float32"].cp = cp
        host.modules["float32"].get_function("relu")((1,), (2,), (y, z, np.int64(2)))
        x[1:] = z[:1]
        graph = stream.end_capture()
    assert x.get().tolist() == [1, -2]
    assert np.isnan(y.get()).all()
    for want in ([[2, 4], [4, -2], [4, 0]], [[3, 6], [6, 10], [6, 10]]):
        graph.launch()
        assert [array.get().tolist() for array in (x, y, z)] == want


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda cp, x: x.get(), "the current stream is capturing, so reading an array is disallowed"),
        (lambda cp, x: cp.asarray(np.zeros(3)), "the current stream is capturing"),
        (lambda cp, x: cp.cuda.get_current_stream().synchronize(), "cudaErrorStreamCaptureUnsupported"),
        (lambda cp, x: cp.matmul(x, x), "cuBLAS API during stream capture"),
        (lambda cp, x: float(x), "hidden wait"),
    ],
)
def test_what_a_capture_refuses(cp: standin.StandIn, ask: Any, words: str) -> None:
    x = cp.asarray(np.zeros((2, 2), "f4"))
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    with stream, cp.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        with pytest.raises((RuntimeError, NotImplementedError), match=words):
            ask(cp, x)


def test_memory_outside_of_the_graphs_pool_is_refused(cp: standin.StandIn, capturing: standin.Stream) -> None:
    cp.empty(3, "f4")
    with cp.cuda.using_allocator(None), pytest.raises(RuntimeError, match="outside of the graph's pool"):
        cp.empty(3, "f4")


def test_what_has_waited_is_no_graph(cp: standin.StandIn, capturing: standin.Stream) -> None:
    with pytest.raises(standin.CUDARuntimeError):
        capturing.synchronize()
    with pytest.raises(standin.CUDARuntimeError, match="cudaErrorStreamCaptureInvalidated"):
        capturing.end_capture()
    assert not capturing.is_capturing()


def test_streams_that_cannot_be_captured(cp: standin.StandIn) -> None:
    with pytest.raises(RuntimeError, match="cannot capture on the default"):
        cp.cuda.Stream.null.begin_capture()
    with pytest.raises(RuntimeError, match="a blocking stream"):
        cp.cuda.Stream().begin_capture()
