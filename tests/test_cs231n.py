"""The check values that CS231n prints in its notebooks: same inputs, same digits.

Facts only (inputs and printed numbers), with the notebook and the cell's heading. They are printed to 8 to 12 digits, so
the bounds are half a unit in the last one printed, not a tolerance of ours. Two families of notebooks are meant:

- "2016": assignments2016/assignment1/two_layer_net.ipynb and assignments2016/assignment2/FullyConnectedNets.ipynb of
  github.com/cs231n/cs231n.github.io. Later years keep these cells.
- "spring 2017": assignment2/FullyConnectedNets.ipynb of the assignments of that term, which seeds the generator with 231
  before every cell, so that its printed outputs can be repeated.
"""

from __future__ import annotations

import numpy as np
import pytest

from rectilinear.layers import (
    affine_backward,
    affine_forward,
    affine_relu_backward,
    affine_relu_forward,
    relu_backward,
    relu_forward,
    softmax_loss,
)
from rectilinear.nn import SGD, Affine


def half_unit(digits: int) -> float:
    """Half a unit in the last of so many decimals, and a hair for the decimal's own rounding."""
    return 0.5 * 10.0**-digits * (1 + 1e-6)


def linspace(low: float, high: float, *shape: int) -> np.ndarray:
    return np.linspace(low, high, num=int(np.prod(shape))).reshape(shape)


