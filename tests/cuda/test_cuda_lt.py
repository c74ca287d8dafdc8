"""(c) Products by cuBLASLt's plans, on the stand-in: layouts, rounding, bias pointers, workspaces, what is kept and for whom."""

from __future__ import annotations

import inspect
import itertools
import re
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gpu_cases
import numpy as np
import pytest
import standin_lt
from host_backend import Host
from standin import Device, Stream

from rectilinear.backends import cupy_loader, cupy_lt
from rectilinear.backends.contract import Probe
from rectilinear.backends.cupy_backend import CupyBackend, Runtime
from rectilinear.backends.cupy_gemm import Gemm
from rectilinear.backends.cupy_lt import Plans
from rectilinear.backends.cupy_scratch import Scratch, Scratches, recording

# ---------------------------------------------------------------- the stand-in is honest


def test_names_and_signatures_are_nvmaths() -> None:
    from nvmath.bindings import cublasLt

    own = {name: each for name, each in vars(standin_lt.CublasLt).items() if inspect.isfunction(each) and not name.startswith("_")}
    assert "matmul" in own
    assert len(own) == 14
    for name, function in own.items():
        head = re.match(rf"{name}\((.*?)\)", getattr(cublasLt, name).__doc__)
        assert head is not None, name
        real = [part.split()[-1] for part in head[1].split(", ") if part]
        assert list(inspect.signature(function).parameters)[1:] == real, name


def test_constants_are_nvmaths() -> None:
    """The widths of attributes are asked of nvmath itself, and so is every enumeration that its module of cuBLASLt has."""
    from nvmath.bindings import cublas

    for name in ("COMPUTE_32F", "COMPUTE_64F", "COMPUTE_32F_FAST_TF32"):
        assert getattr(cupy_lt, name) == cublas.ComputeType[name]
    assert (cublas.Operation.N, cublas.Operation.T) == (0, 1)
    result = standin_lt.cublasLt.MatmulHeuristicResult()
    assert result.ptr == result.algo.ctypes.data  # the algorithm is what it begins with


def test_what_cublaslt_refuses_is_refused(host: Host) -> None:
    lt = host.lt
    layout = lt.matrix_layout_create(0, 4, 4, 3)
    plain = lt.matrix_layout_create(0, 4, 4, 4)
    descriptor, preference, handle = lt.matmul_desc_create(68, 0), lt.matmul_preference_create(), lt.create()
    result, count, value = lt.MatmulHeuristicResult(), np.zeros((), np.int32), np.zeros((), np.int64)

    def heuristic(handle: int, first: int) -> None:
        lt.matmul_algo_get_heuristic(handle, descriptor, first, plain, plain, plain, preference, 1, result.ptr, count.ctypes.data)

    def product(algorithm: int, first: int) -> None:
        lt.matmul(handle, descriptor, 0, first, plain, first, plain, 0, first, plain, first, plain, algorithm, 0, 0, 0)

    refused: list[tuple[str, Callable[[], None]]] = [
        ("width", lambda: lt.matmul_desc_set_attribute(descriptor, lt.MatmulDescAttribute.TRANSA, value.ctypes.data, 8)),
        ("leading dimension", lambda: heuristic(handle, layout)),
        ("handle", lambda: heuristic(7, plain)),
        ("no matrix_layout", lambda: heuristic(handle, descriptor)),
        ("no algorithm", lambda: product(np.zeros(8, np.uint64).ctypes.data, 256)),
    ]
    heuristic(handle, plain)
    # Nothing was said of the alignment, which then is 256 bytes.
    refused.append(("256 bytes", lambda: product(result.ptr, 16)))
    for words, call in refused:
        with pytest.raises(standin_lt.StatusError, match=words if words != "width" else "has 4 bytes, not 8"):
            call()


# ---------------------------------------------------------------- numbers


@pytest.fixture
def plans(host: Host) -> Plans:
    return host.backend.products


OPERATIONS = ("NN", "NT", "TN")
DTYPES = gpu_cases.DTYPES


