"""Chains, and layers that are used more than once: which forward a backward goes back along, and what its gradients are."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import rectilinear
from rectilinear import ShapeError, layers
from rectilinear.nn import SGD, Affine, AffineReLU, Layer, Module, ReLU, Sequential, SoftmaxCrossEntropy

from .nets import OTHER_LIBRARIES, brought, namespace, net_of, square_net, unchanged


@pytest.fixture(params=[None, *OTHER_LIBRARIES])
def xp(request):
    return namespace(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ---------------------------------------------------------------- chains


def test_chain_names_parameters_by_place(rng):
    net = Sequential(ReLU(), Affine(4, 3, rng=rng), Sequential(ReLU(), Affine(3, 2, rng=rng, bias=False)))
    assert list(net.params) == list(net.state_dict()) == ["1.w", "1.b", "2.1.w"]
    assert net.grads == {}
    assert repr(net) == "Sequential(ReLU(), Affine(4, 3), Sequential(ReLU(), Affine(3, 2, bias=False)))"


@pytest.mark.parametrize("inner", [False, True])
def test_backward_stops_at_the_first_parameters(inner, rng, monkeypatch):
    needs = []

    def backward(*args, **kwargs):
        needs.append(kwargs["needs"])
        return layers.affine_backward(*args, **kwargs)

    monkeypatch.setattr(Affine, "_backward", staticmethod(backward))
    first, second = Affine(4, 3, rng=rng), Affine(3, 2, rng=rng)
    net = Sequential(Sequential(ReLU(), first), second) if inner else Sequential(ReLU(), first, second)
    net.forward(np.ones((5, 4), "f4"))
    assert net.backward(np.ones((5, 2), "f4")) is None
    assert needs == [(True, True, True), (False, True, True)]
    assert net.backward(np.ones((5, 2), "f4"), need_dx=True).shape == (5, 4)
    assert needs[2:] == [(True, True, True), (True, True, True)]


def test_made_of_a_list(rng):
    a, b = Affine(4, 3, rng=rng), ReLU()
    for net in (Sequential(a, b), Sequential([a, b]), Sequential((a, b)), Sequential(layer for layer in (a, b))):
        assert net.layers == (a, b)
        assert list(net.params) == ["0.w", "0.b"]
    assert Sequential(Sequential(a, b)).layers != (a, b)  # a chain is a layer, not a list of them
    assert Sequential().layers == Sequential([]).layers == ()


def test_chain_is_a_sequence(rng):
    a, b, c = Affine(4, 3, rng=rng), ReLU(), Affine(3, 2, rng=rng)
    net = Sequential(a, b, c)
    assert len(net) == 3
    assert list(net) == [a, b, c]
    assert list(reversed(net)) == [c, b, a]
    assert b in net
    assert net[0] is net[np.int64(-3)] is a
    assert net[-1] is c
    assert isinstance(net[1:], Sequential)
    assert net[1:].layers == (b, c)
    assert net[::-2].layers == (c, a)
    with pytest.raises(IndexError):
        net[3]
    x = np.ones((2, 4))
    np.testing.assert_array_equal(net[1:].forward(net[:1].forward(x)), net.forward(x))


@pytest.mark.parametrize(
    ("layers", "place", "met"),
    [
        ((1,), 0, "1"),
        (("relu",), 0, "'r'"),
        ((None,), 0, "None"),
        ((ReLU(), np.zeros((2, 2))), 1, "array"),
        (([ReLU(), [ReLU()]],), 1, r"\[ReLU\(\)\]"),
        (([ReLU()], ReLU()), 0, r"\[ReLU\(\)\]"),
        ((ReLU(), SoftmaxCrossEntropy()), 1, r"SoftmaxCrossEntropy\(\)"),
        ((ReLU,), 0, "the class ReLU, not a layer made of it"),
        ((ReLU(), layers.relu_forward), 1, "<function"),
    ],
)
def test_what_is_no_layer_is_refused_when_the_chain_is_made(layers, place, met):
    with pytest.raises(TypeError, match=f"^Sequential: layer {place} is {met}"):
        Sequential(*layers)


# ---------------------------------------------------------------- one layer, used more than once


def gradients_by_hand(w, b, x, dout, uses):
    """dx, dw, db of `uses` times the same affine layer with ReLU, by the functions alone."""
    caches = []
    for _ in range(uses):
        x, cache = layers.affine_relu_forward(x, w, b)
        caches.append(cache)
    total_w, total_b = np.zeros_like(w), np.zeros_like(b)
    for cache in reversed(caches):
        dout, dw, db = layers.affine_relu_backward(dout, cache)
        total_w, total_b = total_w + dw, total_b + db
    return dout, total_w, total_b


@pytest.mark.parametrize("uses", [2, 3])
@pytest.mark.parametrize("nested", [False, True])
def test_gradients_are_summed_over_uses(uses, nested, xp, rng):
    shared = AffineReLU(3, 3, rng=rng, dtype="float64", xp=xp)
    shared.params["b"] = brought(xp, np.full(3, 0.5))
    w, b = (rectilinear.to_numpy(shared.params[name]) for name in "wb")
    net = Sequential(*[Sequential(shared) if nested and i % 2 else shared for i in range(uses)])
    x, dout = rng.standard_normal((4, 3)), rng.standard_normal((4, 3))
    for _ in range(2):  # a second pass begins anew
        net.forward(brought(xp, x))
        for _ in range(2):  # and a second backward goes the same way
            dx = net.backward(brought(xp, dout), need_dx=True)
            for got, want in zip((dx, shared.grads["w"], shared.grads["b"]), gradients_by_hand(w, b, x, dout, uses), strict=True):
                np.testing.assert_allclose(rectilinear.to_numpy(got), want, rtol=1e-12, atol=1e-12)


def test_gradients_of_shared_layers_against_differences(rng):
    """A layer and a chain in several places and depths, a layer without parameters among them."""
    shared, relu, loss = Affine(3, 3, rng=rng, dtype="float64"), ReLU(), SoftmaxCrossEntropy()
    pair = Sequential(shared, relu)
    net = Sequential(pair, Affine(3, 3, rng=rng, dtype="float64"), Sequential(pair, Sequential(relu, shared)), shared)
    x, y, h = rng.standard_normal((5, 3)), rng.integers(3, size=5), 1e-6
    loss.forward(net.forward(x), y)
    dx = net.backward(loss.backward(), need_dx=True)
    for values, gradient in [(x, dx), *((net.params[name], net.grads[name]) for name in net.params)]:
        for index in np.ndindex(values.shape):
            kept = values[index]
            values[index] = kept + h
            above = loss.forward(net.forward(x, training=False), y)
            values[index] = kept - h
            below = loss.forward(net.forward(x, training=False), y)
            values[index] = kept
            assert gradient[index] == pytest.approx((above - below) / (2 * h), abs=1e-8)


def test_two_nets_that_share_a_layer(rng):
    """The backward of a net goes back along its own forward, whatever the layer did since."""
    shared = Affine(3, 3, rng=rng, dtype="float64")
    first, second = (Sequential(shared, ReLU(), Affine(3, 2, rng=rng, dtype="float64")) for _ in range(2))
    x1, x2, dout = rng.standard_normal((4, 3)), rng.standard_normal((4, 3)), rng.standard_normal((4, 2))
    alone = []
    for net, x in ((first, x1), (second, x2)):
        net.forward(x)
        net.backward(dout)
        alone.append(shared.grads["w"])
    first.forward(x1)
    second.forward(x2)
    shared.forward(x2, training=False)
    first.backward(dout)
    np.testing.assert_array_equal(shared.grads["w"], alone[0])
    second.backward(dout, accumulate=True)
    np.testing.assert_allclose(shared.grads["w"], alone[0] + alone[1], rtol=1e-13)


def test_layers_of_a_net_by_hand(rng):
    """After a forward of the net, and after one of its layers, a layer's own backward is that of its latest use."""
    net = square_net(rng, dtype="float64")
    x, dout = rng.standard_normal((4, 3)), rng.standard_normal((4, 3))
    net.forward(x)
    wanted = net.backward(dout, need_dx=True)
    for layer in reversed(net):
        dout = layer.backward(dout)
    np.testing.assert_array_equal(dout, wanted)


