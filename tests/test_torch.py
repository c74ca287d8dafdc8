"""rectilinear.torch: gradients, modules and `accelerate`, against PyTorch itself, and where its transforms and modes look on."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys
import threading
import types
import weakref
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import rectilinear
from rectilinear import threads
from rectilinear.backends import registry

from . import subprocesses

pytestmark = pytest.mark.libraries

torch: Any = None
rt: Any = None
F: Any = None


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    """PyTorch is imported where these tests run, and not where they are only collected."""
    global torch, rt, F
    torch = __import__("torch")
    F = torch.nn.functional
    rt = __import__("rectilinear.torch").torch
    __import__("rectilinear.torch.acceleration")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[True, False], ids=["kernels", "pytorch"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What is found faster, in place of measuring it."""
    choose(monkeypatch, request.param)
    return bool(request.param)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, True)


def choose(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    monkeypatch.setattr(rt.acceleration, "_COPIES", rt.timing.Together())
    monkeypatch.setattr(rt.timing, "kernels_are_faster", lambda *_: kernels)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the kernels were called, forward and backward."""
    counts = {"forward": 0, "backward": 0}

    def counted(name: str, run: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return run(*args)

        return call

    for name in counts:
        monkeypatch.setattr(rt.primitives, name, counted(name, getattr(rt.primitives, name)))
    return counts


def leaves(n: int = 5, d: int = 7, m: int = 9) -> list[Any]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((n, d), (m, d), (m,))]


def net(dtype: Any = None) -> Any:
    torch.manual_seed(1)
    nn = torch.nn
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(inplace=True), nn.Linear(12, 3)).to(dtype)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def gradients(model: Any, x: Any) -> list[Any]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


# ---------------------------------------------------------------- functions, operators, modules


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("name", ["affine", "affine_relu"])
def test_first_and_second_gradients(name: str, backend: str, count: dict[str, int]) -> None:
    layer, (x, w, b) = getattr(rt, name), leaves()
    operator = {"affine": torch.ops.rectilinear.affine, "affine_relu": lambda *a: torch.ops.rectilinear.affine_relu(*a)[0]}[name]
    with rectilinear.use_backend(backend):
        for function, arguments in ((layer, (x, w, b)), (layer, (x, w)), (operator, (x, w, b)), (operator, (x, w, None))):
            before = count["backward"]
            assert torch.autograd.gradcheck(function, arguments)
            assert count["backward"] > before
            assert torch.autograd.gradgradcheck(function, arguments)
            given = [t for t in arguments if t is not None]
            once, again = (torch.autograd.grad(function(*arguments).sum(), given, create_graph=more) for more in (False, True))
            for one, other in zip(once, again, strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3, 0), (0, 3, 0), (2, 0, 4)], ids=str)
def test_no_features_and_no_samples(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, requires_grad=True)
    w, b = torch.ones(5, shape[-1], requires_grad=True), torch.ones(5, requires_grad=True)
    ours, theirs = rt.affine(x, w, b), torch.nn.functional.linear(x, w, b)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(*(torch.autograd.grad(out.sum(), (x, w, b)) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_no_tensor() -> None:
    array = np.ones((2, 3), "f4")
    with pytest.raises(TypeError, match="must be Tensor"):
        rt.affine(array, torch.ones(5, 3), None)
    with pytest.raises(TypeError, match=r"relu: x is of type ndarray; it takes a torch\.Tensor"):
        rt.relu(array)


def test_relu_first_and_second_gradients() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    for function in (rt.relu, torch.ops.rectilinear.relu):
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("served", [True, False], ids=["kernels", "pytorch"])
def test_at_zero_the_gradient_passes(served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not served:
        monkeypatch.setattr(rt.primitives, "backend_for", lambda _: None)
    for dtype in (torch.float32, torch.float64, *(() if served else (torch.float16, torch.bfloat16))):
        tiny = float(torch.finfo(dtype).smallest_normal)
        x = torch.tensor([[-1.0, -tiny, -0.0, 0.0, tiny, float("nan")]], dtype=dtype, requires_grad=True)
        out = rt.relu(x)
        out.sum().backward()
        assert x.grad.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]
        torch.testing.assert_close(out, torch.relu(x), equal_nan=True)
        clean = torch.tensor([[-1.0, -0.0, 0.0, 2.0]], dtype=dtype, requires_grad=True)
        rt.affine_relu(clean, torch.eye(4, dtype=dtype)).sum().backward()
        assert clean.grad.tolist() == [[0.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("served", [True, False], ids=["kernels", "pytorch"])
def test_operators_keep_pytorchs_rules(served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not served:
        monkeypatch.setattr(rt.primitives, "backend_for", lambda _: None)
    x, w, b = leaves()
    dout = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    ops = torch.ops.rectilinear
    bits = ops.affine_relu(x, w, b)[1]
    calls = [(ops.affine, (x, w, b)), (ops.affine_relu, (x, w, None)), (ops.relu, (x,)), (ops.relu_backward, (x, x.detach()))]
    calls += [(ops.affine_backward, (dout, x, w, bits, [True, False, True])), (ops.affine_backward, (dout, x, w, None, [True] * 3))]
    permuted = torch.randn(4, 3, 2).permute(1, 2, 0)
    calls += [(ops.relu, (permuted,)), (ops.relu_backward, (torch.randn(3, 2, 4), permuted)), (ops.relu, (torch.empty(0, 3).T,))]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_operators_compute_alike_whoever_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that is chosen when a compiled graph runs may not be the one it was compiled under, and may serve another library."""
    ops = torch.ops.rectilinear
    x, w, b, dout = (torch.randn(shape) for shape in ((5, 6), (11, 6), (11,), (5, 11)))
    x[0, 0] = float("nan")

    def everything() -> list[Any]:
        out, bits = ops.affine_relu(x, w, b)
        gradients = ops.affine_backward(dout, x, w, bits, [True, True, True])
        return [ops.affine(x, w, b), out, bits, *gradients, ops.relu(x), ops.relu_backward(dout[:, :6], x)]

    by_kernels = everything()
    monkeypatch.setattr(rt.primitives, "backend_for", lambda _: None)
    monkeypatch.setattr(rt.primitives.registry, "active", None)
    for got, want in zip(everything(), by_kernels, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_a_gradient_is_pytorchs_where_the_backend_chosen_by_then_serves_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `use_backend("cupy")` does for NumPy's arrays, which a tensor's are."""
    x, w, b = (torch.randn(shape, requires_grad=True) for shape in ((5, 6), (9, 6), (9,)))
    for function, operands in ((rt.affine, (x, w, b)), (rt.affine_relu, (x, w, b)), (rt.relu, (x,))):
        want = torch.autograd.grad(function(*operands).sum(), operands)
        out = function(*operands)
        with monkeypatch.context() as patch:
            patch.setattr(rt.primitives.registry, "active", lambda: types.SimpleNamespace(library="array_api_strict"))
            for got, one in zip(torch.autograd.grad(out.sum(), operands), want, strict=True):
                close(got, one)


def test_operators_refuse_what_does_not_fit() -> None:
    """Called by their names, where nobody has looked before: kernels would read beyond what they are given."""
    ops, one = torch.ops.rectilinear, torch.ones
    bits = one(4, 1, dtype=torch.uint8)
    for operator, operands in (
        (ops.affine, (one(4, 5, dtype=torch.float64), one(3, 5), None)),
        (ops.affine, (one(4, 5), one(3, 6), None)),
        (ops.affine, (one(4, 5), one(3, 5), one(1))),
        (ops.affine, (one(4, 5).half(), one(3, 5).half(), None)),
        (ops.affine_relu, (one(2, 4, 5), one(3, 5), None)),
        (ops.affine_relu, (one(4, 5), one(3, 5), one(3, dtype=torch.float64))),
        (ops.affine_backward, (one(4, 2), one(4, 5), one(3, 5), None, [True] * 3)),
        (ops.affine_backward, (one(4, 3), one(4, 5), one(3, 5), bits[:3], [True] * 3)),
        (ops.affine_backward, (one(4, 3), one(4, 5), one(3, 5), bits.float(), [True] * 3)),
        (ops.affine_backward, (one(4, 3), one(4, 5), one(3, 5), None, [True] * 2)),
        (ops.relu, (one(4, dtype=torch.int64),)),
        (ops.relu_backward, (one(4, dtype=torch.float64), one(4))),
        (ops.relu_backward, (one(3), one(4))),
    ):
        for device in ("cpu", "meta"):
            with pytest.raises(RuntimeError, match="operands do not fit together"):
                operator(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in operands))


def test_relu_keeps_the_layout_of_what_it_is_given() -> None:
    for x in (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 3, 2).permute(1, 2, 0),
        torch.randn(3, 1).expand(3, 4),
    ):
        leaf = x.clone().requires_grad_()
        for given in (x, leaf):
            assert rt.relu(given).stride() == F.relu(given).stride()
            close(rt.relu(given), F.relu(given))
        rt.relu(leaf).square().sum().backward()
        assert leaf.grad.stride() == leaf.stride()
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: rt.relu(x) * 2, fullgraph=True, backend="aot_eager")
        close(compiled(x), F.relu(x) * 2)


def test_what_a_layer_was_given_is_free_after_the_backward_pass(kernels: None) -> None:
    """Also where weights are frozen, and whoever keeps the result."""
    frozen = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3))).requires_grad_(False)
    rt.accelerate(frozen)
    weight, wide = torch.randn(16, 8), torch.randn(16, 8, requires_grad=True)
    for function, before in (
        (lambda h: rt.affine(h, weight), True),
        (lambda h: rt.affine_relu(h, weight), True),
        (lambda h: rt.affine_relu(h, wide), False),
        (frozen, False),
    ):
        given = torch.randn(4, 8, requires_grad=True) * 2
        watched = weakref.ref(given)
        out = function(given)
        del given
        assert (watched() is None) == before
        again = out.sum()
        again.backward(retain_graph=True)
        again.backward()
        assert watched() is None
        with pytest.raises(RuntimeError, match="second time"):
            again.backward()


def test_a_weight_that_is_no_parameter_is_free_as_early_as_pytorchs() -> None:
    for x in (torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)):
        freed = []
        for function in (F.linear, rt.affine, rt.affine_relu):
            weight = torch.randn(16, 8, requires_grad=True) * 2
            watched = weakref.ref(weight)
            out = function(x, weight)
            del weight
            freed.append([watched() is None])
            out.sum().backward()
            freed[-1].append(watched() is None)
        assert freed[1:] == [freed[0]] * 2


def test_a_checkpoint_may_compute_again_by_another_backend() -> None:
    from torch.utils.checkpoint import checkpoint

    x, w = torch.randn(8, 6, requires_grad=True), torch.randn(16, 6, requires_grad=True)
    want = torch.autograd.grad(rt.affine_relu(x, w).sum(), (x, w))
    for forward, backward in (("numba", "numpy"), ("numpy", "numba")):
        with rectilinear.use_backend(forward):
            out = checkpoint(rt.affine_relu, x, w, use_reentrant=False)
        with rectilinear.use_backend(backward):
            for got, one in zip(torch.autograd.grad(out.sum(), (x, w)), want, strict=True):
                close(got, one)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_masks_are_free_after_the_backward_pass(backend: str) -> None:
    """Whatever the backend keeps in their place, and also where only a bias learns."""
    x, w, b = torch.randn(4, 8), torch.randn(8, 8), torch.zeros(8, requires_grad=True)
    with rectilinear.use_backend(backend):
        out = rt.affine_relu(x, w, b)
        (kept,) = [t for t in out.grad_fn.saved_tensors if t is not None]
        assert (kept.dtype, kept.shape) == (torch.uint8, (4, 1))
        watched = weakref.ref(kept)
        del kept
        out.sum().backward()
        assert watched() is None
        with pytest.raises(RuntimeError, match="second time"):
            out.sum().backward()


def test_any_layout_and_number_of_axes() -> None:
    wide, w, b = (torch.randn(shape, dtype=torch.float64) for shape in ((10, 4, 14), (7, 9), (18,)))
    w, b = w.T, b[::2]
    for x in (wide[:, 0, ::2], wide[..., ::2], wide.transpose(0, 1)[..., :7], wide[0, 0, :7], wide[:0, 0, :7], wide[0, :, :7].T[:, :].T):
        close(rt.affine(x, w, b), F.linear(x, w, b))
        close(rt.relu(x), F.relu(x))
        leaf = x.detach().clone().requires_grad_()
        for f in (lambda *a: F.relu(F.linear(*a)), rt.affine_relu):
            leaf.grad = None
            f(leaf, w, b).square().sum().backward()
            want = leaf.grad if f is not rt.affine_relu else want  # noqa: F821  # the first one's
        close(leaf.grad, want)


def test_what_does_not_fit_is_pytorchs_error() -> None:
    w, b = torch.ones(2, 3), torch.ones(2)
    for x, weight, bias in (
        (torch.ones(4, 5), w, b),
        (torch.ones(4, 3, dtype=torch.float64), w, b),
        (torch.ones(4, 3, dtype=torch.float64), w, None),
        (torch.ones(4, 3), w, torch.ones(3)),
        (torch.ones(4, 3), torch.ones(1, 2, 3), b),
    ):
        with pytest.raises(RuntimeError):
            rt.affine(x, weight, bias)


def test_nothing_is_copied_and_nothing_needless_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read the weight where it lies, write its gradient in that layout, and the first layer gets no dx."""
    seen: dict[str, Any] = {}
    backend = rectilinear.backends.registry.active()

    class Spy:
        library = "numpy"

        def affine_relu_forward(self, x: Any, w: Any, b: Any, out: Any) -> Any:
            seen["w"] = w
            return backend.affine_relu_forward(x, w, b, out)

        def affine_backward(self, dout: Any, x: Any, w: Any, keep: Any, wanted: Any, out: Any) -> Any:
            seen.update(wanted=wanted, dw=out[1], w_again=w)
            return backend.affine_backward(dout, x, w, keep, wanted, out)

    monkeypatch.setattr(rt.primitives.registry, "active", Spy)
    layer = rt.AffineReLU(8, 4)
    layer(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert seen["w"].ctypes.data == seen["w_again"].ctypes.data == layer.weight.data_ptr()
    assert seen["w"].shape == (8, 4)
    layer.zero_grad()
    layer(torch.randn(3, 8)).sum().backward()
    assert seen["wanted"] == (False, True, True)
    assert seen["dw"].ctypes.data == layer.weight.grad.data_ptr()
    assert layer.weight.grad.is_contiguous()


def test_modules_have_a_linears_state() -> None:
    plain = torch.nn.Linear(6, 4)
    for kind, want in ((rt.Affine, plain), (rt.AffineReLU, lambda x: F.relu(plain(x)))):
        layer = kind(6, 4)
        assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
        layer.load_state_dict(plain.state_dict())
        x = torch.randn(5, 6)
        close(layer(x), want(x))
        assert kind(6, 4, bias=False).bias is None


def test_the_way_to_a_gpu_writes_into_pytorchs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On NumPy's arrays in the place of CuPy's: operands, order and outputs of what is otherwise only called with CUDA tensors."""

    @contextmanager
    def device(_: Any) -> Any:
        yield rectilinear.backends.registry.active(), lambda t: None if t is None else t.detach().numpy()

    monkeypatch.setattr(rt.primitives, "_device", device)
    x, w, b = (t.detach() for t in leaves())
    dout = torch.randn(5, 9, dtype=torch.float64)
    for relu in (False, True):
        out, keep = rt.primitives._forward_on_device(x, w, b, relu)
        want, want_keep = rt.primitives.forward(x, w, b, relu)
        assert torch.equal(out, want)
        for needs in ((True, True, True), (False, True, False)):
            got = rt.primitives._backward_on_device(dout, x, w, keep, needs)
            for one, other in zip(got, rt.primitives.backward(dout, x, w, want_keep, needs), strict=True):
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other)


# ---------------------------------------------------------------- accelerate: the same results


def test_forward_and_gradients_are_the_models(chosen: bool, count: dict[str, int]) -> None:
    model, plain, x = net(), net(), torch.randn(10, 6)
    before = dict(model.named_parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rt.accelerate(model)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for got, want in zip(gradients(model, x), gradients(plain, x), strict=True):
        close(got, want)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            close(model(x), plain(x))
    assert (count["forward"] > 0) == (count["backward"] > 0) == chosen


def test_undo_gives_back_what_there_was(kernels: None) -> None:
    model, x = net(), torch.randn(4, 6)
    kinds = [type(m) for m in model.modules()]
    want = model(x)
    handle = rt.accelerate(model)
    assert [type(m) for m in model.modules()] != kinds
    assert isinstance(model[0], torch.nn.Linear)
    handle.undo()
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(x), want)
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in net().modules()]
    handle = rt.accelerate(model)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    torch.testing.assert_close(model(x), want)
    handle.undo()
    torch.testing.assert_close(model(x), want)
    assert type(model[2]) is torch.nn.Linear
    linear = torch.nn.Linear(3, 3)
    first, second = rt.accelerate(linear), rt.accelerate(linear)
    second.undo()
    first.undo()
    assert type(linear) is torch.nn.Linear


@pytest.mark.parametrize("at_zero", [0, 1])
def test_the_gradient_at_zero_is_as_asked(at_zero: int, chosen: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    rt.accelerate(model, relu_at_zero=at_zero)
    x = torch.tensor([[-1.0, 0.0, -0.0, 2.0]], requires_grad=True)
    for f in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        x.grad = None
        f(x).sum().backward()
        assert x.grad.tolist() == [[0.0, at_zero, at_zero, 1.0]]


def test_parts_of_a_sequential_do_what_they_did(kernels: None) -> None:
    model, x = net(), torch.randn(4, 6) - 5

    def parts() -> list[Any]:
        return [model[:1](x), model[0](x), model[:2](x), model[2:](model[:2](x)), model[1](x), (model[:1] + model[1:2])(x)]

    want = parts()
    rt.accelerate(model, relu_at_zero=0)
    for got, was in zip(parts(), want, strict=True):
        close(got, was)
    assert (want[0] < 0).any()


def test_hooks_added_later_see_what_they_would(kernels: None) -> None:
    model, plain, x = net(), net(), torch.randn(4, 6)
    rt.accelerate(model)
    seen: list[list[Any]] = [[], []]
    for m, log in zip((model, plain), seen, strict=True):
        m[0].register_forward_hook(lambda _m, _i, out, log=log: log.append(out.detach().clone()))
        m[3].register_forward_pre_hook(lambda _m, given, log=log: log.append(given[0].detach().clone()))
        m(x)
    assert len(seen[0]) == len(seen[1]) == 2
    for got, want in zip(*seen, strict=True):
        close(got, want)
    model[2].forward = lambda x: x[:, :12]
    plain[2].forward = model[2].forward
    close(model(x), plain(x))
    every: list[Any] = []
    model = net()
    rt.accelerate(model)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: every.append(m))
    try:
        model(x)
    finally:
        handle.remove()
    assert every == [*model, model]


def test_changes_of_the_parameters_are_seen(kernels: None) -> None:
    model, plain, x = net(), net(), torch.randn(4, 6)
    rt.accelerate(model)
    for m in (model, plain):
        m(x)
        m[0].weight.data = m[0].weight.data.repeat(1, 2)[:, ::2]  # other memory and strides
        with torch.no_grad():
            m[2].weight.mul_(2)
        m[4].weight.requires_grad_(False)
    for got, want in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.double()(x.double()), rt.accelerate(copy.deepcopy(model)) and model(x.double()))
    close(model.to(torch.bfloat16)(x.bfloat16()), plain.to(torch.bfloat16)(x.bfloat16()))


def test_what_cannot_be_served_is_left_alone() -> None:
    nn = torch.nn

    class Own(nn.Linear):
        pass

    hooked, replaced = nn.Linear(3, 3), nn.Linear(3, 3)
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x
    cases = {
        "hooks": hooked,
        "replaced": replaced,
        "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        "Own": Own(3, 3),
        "bfloat16": nn.Linear(3, 3, dtype=torch.bfloat16),
        "meta": nn.Linear(3, 3, device="meta"),
        "Lazy": nn.LazyLinear(3),
        "NonDynamicallyQuantizableLinear": nn.MultiheadAttention(4, 2),
    }
    for reason, module in cases.items():
        kinds = [type(m) for m in module.modules()]
        handle = rt.accelerate(module)
        assert [type(m) for m in module.modules()] == kinds
        assert len(handle.rows) == 1
        assert reason in handle.report
        assert "left alone" in handle.report
    inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    inner.register_forward_pre_hook(lambda *_: None)
    assert [row.left_alone is None for row in rt.accelerate(inner).rows] == [False, True]


def test_wrong_arguments_say_what_is_wanted() -> None:
    with pytest.raises(TypeError, match=r"accelerate: model is a Tensor; it takes a torch.nn.Module"):
        rt.accelerate(torch.ones(2))
    rt.accelerate(net(), relu_at_zero=np.int64(0)).undo()
    for at_zero in (2, "1", torch.tensor([0, 1])):
        with pytest.raises(ValueError, match=r"relu_at_zero is .*; it takes 1 .* or 0"):
            rt.accelerate(net(), relu_at_zero=at_zero)
    model = net()
    rt.accelerate(model)
    with pytest.raises(TypeError, match=r"argument 'input' .* must be Tensor, not numpy.ndarray"):
        model(np.ones((3, 6), "f4"))


def test_layers_that_follow_one_another_are_one_call(kernels: None, count: dict[str, int]) -> None:
    """One function for autograd, of any number of layers, one of them twice; nothing below what needs a gradient is computed."""
    nn = torch.nn
    twice = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(6, 6), twice, nn.ReLU(), twice, nn.ReLU(), nn.ReLU(), nn.Linear(6, 2, bias=False)).double()
    plain, x = copy.deepcopy(model), torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    rt.accelerate(model)
    chain = model[:5](x)
    assert chain.grad_fn.next_functions[0][0].name() == "_LayersBackward"
    assert len(chain.grad_fn.next_functions[0][0].next_functions) == 1 + 3 * 2
    close(chain, plain[:5](x))
    for got, want in zip(gradients(model, x), gradients(plain, x), strict=True):
        close(got, want)
    for m in (model, plain):
        m[0].requires_grad_(False)
        m[1].bias.requires_grad_(False)
    samples, before = x.detach(), count["backward"]
    for got, want in zip(gradients(model, samples), gradients(plain, samples), strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.allclose(got, want)
    assert count["backward"] == before + 3
    linears = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    assert rt.accelerate(linears).rows[0].kind == "Sequential"
    assert linears(x.detach().float()).grad_fn.next_functions[0][0].name() == "_LayersBackward"


def test_what_a_backward_pass_does_not_read_may_change_before_it(kernels: None) -> None:
    """As with PyTorch's own operations."""
    nn = torch.nn
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    model[0].requires_grad_(False)
    plain = copy.deepcopy(model)
    rt.accelerate(model)
    for with_gradient in (False, True):
        results = []
        for m in (plain, model):
            x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).requires_grad_(with_gradient)
            out = m(x)
            with torch.no_grad():
                x.zero_()
                m[3].bias.zero_()
                if not with_gradient:
                    m[0].weight.zero_()
                    m[1].weight.mul_(2)
            results.append(torch.autograd.grad(out.sum(), [t for t in (x, *m.parameters()) if t.requires_grad], retain_graph=True))
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    assert [t is None for t in out.grad_fn.saved_tensors] == [True, False, False, False, False, False, True, False, True]
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .* differentiate the gradient"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("at_zero", [0, 1])
def test_second_gradients_of_layers_in_one_call(at_zero: int, kernels: None, count: dict[str, int]) -> None:
    nn = torch.nn
    twice = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), twice, nn.ReLU(), twice, nn.Linear(4, 2)).double()
    plain, x = copy.deepcopy(model), torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    rt.accelerate(model, relu_at_zero=at_zero)

    def out(x: Any, *parameters: Any) -> Any:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    names, parameters = zip(*model.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(out, (x, *parameters))
    assert count["backward"] > 0
    assert torch.autograd.gradgradcheck(out, (x, *parameters))
    for vectorize in (False, True):
        hessians = [torch.autograd.functional.hessian(lambda x, m=m: m(x).pow(3).sum(), x, vectorize=vectorize) for m in (model, plain)]
        torch.testing.assert_close(*hessians)


# ---------------------------------------------------------------- accelerate: what looks on


def test_copies_and_files_are_the_model(kernels: None) -> None:
    model, x = net(), torch.randn(4, 6)
    rt.accelerate(model, relu_at_zero=0)
    want = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), want)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert other[0].weight.data_ptr() != model[0].weight.data_ptr()
        rt.accelerate(other).undo()
        assert type(other[0]) is torch.nn.Linear
    plain = net()
    plain.load_state_dict(model.state_dict())
    close(plain(x), want)