def numeric_gradient(f, x: np.ndarray, dout: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """Central differences of sum(f(x) * dout)."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        gradient[index] = np.sum((f(x + step) - f(x - step)) * dout) / (2 * h)
    return gradient


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """CS231n's measure, in which its notebooks state what to expect."""
    return float(np.max(np.abs(a - b) / np.maximum(1e-8, np.abs(a) + np.abs(b))))


# ---------------------------------------------------------------- printed values


def test_affine_forward_2016():
    """FullyConnectedNets 2016, cell "Affine layer: foward"."""
    out, _ = affine_forward(linspace(-0.1, 0.5, 2, 4, 5, 6), linspace(-0.2, 0.3, 120, 3), linspace(-0.3, 0.1, 3))
    printed = [[1.49834967, 1.70660132, 1.91485297], [3.25553199, 3.5141327, 3.77273342]]
    np.testing.assert_allclose(out, printed, rtol=0, atol=half_unit(8))


def test_relu_forward_2016():
    """FullyConnectedNets 2016, cell "ReLU layer: forward"."""
    out, _ = relu_forward(linspace(-0.5, 0.5, 3, 4))
    printed = [[0, 0, 0, 0], [0, 0, 0.04545455, 0.13636364], [0.22727273, 0.31818182, 0.40909091, 0.5]]
    np.testing.assert_allclose(out, printed, rtol=0, atol=half_unit(8))


def test_softmax_loss_spring_2017():
    """FullyConnectedNets spring 2017, cell "Loss layers: Softmax and SVM", which prints 2.3025458445."""
    rng = np.random.RandomState(231)
    x = 0.001 * rng.randn(50, 10)
    loss, dx = softmax_loss(x, rng.randint(10, size=50))
    assert abs(loss - 2.3025458445) <= half_unit(10)
    assert dx.shape == x.shape


def fully_connected_loss(x: np.ndarray, y: np.ndarray, weights: list[np.ndarray], biases: list[np.ndarray], reg: float):
    """{affine - ReLU} and affine, softmax loss with 0.5 reg sum(w w); the loss, the scores and the weights' gradients."""
    caches = []
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        x, cache = affine_relu_forward(x, w, b)
        caches.append(cache)
    scores, cache = affine_forward(x, weights[-1], biases[-1])
    loss, dscores = softmax_loss(scores, y)
    dx, dw, _ = affine_backward(dscores, cache)
    gradients = [dw]
    for cache in reversed(caches):
        dx, dw, _ = affine_relu_backward(dx, cache)
        gradients.insert(0, dw)
    gradients = [dw + reg * w for dw, w in zip(gradients, weights, strict=True)]
    return loss + 0.5 * reg * sum(np.sum(w * w) for w in weights), scores, gradients


def two_layer_inputs():
    weights = [linspace(-0.7, 0.3, 5, 50), linspace(-0.3, 0.4, 50, 7)]
    biases = [linspace(-0.1, 0.9, 50), linspace(-0.9, 0.1, 7)]
    return linspace(-5.5, 4.5, 5, 3).T, np.array([0, 5, 1]), weights, biases


def test_two_layer_scores_2016():
    """FullyConnectedNets 2016, cell "Two-layer network", the test-time forward pass; X is a transposed array there."""
    x, y, weights, biases = two_layer_inputs()
    _, scores, _ = fully_connected_loss(x, y, weights, biases, reg=0)
    printed = [
        [11.53165108, 12.2917344, 13.05181771, 13.81190102, 14.57198434, 15.33206765, 16.09215096],
        [12.05769098, 12.74614105, 13.43459113, 14.1230412, 14.81149128, 15.49994135, 16.18839143],
        [12.58373087, 13.20054771, 13.81736455, 14.43418138, 15.05099822, 15.66781506, 16.2846319],
    ]
    np.testing.assert_allclose(scores, printed, rtol=0, atol=half_unit(8))


@pytest.mark.parametrize(("reg", "printed"), [(0.0, 3.4702243556), (1.0, 26.5948426952)])
def test_two_layer_loss_2016(reg, printed):
    """FullyConnectedNets 2016, cell "Two-layer network", training loss without and with regularization."""
    loss, _, _ = fully_connected_loss(*two_layer_inputs(), reg)
    assert abs(loss - printed) <= half_unit(10)


@pytest.mark.parametrize(("reg", "printed"), [(0.0, 2.30047908977), (3.14, 7.05211477653)])
def test_three_layer_initial_loss_spring_2017(reg, printed):
    """FullyConnectedNets spring 2017, cell "Initial loss and gradient check": seed 231, standard deviation 0.05, biases 0.

    One generator runs through both regularizations; the second net's weights come after the first's.
    """
    rng = np.random.RandomState(231)
    x, y = rng.randn(2, 15), rng.randint(10, size=(2,))
    shapes = [(15, 20), (20, 30), (30, 10)]
    weights = [5e-2 * rng.randn(*shape) for shape in shapes]
    if reg:
        weights = [5e-2 * rng.randn(*shape) for shape in shapes]
    loss, _, _ = fully_connected_loss(x, y, weights, [np.zeros(m) for _, m in shapes], reg)
    assert abs(loss - printed) <= half_unit(11)


def toy_inputs():
    """Generators 0 and 1 as the notebook seeds them: weights of standard deviation 0.1, data of 10."""
    rng = np.random.RandomState(0)
    weights = [0.1 * rng.randn(4, 10), 0.1 * rng.randn(10, 3)]
    return 10 * np.random.RandomState(1).randn(5, 4), np.array([0, 1, 2, 2, 1]), weights, [np.zeros(10), np.zeros(3)]


def test_toy_scores_2016():
    """two_layer_net 2016, cell "Forward pass: compute scores"."""
    _, scores, _ = fully_connected_loss(*toy_inputs(), reg=0)
    printed = [
        [-0.81233741, -1.27654624, -0.70335995],
        [-0.17129677, -1.18803311, -0.47310444],
        [-0.51590475, -1.01354314, -0.8504215],
        [-0.15419291, -0.48629638, -0.52901952],
        [-0.00618733, -0.12435261, -0.15226949],
    ]
    np.testing.assert_allclose(scores, printed, rtol=0, atol=half_unit(8))


def test_toy_loss_2016():
    """two_layer_net 2016, cell "Forward pass: compute loss", reg = 0.1."""
    loss, _, _ = fully_connected_loss(*toy_inputs(), reg=0.1)
    assert abs(loss - 1.30378789133) <= half_unit(11)


def test_sgd_momentum_2016():
    """FullyConnectedNets 2016, cell "SGD+Momentum": learning rate 1e-3, momentum 0.9."""
    layer = Affine(4, 5, rng=np.random.default_rng(0), bias=False, dtype="float64")
    layer.params["w"], layer.grads["w"] = linspace(-0.4, 0.6, 4, 5), linspace(-0.6, 0.4, 4, 5)
    optimizer = SGD(layer, lr=1e-3, momentum=0.9)
    optimizer.velocity["w"] = linspace(0.6, 0.9, 4, 5)
    optimizer.step()
    printed_w = [
        [0.1406, 0.20738947, 0.27417895, 0.34096842, 0.40775789],
        [0.47454737, 0.54133684, 0.60812632, 0.67491579, 0.74170526],
        [0.80849474, 0.87528421, 0.94207368, 1.00886316, 1.07565263],
        [1.14244211, 1.20923158, 1.27602105, 1.34281053, 1.4096],
    ]
    printed_v = [
        [0.5406, 0.55475789, 0.56891579, 0.58307368, 0.59723158],
        [0.61138947, 0.62554737, 0.63970526, 0.65386316, 0.66802105],
        [0.68217895, 0.69633684, 0.71049474, 0.72465263, 0.73881053],
        [0.75296842, 0.76712632, 0.78128421, 0.79544211, 0.8096],
    ]
    np.testing.assert_allclose(layer.params["w"], printed_w, rtol=0, atol=half_unit(8))
    np.testing.assert_allclose(optimizer.velocity["w"], printed_v, rtol=0, atol=half_unit(8))


# ---------------------------------------------------------------- gradient checks, as strict as the notebooks say


def test_affine_backward_spring_2017():
    """FullyConnectedNets spring 2017, cell "Affine layer: backward", which asks for errors around 1e-10."""
    rng = np.random.RandomState(231)
    x, w, b, dout = rng.randn(10, 2, 3), rng.randn(6, 5), rng.randn(5), rng.randn(10, 5)
    gradients = affine_backward(dout, affine_forward(x, w, b)[1])
    wanted = (
        numeric_gradient(lambda x: affine_forward(x, w, b)[0], x, dout),
        numeric_gradient(lambda w: affine_forward(x, w, b)[0], w, dout),
        numeric_gradient(lambda b: affine_forward(x, w, b)[0], b, dout),
    )
    assert [relative_error(*pair) < 1e-9 for pair in zip(gradients, wanted, strict=True)] == [True, True, True]


def test_relu_backward_spring_2017():
    """FullyConnectedNets spring 2017, cell "ReLU layer: backward", which asks for errors around 3e-12."""
    rng = np.random.RandomState(231)
    x, dout = rng.randn(10, 10), rng.randn(10, 10)
    wanted = numeric_gradient(lambda x: relu_forward(x)[0], x, dout)
    assert relative_error(relu_backward(dout, relu_forward(x)[1]), wanted) < 1e-11


def test_affine_relu_backward_spring_2017():
    """FullyConnectedNets spring 2017, cell "Sandwich layers", which prints errors of 6e-11, 8e-11 and 8e-12."""
    rng = np.random.RandomState(231)
    x, w, b, dout = rng.randn(2, 3, 4), rng.randn(12, 10), rng.randn(10), rng.randn(2, 10)
    gradients = affine_relu_backward(dout, affine_relu_forward(x, w, b)[1])
    wanted = (
        numeric_gradient(lambda x: affine_relu_forward(x, w, b)[0], x, dout),
        numeric_gradient(lambda w: affine_relu_forward(x, w, b)[0], w, dout),
        numeric_gradient(lambda b: affine_relu_forward(x, w, b)[0], b, dout),
    )
    assert [relative_error(*pair) < 1e-9 for pair in zip(gradients, wanted, strict=True)] == [True, True, True]


def test_softmax_backward_spring_2017():
    """FullyConnectedNets spring 2017, cell "Loss layers: Softmax and SVM", which asks for errors around 1e-8."""
    rng = np.random.RandomState(231)
    x, y = 0.001 * rng.randn(50, 10), rng.randint(10, size=50)
    wanted = numeric_gradient(lambda x: softmax_loss(x, y)[0], x, np.array(1.0))
    assert relative_error(softmax_loss(x, y)[1], wanted) < 2e-8


@pytest.mark.parametrize("reg", [0.0, 0.7])
def test_two_layer_gradients_2016(reg):
    """FullyConnectedNets 2016, cell "Two-layer network", the numeric gradient check; errors printed in later years reach 2.53e-07."""
    x, y, weights, biases = two_layer_inputs()
    _, _, gradients = fully_connected_loss(x, y, weights, biases, reg)
    first = numeric_gradient(lambda w: fully_connected_loss(x, y, [w, weights[1]], biases, reg)[0], weights[0], np.array(1.0))
    second = numeric_gradient(lambda w: fully_connected_loss(x, y, [weights[0], w], biases, reg)[0], weights[1], np.array(1.0))
    assert relative_error(gradients[0], first) < 3e-7
    assert relative_error(gradients[1], second) < 3e-7