def test_a_chain_in_a_chain_by_hand(rng):
    """Its own backward is that of its latest forward too, be that one of its own or one of the chain around it."""
    net = square_net(rng, dtype="float64")
    outer = Sequential(net, ReLU())
    x, dout, wanted = rng.standard_normal((4, 3)), rng.standard_normal((4, 3)), []
    for inputs in (x, x + 1):
        net.forward(inputs)
        net.backward(dout)
        wanted.append(net.grads["0.w"])
    outer.forward(x)
    net.backward(dout)
    np.testing.assert_array_equal(net.grads["0.w"], wanted[0])
    net.forward(x + 1)
    net.backward(dout)
    np.testing.assert_array_equal(net.grads["0.w"], wanted[1])


class Residual(Module):
    """x + inner(x), as a user would write it."""

    def __init__(self, inner):
        self.inner = inner

    def forward(self, x, *, training=True):
        return x + self.inner.forward(x, training=training)

    def backward(self, dout, *, need_dx=True, accumulate=False):
        return dout + self.inner.backward(dout, need_dx=True, accumulate=accumulate)

    def leaves(self, prefix=""):
        yield from self.inner.leaves(prefix + "inner.")


class Recomputed(Residual):
    """inner(x), which keeps x alone and goes forward again in its backward."""

    def forward(self, x, *, training=True):
        self.x = x
        return self.inner.forward(x, training=False)

    def backward(self, dout, *, need_dx=True, accumulate=False):
        self.inner.forward(self.x)
        return self.inner.backward(dout, need_dx=need_dx, accumulate=accumulate)