def test_autocast_computes_as_it_says(kernels: None, count: dict[str, int]) -> None:
    model, plain, x = net(), net(), torch.randn(4, 6)
    rt.accelerate(model)
    with torch.autocast("cpu"):
        got, want = model(x), plain(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    assert count["forward"] == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graphs_have_no_break(dynamic: bool, monkeypatch: pytest.MonkeyPatch, count: dict[str, int]) -> None:
    monkeypatch.setattr(rt.acceleration, "COMPILED_WORK", 0)
    torch._dynamo.reset()
    model, plain = net(), net()
    rt.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (4, 5, 1):
        x = torch.randn(n, 6)
        for got, want in zip(gradients(compiled, x), gradients(plain, x), strict=True):
            close(got, want)
    assert count["forward"] >= 3 * 3
    assert count["backward"] >= 3 * 3
    with torch.no_grad():
        close(compiled(x), plain(x))
    function = torch.compile(lambda x: rt.relu(rt.affine_relu(x[None], model[0].weight)), fullgraph=True, backend="aot_eager")
    close(function(x), F.relu(F.linear(x[None], model[0].weight)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use, in forward mode
def test_compiled_transforms_are_what_they_are_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators know of no transform: forward-mode gradients of them would be 0."""
    monkeypatch.setattr(rt.acceleration, "COMPILED_WORK", 0)
    func, forward_ad = torch.func, torch.autograd.forward_ad
    model, x, w, b = net(), torch.randn(4, 6), torch.randn(3, 6), torch.randn(3)
    rt.accelerate(model)

    def tangent(f: Any, x: Any) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    for layer in (lambda x: rt.affine(x, w, b), lambda x: rt.affine_relu(x, w), rt.relu, model):
        for ask in (
            lambda x, f=layer: func.jvp(f, (x,), (x,))[1],
            lambda x, f=layer: func.jacfwd(f)(x),
            lambda x, f=layer: func.grad(lambda x: f(x).square().sum())(x),
            lambda x, f=layer: func.vjp(f, x)[1](f(x) + 1)[0],
            lambda x, f=layer: func.jacrev(f)(x),
            lambda x, f=layer: func.vmap(f)(x),
            lambda x, f=layer: func.hessian(lambda x: f(x).pow(3).sum())(x),
            lambda x, f=layer: tangent(f, x),
        ):
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(ask, backend="aot_eager")(x), ask(x))
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="eager")
        close(compiled(x), layer(x))
        torch.testing.assert_close(tangent(compiled, x), tangent(layer, x))  # compiled before, where there was none


def test_a_compiled_layer_takes_the_biases_that_linear_takes() -> None:
    x, w = torch.randn(4, 5), torch.randn(3, 5)
    torch._dynamo.reset()
    compiled = torch.compile(rt.affine, backend="aot_eager")
    for shape in ((1,), (), (1, 1), (1, 3), (4, 1), (4, 3)):
        close(compiled(x, w, torch.ones(shape)), F.linear(x, w, torch.ones(shape)))
    with pytest.raises(Exception, match=r"size|shape"):
        compiled(x, w, torch.ones(4))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*` is deprecated")
def test_exported_and_traced_programs_need_no_rectilinear(kernels: None) -> None:
    model, x = net(), torch.randn(4, 6)
    want = model(x)
    rt.accelerate(model)
    traced = torch.jit.trace(model, x)
    assert "aten::linear" in str(traced.inlined_graph)
    close(traced(x + 1), model(x + 1))
    program = torch.export.export(model, (x,))
    assert "rectilinear" not in str(program.graph)
    close(program.module()(x), want)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use, in forward mode
def test_transforms_and_modes_get_what_they_ask_for(kernels: None) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, plain, x = net(), net(), torch.randn(4, 6)
    rt.accelerate(model)
    func = torch.func
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(module: Any) -> Any:
        return lambda p, x: func.functional_call(module, p, (x,)).square().sum()

    for ask in (
        lambda m: func.grad(loss(m))(parameters, x)["0.weight"],
        lambda m: func.vmap(func.grad(loss(m)), in_dims=(None, 0))(parameters, x)["2.weight"],
        lambda m: func.jacrev(m)(x),
        lambda m: func.jvp(m, (x,), (x,))[1],
        lambda m: torch.autograd.functional.jacobian(m, x, vectorize=True),
        lambda m: torch.autograd.functional.hessian(lambda x: m(x).square().sum(), x),
        lambda m: torch.autograd.functional.hvp(lambda x: m(x).pow(3).sum(), x, x)[1],
    ):
        torch.testing.assert_close(ask(model), ask(plain), rtol=1e-4, atol=1e-5)
    with FlopCounterMode(display=False) as flops:
        model(x)
    assert flops.get_total_flops() == 2 * 4 * (6 * 16 + 16 * 12 + 12 * 3)
    with torch.device("meta"):
        assert model.to_empty(device="meta")(torch.ones(4, 6)).shape == (4, 3)


def test_gradient_checkpoints_and_accumulation(kernels: None) -> None:
    from torch.utils.checkpoint import checkpoint

    model, plain, x = net(), net(), torch.randn(4, 6, requires_grad=True)
    rt.accelerate(model)
    for m in (model, plain):
        for _ in range(2):
            checkpoint(m, x, use_reentrant=False).square().sum().backward()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        close(got.grad, want.grad)
    out = model(x)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_is_measured_where_hooks_see_what_is_saved(monkeypatch: pytest.MonkeyPatch, count: dict[str, int]) -> None:
    """A checkpoint computes again and wants to see the same saved, which it would not if the other way were found faster meanwhile."""
    from torch.utils.checkpoint import checkpoint

    monkeypatch.setattr(rt.timing, "kernels_are_faster", None)
    model, plain, x = net(), net(), torch.randn(4, 6)
    rt.accelerate(model)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            for m in (model, plain):
                m.zero_grad()
                checkpoint(m, x, use_reentrant=False).square().sum().backward()
                with torch.autograd.graph.save_on_cpu():
                    m(x).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        for got, want in zip(model.parameters(), plain.parameters(), strict=True):
            close(got.grad, want.grad)
        assert (count["forward"] > 0) == deterministic


def test_replicas_in_threads(kernels: None) -> None:
    """As DataParallel has it: replicas whose parameters are no Parameters, one thread each."""
    model, x = net(), torch.randn(64, 6)
    want = model(x)
    rt.accelerate(model)
    replicas = []
    for _ in range(4):
        replica = copy.copy(model)
        replica.__dict__ = model.__dict__ | {"_modules": {}}
        for name, child in model._modules.items():
            part = child._replicate_for_data_parallel()
            for key, p in child._parameters.items():
                setattr(part, key, p * 1)
            replica._modules[name] = part
        replicas.append(replica)
    results: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: replicas[i](x)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        close(results[i], want)
    results[0].sum().backward()
    assert model[0].weight.grad is not None


# ---------------------------------------------------------------- who is faster


def test_each_question_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rt.acceleration, "_COPIES", rt.timing.Together())
    monkeypatch.setattr(rt.timing, "_answers", {})
    model, x = net(), torch.randn(4, 6)
    handle = rt.accelerate(model)
    assert "batches" not in handle.report
    model.train()
    gradients(model, x)
    before = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        model(x)
        model(torch.randn(3, 6))  # up to 4 as well
    asked = rt.timing._answers
    assert {(q.extents, q.relus, any(q.gradients), q.batch) for q in asked} == {
        ((6, 16, 12, 3), (True, True, False), training, 4) for training in (False, True)
    }
    assert handle.report.count("Linear+ReLU 6-16, Linear+ReLU 16-12, Linear 12-3, batches up to 4, ") == 2
    for p, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad)
    model(x)  # what has been chosen for training is known again
    model[2].requires_grad_(False)
    with torch.autograd.set_detect_anomaly(True):
        model(torch.full((4, 6), torch.nan))
    assert len(rt.timing._answers) == 3
    rt.accelerate(model, relu_at_zero=0)
    model(x)
    assert len(rt.timing._answers) == 4
    monkeypatch.setattr(rt.timing, "_measured", None)
    model(x)


class Clock:
    """The clock of `timing`: layers take the time that they are said to take, and threads run for as much of it as they are said to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.ran = 0.0
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(rt.timing, "perf_counter", lambda: self.now)
        monkeypatch.setattr(rt.timing, "_running", lambda: self.ran)
        self.forget()

    def forget(self) -> None:
        self.monkeypatch.setattr(rt.timing, "_answers", {})

    def layer(self, seconds: float, disturbed: int = 0) -> Any:
        """A layer that takes 8 times as long, half of it waiting, for so many calls."""
        calls = itertools.count()

        def layer(x: Any, layers: Any) -> Any:
            waits = next(calls) < disturbed
            self.now += 8 * seconds if waits else seconds
            self.ran += 4 * seconds if waits else seconds
            for weight, bias, _ in layers:
                x = F.linear(x, weight, bias)
            return x

        return layer

    def ours(self, x: Any, layers: Any) -> Any:
        return self.current(x, layers)

    def faster(self, x: Any, weight: Any, ours: Any, theirs: Any, together: Any) -> Any:
        self.current, theirs = (layer if callable(layer) else self.layer(layer) for layer in (ours, theirs))
        weights = weight if isinstance(weight, list) else [weight]
        return rt.timing.kernels_are_faster(x, [(w, None, False) for w in weights], self.ours, theirs, together)


def test_the_faster_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, x, weight = Clock(monkeypatch), torch.randn(4, 6), torch.randn(3, 6)
    for ours, theirs, better in ((1.0, 2.0, True), (2.0, 1.0, False), (1e-6, 5e-6, False)):
        clock.forget()
        assert clock.faster(x, weight, ours, theirs, rt.timing.Together()) is better
    # What a call takes longer in a net: one of several layers 10 us, 30 in training, one of a single layer twice that.
    square, learnt = torch.randn(6, 6), torch.randn(6, 6, requires_grad=True)
    for weights, most in (([square] * 2, 90e-6), ([square], 80e-6), ([learnt] * 2, 70e-6), ([learnt], 40e-6)):
        for ours, better in ((most - 1e-6, True), (most + 1e-6, False)):
            clock.forget()
            assert clock.faster(x, weights, ours, 100e-6, rt.timing.Together()) is better
    clock.forget()
    model, other = rt.timing.Together(), rt.timing.Together()
    assert clock.faster(x, weight, 1.0, 2.0, model) is True
    model.remember(("a call",), True)
    assert clock.faster(x, torch.randn(2, 6), 3.0, 1.0, model) is False  # both layers: 4 s against 3
    assert not model.choices
    assert clock.faster(x, weight, 9.0, 9.0, model) is False
    assert clock.faster(torch.randn(99, 6), weight, 1.0, 2.0, model) is True  # another batch
    assert clock.faster(x, weight, 9.0, 9.0, other) is True  # another model, and what has been measured already


@pytest.mark.parametrize("disturbed", [12, 10**9])
def test_calls_in_which_the_thread_did_not_run_do_not_count(monkeypatch: pytest.MonkeyPatch, disturbed: int) -> None:
    """As when a process begins with two of OpenMP's threads on one core."""
    clock, x, weight = Clock(monkeypatch), torch.randn(4, 6), torch.randn(3, 6)
    theirs = clock.layer(1e-3, disturbed)
    for_ever = disturbed > 10**6  # where threads sleep while they wait, what there is has to do
    assert clock.faster(x, weight, 2e-3, theirs, rt.timing.Together()) is for_ever


def test_nobody_waits_for_a_measurement_nor_keeps_its_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rt.acceleration, "_COPIES", rt.timing.Together())
    monkeypatch.setattr(rt.timing, "_answers", {})
    linear, x = torch.nn.Linear(6, 3), torch.randn(4, 6)
    want = linear(x)
    rt.accelerate(linear)
    with rt.timing._measuring:
        close(linear(x), want)
    assert not rt.timing._answers
    linear(x)
    assert rt.timing._answers


def test_deterministic_algorithms_measure_nothing(monkeypatch: pytest.MonkeyPatch, count: dict[str, int]) -> None:
    monkeypatch.setattr(rt.acceleration, "_COPIES", rt.timing.Together())
    monkeypatch.setattr(rt.timing, "kernels_are_faster", None)
    model, x = net(), torch.randn(4, 6)
    rt.accelerate(model)
    torch.use_deterministic_algorithms(True)
    try:
        model(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert count["forward"] == 3


def test_other_backends_serve_too(kernels: None) -> None:
    model, plain, x = net(torch.float64), net(torch.float64), torch.randn(4, 6, dtype=torch.float64)
    rt.accelerate(model)
    with rectilinear.use_backend("numpy"):
        for got, want in zip(gradients(model, x), gradients(plain, x), strict=True):
            torch.testing.assert_close(got, want)
        assert isinstance(rt.primitives.forward(x, plain[0].weight, None, True)[1], np.ndarray)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kernels_run_on_pytorchs_threads_and_in_a_forked_process_on_their_own() -> None:
    """Each side's threads would else keep the processors from the other's."""
    subprocesses.run(
        """
        import os
        import numpy as np
        import torch
        import rectilinear
        from rectilinear.torch import affine_relu, primitives
        from rectilinear.threads import team

        def threads():
            return set(os.listdir("/proc/self/task"))

        rectilinear.set_num_threads(2)
        torch.set_num_threads(2)
        rectilinear.warmup(["float32"])
        assert primitives._start != 0
        x, weight, bias = torch.ones(512, 784, requires_grad=True), torch.ones(512, 784, requires_grad=True), torch.ones(512)
        with rectilinear.num_threads(1):
            one = affine_relu(x, weight, bias)
        torch.exp(torch.ones(1 << 20))
        begun = threads()
        out = affine_relu(x, weight, bias)
        out.sum().backward()
        assert threads() == begun
        assert team.start == team.at_most == 0
        assert torch.equal(out, one)
        rectilinear.relu_forward(np.ones((1 << 20,), "f4"))
        assert len(threads() - begun) == 1, "NumPy arrays have the pool"

        child = os.fork()
        if child == 0:
            # By NumPy: PyTorch's own operations would wait for its threads here.
            ok = np.array_equal(affine_relu(x, weight, bias).detach().numpy(), one.detach().numpy())
            os._exit(0 if ok and primitives._start == 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """,
        limit_s=60,
    )


def test_a_call_that_fails_gives_the_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fail(*args: Any) -> None:
        seen.append((threads.team.start, threads.team.at_most))
        raise MemoryError

    monkeypatch.setattr(registry.active(), "affine_forward", fail)
    with pytest.raises(MemoryError):
        rt.primitives.forward(torch.ones(2, 3), torch.ones(4, 3), None, False)
    assert seen == [(rt.primitives._start, torch.get_num_threads())]
    assert threads.team.start == threads.team.at_most == 0