def operands(operation: str, n: int, k: int, m: int, dtype: str, groups: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """As they are stored: whichever is transposed, with its axes exchanged."""
    lead = () if groups is None else (groups,)
    rng = np.random.default_rng(n * 100 + k * 10 + m)
    a = rng.standard_normal((*lead, k, n) if operation == "TN" else (*lead, n, k))
    b = rng.standard_normal((*lead, m, k) if operation == "NT" else (*lead, k, m))
    return a.astype(gpu_cases.numpy_dtype(dtype)), b.astype(gpu_cases.numpy_dtype(dtype))


def meant(operation: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a.swapaxes(-1, -2) if operation == "TN" else a, b.swapaxes(-1, -2) if operation == "NT" else b


def multiply(host: Host, operation: Any, a: np.ndarray, b: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """On arrays as they lie, through the backend's products."""
    on = [None if each is None else host.cp.ndarray._of(each) for each in (a, b, bias)]
    left, right = meant(operation, a, b)
    out = host.cp.empty((*left.shape[:-1], right.shape[-1]), a.dtype)
    host.backend.products.product(operation, on[0], on[1], out, on[2])
    return out.get()


def close(got: np.ndarray, operation: str, a: np.ndarray, b: np.ndarray) -> bool:
    left, right = meant(operation, a, b)
    want, size = left @ right, np.abs(left) @ np.abs(right)
    half_ulp = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(a.dtype.name, 0.0)
    eps = np.finfo(gpu_cases.sum_dtype(a.dtype)).eps
    return bool((np.abs(got.astype(np.float64) - want) <= 2 * left.shape[-1] * eps * size + half_ulp * np.abs(want)).all())


def spread(a: np.ndarray) -> np.ndarray:
    """The same values with a gap after each row, and after each group."""
    wide = np.full([2 * each for each in a.shape[:-1]] + [a.shape[-1] + 3], np.nan, a.dtype)
    view = wide[(*[slice(None, each) for each in a.shape[:-1]], slice(None, a.shape[-1]))]
    view[...] = a
    return view


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda a: a,
    "transposed": lambda a: np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2),
    "strided rows": spread,
    "strided rows, transposed": lambda a: spread(np.ascontiguousarray(a.swapaxes(-1, -2))).swapaxes(-1, -2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_views_that_cublas_can_take_are_not_copied(host: Host, operation: str, groups: int | None, dtype: str) -> None:
    for n, k, m in ((5, 7, 3), (1, 6, 4), (6, 1, 4), (6, 4, 1), (1, 1, 1), (9, 130, 8)):
        a, b = operands(operation, n, k, m, dtype, groups)
        for first, second in itertools.product(VIEWS.values(), repeat=2):
            got = multiply(host, operation, first(a), second(b))
            assert close(got, operation, a, b)
    assert host.cp.counts["copies"] == 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_group_may_serve_all(host: Host, operation: str) -> None:
    a, b = operands(operation, 5, 7, 3, "float32", 3)
    for one, other in ((a[:1], b), (a, b[:1])):
        first, second = np.broadcast_to(one, a.shape), np.broadcast_to(other, b.shape)
        assert close(multiply(host, operation, first, second), operation, first, second)
    assert host.cp.counts["copies"] == 0


@pytest.mark.parametrize(
    "view",
    [
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
        lambda a: np.ascontiguousarray(a[..., ::-1, :])[..., ::-1, :],
        lambda a: np.ascontiguousarray(a[::-1])[::-1],
        lambda a: np.broadcast_to(a[..., :1], a.shape),
        lambda a: np.append(a.ravel()[:1], a.ravel())[1:].reshape(a.shape),  # one element off the 16 bytes
    ],
)
@pytest.mark.parametrize("groups", [None, 2])
def test_other_views_are_copied(host: Host, view: Callable[[np.ndarray], np.ndarray], groups: int | None) -> None:
    for operation in OPERATIONS:
        a, b = operands(operation, 5, 7, 3, "float32", groups)
        for first, second in ((view(a), b), (a, view(b))):
            assert close(multiply(host, operation, first, second), operation, first, second)
            first.flags.writeable = second.flags.writeable = False  # neither is written to
            multiply(host, operation, first, second)


def test_no_address_has_an_algorithm_of_its_own(host: Host) -> None:
    """Operands off the 16 bytes, and a bias, give the algorithm and the bits of those on them."""
    a, b = operands("NN", 8, 96, 16, "float16")
    bias = np.linspace(-1, 1, 16, dtype=np.float16)
    want = multiply(host, "NN", a, b, bias)

    def off(x: np.ndarray, by: int) -> np.ndarray:
        memory = np.zeros(x.nbytes + by, np.uint8)[by:].view(x.dtype).reshape(x.shape)
        memory[...] = x
        return memory

    for by in (1, 2, 4, 8):
        assert multiply(host, "NN", off(a, by), off(b, by), off(bias, by)).tobytes() == want.tobytes()
    assert len({algorithm for _, algorithm, _ in host.lt.calls}) == 1
    assert host.cp.counts["heuristics"] == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("groups", [None, 2])
def test_results_of_16_bits_are_float32_sums_rounded_once(host: Host, dtype: str, groups: int | None, way: None) -> None:
    """With the bias: 1 + u/2, which alone rounds to 1, and then u/4: together above the middle, they round up."""
    T = gpu_cases.numpy_dtype(dtype)
    ulp = float(np.finfo(np.float16).eps) if dtype == "float16" else 2.0**-7
    lead = () if groups is None else (groups,)
    a = np.array([[1, ulp / 2]], T) * np.ones((*lead, 1, 1), T)
    b = np.ones((*lead, 2, 8), T)
    bias = np.full((*lead, 8), ulp / 4, T)
    assert (multiply(host, "NN", a, b, bias).astype(float) == 1 + ulp).all()
    y = host.backend.affine_forward(*(host.backend.asarray(each) for each in (a, b, bias)), None)
    assert (y.get().astype(float) == 1 + ulp).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_long_sum_is_not_added_up_in_16_bits(host: Host, dtype: str) -> None:
    """Its parts are thousands and one: 16 bits would lose the ones."""
    T = gpu_cases.numpy_dtype(dtype)
    a = np.zeros((4, 256), T)
    a[:, 0], a[:, 70::64], a[:, 255] = 8192, 1, -8192
    assert (multiply(host, "NN", a, np.ones((256, 8), T)).astype(float) == 3).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_long_sum_is_rounded_once_with_a_bias_and_without(host: Host, dtype: str, no_small_layers: None) -> None:
    """Split, it would be rounded before the bias: z is float32 then. What has no bias is rounded by the product, by a plan of its own."""
    be, kind = host.backend, gpu_cases.numpy_dtype(dtype)
    x, w, b = (gpu_cases.uniform(shape, 3 + len(shape)).astype(kind) for shape in ((40, 96), (96, 56), (56,)))
    z = x.astype("f8") @ w.astype("f8")
    on = [be.asarray(a) for a in (x, w, b)]
    for bias in (b, None, b, None):
        got = be.affine_forward(*on[:2], None if bias is None else on[2], None).get().astype("f8")
        want = z if bias is None else z + b.astype("f8")
        half_ulp = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
        assert (np.abs(got - want) <= half_ulp * np.abs(want) + 1e-4).all()
    # Of the same shapes, in float32 throughout, and of the other 16 bits.
    wide = be.affine_forward(*(be.asarray(a.astype("f4")) for a in (x, w)), None, None).get()
    assert np.abs(wide - z).max() < 1e-4
    other = gpu_cases.numpy_dtype("float16" if dtype == "bfloat16" else "bfloat16")
    got = be.affine_forward(*(be.asarray(a.astype("f4").astype(other)) for a in (x, w, b)), None).get()
    assert np.abs(got.astype("f8") - (z + b.astype("f8"))).max() < 0.2  # operands of fewer digits
    found = [(plan.splits, plan.recipe.bias_step is not None) for plan in be.products._plans.values()]
    assert sorted(found) == [(True, False)] * 4 + [(True, True)] * 2  # the last only say that they split


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_group_has_its_own_bias(host: Host, dtype: str) -> None:
    if dtype in ("float32", "float64"):
        assert not host.backend.products.rounds(host.cp.empty((1,), dtype))
        return
    T = gpu_cases.numpy_dtype(dtype)
    bias = np.arange(24).reshape(3, 8).astype(T)
    got = multiply(host, "NN", np.zeros((3, 5, 2), T), np.zeros((3, 2, 8), T), bias)
    assert (got == bias[:, None, :]).all()
    got = multiply(host, "NN", np.zeros((3, 5, 2), T), np.zeros((3, 2, 8), T), np.repeat(bias, 2, axis=-1)[:, ::2])
    assert (got == bias[:, None, :]).all()


def test_no_float32_buffer_of_the_size_of_a_result(host: Host, monkeypatch: pytest.MonkeyPatch, way: None) -> None:
    be, made = host.backend, []
    fresh = host.cp.empty
    monkeypatch.setattr(host.cp, "empty", lambda shape, dtype=float: made.append((np.prod(shape), np.dtype(dtype))) or fresh(shape, dtype))
    x, w, b, dout = (be.asarray(np.ones(shape, np.float16)) for shape in ((64, 32), (32, 48), (48,), (64, 48)))
    _, mask = be.affine_relu_forward(x, w, b, None)
    be.affine_backward(dout, x, w, mask, (True,) * 3, (None,) * 3)
    assert {dtype.name for size, dtype in made if size >= 32 * 48} <= {"float16", "uint8"}  # uint8: workspace


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_nan_and_zeros_are_kept_in_16_bits(host: Host, dtype: str, way: None) -> None:
    """One rule, keep = not (z < 0), on z as it is rounded."""
    T = gpu_cases.numpy_dtype(dtype)
    z = np.array([[np.nan, 0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, -1e-30]], T)
    be = host.backend
    on = [be.asarray(each) for each in (np.ones((1, 1), T), z, np.zeros(8, T))]
    for b in (on[2], None):
        y, mask = be.affine_relu_forward(*on[:2], b, None)
        with np.errstate(invalid="ignore"):
            want = ~(z < 0)
        assert (be.to_numpy(mask).to_bool() == want).all()
        assert np.isnan(y.get()[0, 0])
        assert (y.get()[~want] == 0).all()


# ---------------------------------------------------------------- plans, pointers, workspaces


def calls_of(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is called of nvmath from now on."""
    called: list[str] = []

    def noted(name: str, function: Any) -> Any:
        return lambda *args: (called.append(name), function(*args))[1]

    for name in dir(host.lt):
        if callable(getattr(host.lt, name)) and not name.startswith("_") and not isinstance(getattr(host.lt, name), type):
            monkeypatch.setattr(host.lt, name, noted(name, getattr(host.lt, name)))
    monkeypatch.setattr(host.backend.products, "_matmul", host.lt.matmul)
    return called


def test_a_product_is_one_call(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new bias costs one more, which sets its pointer."""
    a, b = operands("NN", 8, 16, 24, "float16")
    first, second = np.ones(24, np.float16), np.zeros(24, np.float16)
    host.backend.products  # noqa: B018 - made here
    called = calls_of(host, monkeypatch)
    multiply(host, "NN", a, b)
    multiply(host, "NN", a, b, first)
    assert called.count("matmul_algo_get_heuristic") == 2
    called.clear()
    multiply(host, "NN", a, b)
    multiply(host, "NN", a, b, first)
    assert called == ["matmul", "matmul"]
    multiply(host, "NN", a, b, second)
    assert [name for name in called if "dtype" not in name] == ["matmul"] * 2 + ["matmul_desc_set_attribute", "matmul"]


def test_the_bias_is_the_one_that_is_given(host: Host) -> None:
    a, b = operands("NN", 4, 16, 8, "float16")
    a[...] = 0
    biases = [np.full(8, i, np.float16) for i in range(3)]
    for i in (0, 1, 0, 2, 2, 1):
        assert (multiply(host, "NN", a, b, biases[i]) == i).all()
        assert (multiply(host, "NN", a, b) == 0).all()


def test_each_kind_of_product_has_a_plan_of_its_own(host: Host) -> None:
    """Shapes, leading dimensions, dtype, transposes, bias, device: each alone is another plan, and the same again is not."""
    square = np.ones((8, 8))
    wide = np.ones((8, 12))[:, :8]
    bias = np.ones(8, np.float16)
    kinds = [("NN", square, square, None), ("NT", square, square, None), ("TN", square, square, None), ("NN", wide, square, None)]
    kinds += [("NN", square, square, bias), ("NN", square[:4], square, None)]
    for repeat in range(2):
        for count, (operation, a, b, c) in enumerate(kinds, start=1):
            lies_wide = a.strides[0] > 8 * a.itemsize
            a, b = (np.ones((8, 12), np.float16)[:, :8] if lies_wide else a.astype(np.float16)), b.astype(np.float16)
            multiply(host, operation, a, b, c)
            assert host.cp.counts["heuristics"] == (len(kinds) if repeat else count)
    bfloat16 = square.astype(gpu_cases.numpy_dtype("bfloat16"))
    assert (multiply(host, "NN", bfloat16, bfloat16).astype(float) == 8).all()
    multiply(host, "NN", square.astype("f4"), square.astype("f4"))
    with Device(1):
        multiply(host, "NN", square.astype("f4"), square.astype("f4"))
    assert host.cp.counts["heuristics"] == len(kinds) + 3


def test_no_more_plans_are_kept_than_a_bound_and_what_goes_is_destroyed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_lt, "_MOST_PLANS", 3)
    for n in range(1, 10):
        a, b = operands("NN", n, 4, 5, "float16")
        multiply(host, "NN", a, b)
        multiply(host, "NN", a, b, np.ones(5, np.float16))
        assert len(host.backend.products._plans) <= 3
    # A plan has three layouts and a descriptor.
    assert len(host.lt.alive) == 3 * 4
    multiply(host, "NN", *operands("NN", 1, 4, 5, "float16"))  # made anew


def on_threads(work: Callable[[int], None], count: int = 2) -> None:
    """Run work(0), work(1), ... at once, and raise what one of them raised."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(i: int) -> None:
        barrier.wait()
        try:
            work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_two_threads_on_two_streams(host: Host) -> None:
    """Each has its descriptor, with its bias, and its workspace; the plan is one."""
    a, b = operands("NN", 8, 256, 16, "float16")
    left, right = meant("NN", a, b)

    def work(i: int) -> None:
        bias = np.full(16, 100 * i, np.float16)
        with Stream(non_blocking=True):
            for _ in range(20):
                got = multiply(host, "NN", a, b, bias).astype(float)
                assert np.allclose(got, left @ right + 100 * i, atol=0.2)

    on_threads(work)
    descriptors = {descriptor for descriptor, _, _ in host.lt.calls}
    streams = {stream for _, _, stream in host.lt.calls}
    assert (len(descriptors), len(streams), host.cp.counts["heuristics"]) == (2, 2, 1)
    assert len(set(host.lt.workspaces.values())) == 2


def test_two_streams_of_one_thread_have_two_workspaces(host: Host) -> None:
    """Their work is done at the same time, whoever launches it."""
    a, b = operands("TN", 8, 256, 16, "float32")
    for stream in (Stream(non_blocking=True), Stream(), Stream.null):
        with stream:
            assert close(multiply(host, "TN", a, b), "TN", a, b)
    assert len(set(host.lt.workspaces.values())) == 3


def test_a_graph_has_a_workspace_of_its_own(host: Host) -> None:
    a, b = operands("NN", 8, 256, 16, "float32")
    multiply(host, "NN", a, b)
    (of_stream,) = host.lt.workspaces.values()
    scratch = Scratch(host.cp)
    with recording(scratch):
        multiply(host, "NN", a, b)
    (of_graph,) = host.lt.workspaces.values()
    assert of_graph != of_stream
    assert of_graph[0] == scratch.workspace(1).data.ptr


@pytest.mark.parametrize("own", [True, False])
def test_no_plan_is_made_while_a_stream_captures(host: Host, own: bool) -> None:
    """Whether our capture records or another: what was planned before works, what is new says what to do."""
    cp, products = host.cp, host.backend.products
    a, b = (cp.asarray(each) for each in operands("NN", 4, 6, 8, "float16"))
    bias, out = cp.asarray(np.ones(8, np.float16)), cp.empty((4, 8), np.float16)
    products._made("NN", a, b, bias, out.dtype)
    assert host.cp.counts["products"] == 0
    words = "first, ordinary call" if own else "call the function once before the capture begins"
    stream = Stream(non_blocking=True)
    with stream, recording(Scratch(cp)) if own else stream:
        stream.begin_capture()
        try:
            products.product("NN", a, b, out, bias)
            with pytest.raises(RuntimeError, match=words):
                products.product("NN", a, b, out)
        finally:
            graph = stream.end_capture()
    other = cp.empty((4, 8), np.float16)
    products.product("NN", a, b, other)
    assert host.cp.counts["heuristics"] == 2
    products.product("NN", a, b, other, cp.asarray(np.zeros(8, np.float16)))  # another pointer in the descriptor
    assert np.isnan(out.get()).all()  # recording computes nothing
    bias[...] = cp.asarray(np.full(8, 3, np.float16))
    graph.launch()
    assert np.allclose(out.get().astype(float), other.get().astype(float) + 3, atol=0.02)


def test_each_device_has_its_handle(host: Host) -> None:
    a, b = operands("NN", 4, 6, 8, "float32")
    for device in (0, 1, 0, 1):
        with Device(device):
            assert close(multiply(host, "NN", a, b), "NN", a, b)
    assert len(host.lt._handles) == 2


# ---------------------------------------------------------------- which products, and TF32


@pytest.mark.parametrize("way", ["plans", "gemm"])
def test_tf32_is_off_unless_asked_for(host: Host, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the stacked form too. Of the plain form by CuPy's products, CuPy itself decides, by the same variable."""
    monkeypatch.setattr(cupy_loader, "_cublaslt", lambda: host.lt if way == "plans" else __import__("no_such_module"))
    a, b = operands("NN", 4, 6, 8, "float32", 2)
    computes = []
    gemm = host.cp.cuda.cublas.gemmStridedBatchedEx
    monkeypatch.setattr(host.cp.cuda.cublas, "gemmStridedBatchedEx", lambda *args: (computes.append(args[-2]), gemm(*args)))
    for variable, wanted in ((None, 68), ("0", 68), ("1", 77)):
        monkeypatch.delenv("CUPY_TF32", raising=False)
        if variable is not None:
            monkeypatch.setenv("CUPY_TF32", variable)
        products = cupy_loader.products(host.cp, Scratches())
        out = host.cp.empty((2, 4, 8), np.float32)
        products.product("NN", host.cp.asarray(a), host.cp.asarray(b), out)
        if way == "plans":
            (plan,) = products._plans.values()
            computes.append(plan.recipe.compute)
        assert computes.pop() == wanted
        assert computes == []
        assert close(out.get(), "NN", a, b) == (wanted == 68)
        for dtype, expected in (("float16", 68), ("float64", 70)) if way == "plans" else ():
            products._made("NN", *(host.cp.asarray(each) for each in operands("NN", 4, 6, 8, dtype)), None, np.dtype(dtype))
            assert list(products._plans.values())[-1].recipe.compute == expected


def test_the_choice_is_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen() -> Any:
        return cupy_loader.products(host.cp, Scratches())

    # nvmath-python is here, but no driver: it imports, and its first call refuses.
    found = chosen()
    assert type(found) is Gemm
    assert found.about.startswith("cuBLAS 13.1.0 (since nvmath-python does not work here: CUDA driver is not found")
    monkeypatch.setattr(cupy_loader, "_cublaslt", lambda: host.lt)
    assert type(chosen()) is Plans
    assert chosen().about == "cuBLASLt 13.1.0"
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "nvmath.bindings", None)
    assert chosen().about.startswith("cuBLAS 13.1.0 (")
    monkeypatch.undo()

    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'nvmath'", name="nvmath")

    monkeypatch.setattr(cupy_loader, "_cublaslt", missing)
    assert chosen().about == "cuBLAS 13.1.0 (without nvmath-python)"


def test_no_algorithm_is_said_with_what_to_do(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.lt, "matmul_algo_get_heuristic", lambda *args: None)
    monkeypatch.setattr(host.lt, "MatmulHeuristicResult", lambda: SimpleNamespace(ptr=0, state=0, workspace_size=0))
    with pytest.raises(RuntimeError, match=r"no algorithm for a product of float32 of shapes \(4, 6\) and \(6, 8\).*without nvmath-python"):
        multiply(host, "NN", *operands("NN", 4, 6, 8, "float32"))


def test_products_are_chosen_at_the_first_one(host: Host, no_small_layers: None) -> None:
    """Not when CuPy is imported: choosing asks a device."""
    asked: list[int] = []
    runtime = Runtime(host.cp, host.modules.__getitem__, lambda cp, scratches: (asked.append(1), Gemm(cp, scratches))[1])
    backend = CupyBackend(lambda: runtime, lambda backend: Probe(True))
    x = backend.asarray(np.ones((4, 4), "f4"))
    backend.relu_forward(x, None)
    assert asked == []
    backend.affine_forward(x, x, None, None)
    backend.affine_forward(x, x, None, None)
    assert asked == [1]