class Squared(Layer):
    """x * x times a scale, as a user would write it."""

    def __init__(self):
        super().__init__()
        self.params["scale"] = np.array(0.5)

    def forward(self, x, *, training=True):
        self._keep(x, training)
        return self.params["scale"] * x * x

    def backward(self, dout, *, need_dx=True, accumulate=False):
        x = self._cached()
        self._collect({"scale": np.array((dout * x * x).sum())}, accumulate)
        return 2 * self.params["scale"] * x * dout


def test_modules_of_ones_own_used_twice(rng):
    x, y, h, loss = rng.standard_normal((5, 3)), rng.integers(3, size=5), 1e-6, SoftmaxCrossEntropy()
    shared, squared = Affine(3, 3, rng=rng, dtype="float64"), Squared()
    block = Residual(Sequential(shared, squared))
    net = Sequential(block, Recomputed(Sequential(shared, ReLU(), shared)), block, Recomputed(shared), squared)
    loss.forward(net.forward(x), y)
    dx = net.backward(loss.backward(), need_dx=True)
    assert {name.rpartition(".")[2] for name in net.params} == {"w", "b", "scale"}
    for values, gradient in [(x, dx), *((net.params[name], net.grads[name]) for name in net.params)]:
        for index in np.ndindex(values.shape):
            kept = values[index].copy()
            values[index] = kept + h
            above = loss.forward(net.forward(x, training=False), y)
            values[index] = kept - h
            below = loss.forward(net.forward(x, training=False), y)
            values[index] = kept
            assert gradient[index] == pytest.approx((above - below) / (2 * h), abs=1e-7)


def test_a_layer_whose_backward_is_overridden(rng):
    """A chain calls the public methods of what is in it."""

    class Clipped(Affine):
        def forward(self, x, **options):
            return super().forward(2 * x, **options)

        def backward(self, dout, **options):
            dx = super().backward(dout, **options)
            self.grads["b"] = np.clip(self.grads["b"], -1, 1)
            return 2 * dx

    layer = Clipped(3, 3, rng=rng, dtype="float64")
    net = Sequential(layer, ReLU())
    x = np.abs(rng.standard_normal((4, 3)))
    layer.params["w"] = np.eye(3)
    np.testing.assert_array_equal(net.forward(x), 2 * x)
    np.testing.assert_array_equal(net.backward(np.ones((4, 3)), need_dx=True), 2 * np.ones((4, 3)))
    np.testing.assert_array_equal(layer.grads["b"], np.ones(3))


# ---------------------------------------------------------------- what is kept, and for how long


@pytest.mark.parametrize(
    "make", [lambda rng: Affine(3, 3, rng=rng), lambda rng: ReLU(), square_net, lambda rng: Sequential(square_net(rng))]
)
def test_evaluation_keeps_nothing_and_drops_what_was_kept(make, rng):
    module, x = make(rng), np.ones((2, 3), "f4")
    said = (
        rf"^{type(module).__name__}\.backward: the latest forward was called with training=False and kept nothing; call forward\(x\) first$"
    )
    kept = module.forward(x)
    for forward in (module.forward, lambda x, training: Sequential(module).forward(x, training=training)):
        module.forward(x)
        np.testing.assert_array_equal(forward(x, training=False), kept)
        with pytest.raises(RuntimeError, match=said):
            module.backward(x)
    for _, leaf in module.leaves():
        with pytest.raises(RuntimeError, match="training=False"):
            leaf.backward(x)
    np.testing.assert_array_equal(module.forward(x, training=True), kept)
    module.backward(x)


class Watched(Layer):
    """Keeps one object for each forward, and counts those that are alive."""

    class Activation:
        pass

    def __init__(self):
        super().__init__()
        self.made = weakref.WeakSet()

    def forward(self, x, *, training=True):
        kept = self.Activation()
        self.made.add(kept)
        self._keep(kept, training)
        return x

    def backward(self, dout, *, need_dx=True, accumulate=False):
        self._cached()
        return dout

    def alive(self):
        gc.collect()
        return len(self.made)


def test_activations_do_not_pile_up():
    layer = Watched()
    net = Sequential(layer, Sequential(layer, ReLU()), layer)
    for _ in range(5):
        net.forward(np.ones((2, 3)))
        assert layer.alive() == 3
    for _ in range(3):
        net.backward(np.ones((2, 3)), need_dx=True)
        assert layer.alive() == 3
    net[1].forward(np.ones((2, 3)))
    assert layer.alive() <= 4
    net.forward(np.ones((2, 3)), training=False)
    net[1].forward(np.ones((2, 3)), training=False)
    assert layer.alive() == 0


def test_activations_made_in_a_backward_are_gone_after_it(rng):
    layer = Watched()
    net = Sequential(Recomputed(Sequential(layer, layer, Affine(3, 3, rng=rng))))
    net.forward(np.ones((2, 3)))
    assert layer.alive() == 0
    net.backward(np.ones((2, 3)))
    assert layer.alive() == 1  # of the latest use


def test_activations_of_the_forward_before_are_gone_before_the_next_one_makes_its_own():
    class Counting(Watched):
        def forward(self, x, *, training=True):
            self.most = max(getattr(self, "most", 0), self.alive())
            return super().forward(x, training=training)

    layer = Counting()
    net = Sequential(layer, layer, layer, Sequential(layer))
    for _ in range(3):
        net.forward(np.ones((2, 3)))
    assert layer.most == 3  # before the fourth use; the last cache of the pass before gives way to the first of this one


def test_a_forward_that_fails_leaves_none_to_go_back_from(rng):
    net = Sequential(Affine(3, 4, rng=rng), Affine(3, 2, rng=rng))
    net.layers[1].params["w"], x = np.ones((4, 2), "f4"), np.ones((2, 3), "f4")
    net.forward(x)
    net.layers[1].params["w"] = np.ones((3, 2), "f4")
    with pytest.raises(ShapeError):
        net.forward(x)
    with pytest.raises(RuntimeError, match=r"^Sequential\.backward: no forward to go back from; call forward first$"):
        net.backward(np.ones((2, 2)))


# ---------------------------------------------------------------- gradients: overwritten, added to, left alone


def test_accumulated_gradients(xp, rng):
    net, loss = net_of(rng, xp, dtype="float64"), SoftmaxCrossEntropy()
    x, y = brought(xp, rng.standard_normal((8, 6))), rng.integers(3, size=8)
    loss.forward(net.forward(x), list(y))
    net.backward(loss.backward())
    whole = {name: rectilinear.to_numpy(grad) for name, grad in net.grads.items()}
    for place, part in enumerate((slice(0, 4), slice(4, 8))):
        loss.forward(net.forward(x[part, :]), list(y[part]))
        net.backward(loss.backward(), accumulate=place > 0)
    for name, grad in net.grads.items():
        np.testing.assert_allclose(rectilinear.to_numpy(grad) / 2, whole[name], rtol=1e-12, atol=1e-14)


def test_accumulating_begins_at_nothing_and_writes_to_no_earlier_array(rng):
    layer = Affine(3, 2, rng=rng)
    layer.forward(np.ones((4, 3), "f4"))
    layer.backward(np.ones((4, 2), "f4"), accumulate=True)
    first = layer.grads["b"]
    layer.backward(np.ones((4, 2), "f4"), accumulate=True)
    np.testing.assert_array_equal(first, [4, 4])
    np.testing.assert_array_equal(layer.grads["b"], [8, 8])
    layer.grads = {}
    layer.backward(np.ones((4, 2), "f4"), accumulate=True)
    np.testing.assert_array_equal(layer.grads["b"], [4, 4])


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_backward_that_fails_leaves_the_gradients(accumulate, rng):
    class Failing(ReLU):
        def backward(self, dout, **options):
            raise FloatingPointError("on purpose")

    shared = Affine(3, 3, rng=rng)
    net = Sequential(Affine(3, 3, rng=rng), Failing(), shared, shared)
    net.forward(np.ones((2, 3)))
    for layer in (net[0], shared):
        layer.backward(np.ones((2, 3)))
    same = unchanged(net)
    with pytest.raises(FloatingPointError):
        net.backward(np.ones((2, 3)), accumulate=accumulate)
    assert same()


def test_gradients_of_another_shape_are_not_broadcast(rng):
    layer = Affine(3, 2, rng=rng)
    layer.forward(np.ones((4, 3)))
    layer.backward(np.ones((4, 2)))
    layer.grads["b"] = np.ones(1, "f4")
    same = unchanged(layer)
    with pytest.raises(ShapeError, match=r"^Affine\.backward: the gradient of b has shape \(2,\), but the earlier one"):
        layer.backward(np.ones((4, 2)), accumulate=True)
    assert same()


def test_steps_of_a_layer_used_twice(xp, rng):
    """Against two layers that hold the same values, moved by the sum of both gradients."""
    shared = Affine(3, 3, rng=rng, dtype="float64", xp=xp)
    net, loss = Sequential(shared, ReLU(), shared), SoftmaxCrossEntropy()
    optimizer = SGD(net, lr=0.1, momentum=0.9, weight_decay=0.01)
    w, b = (rectilinear.to_numpy(shared.params[name]).copy() for name in "wb")
    v_w, v_b = np.zeros_like(w), np.zeros_like(b)
    x, y = rng.standard_normal((6, 3)), [0, 1, 2, 2, 1, 0]
    for _ in range(4):
        loss.forward(net.forward(brought(xp, x)), y)
        net.backward(loss.backward())
        optimizer.step()
        hidden, first = layers.affine_relu_forward(x, w, b)
        scores, second = layers.affine_forward(hidden, w, b)
        dhidden, dw2, db2 = layers.affine_backward(layers.softmax_loss(scores, y)[1], second)
        _, dw1, db1 = layers.affine_relu_backward(dhidden, first)
        v_w, v_b = 0.9 * v_w - 0.1 * (dw1 + dw2 + 0.01 * w), 0.9 * v_b - 0.1 * (db1 + db2)
        w, b = w + v_w, b + v_b
    np.testing.assert_allclose(rectilinear.to_numpy(shared.params["w"]), w, rtol=1e-11)
    np.testing.assert_allclose(rectilinear.to_numpy(shared.params["b"]), b, rtol=1e-11)
    assert list(optimizer.velocity) == ["0.w", "0.b"]
