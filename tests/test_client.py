"""Code written against CS231n's layers.py, the way students write it, runs on these layers unchanged.

Above the line is the client: a fully connected net of any depth with a `loss` method, and a solver. It imports the layers
with one star and knows nothing else of rectilinear. Below the line are the tests.
"""

import numpy as np
import pytest

import rectilinear
from rectilinear.backends.registry import NEVER_CHOSEN
from rectilinear.layers import *  # noqa: F403

# ruff: noqa: F405, UP031


class FullyConnectedNet:
    """(affine - relu) x L - affine - softmax with L2 regularization."""

    def __init__(self, input_dim, hidden_dims, num_classes, weight_scale=1e-2, reg=0.0, dtype=np.float64, fused=True, seed=0):
        self.reg = reg
        self.dtype = dtype
        self.fused = fused
        self.num_layers = len(hidden_dims) + 1
        self.params = {}
        rng = np.random.RandomState(seed)
        dims = [input_dim] + list(hidden_dims) + [num_classes]  # noqa: RUF005
        for i in range(self.num_layers):
            self.params["W%d" % (i + 1)] = (weight_scale * rng.randn(dims[i], dims[i + 1])).astype(dtype)
            self.params["b%d" % (i + 1)] = np.zeros(dims[i + 1], dtype=dtype)

    def loss(self, X, y=None):
        """Scores if y is None, else the loss and a dictionary of gradients."""
        out = X.astype(self.dtype)
        caches = []
        for i in range(1, self.num_layers):
            W, b = self.params["W%d" % i], self.params["b%d" % i]
            if self.fused:
                out, cache = affine_relu_forward(out, W, b)
            else:
                a, fc_cache = affine_forward(out, W, b)
                out, relu_cache = relu_forward(a)
                cache = (fc_cache, relu_cache)
            caches.append(cache)
        last = str(self.num_layers)
        scores, cache = affine_forward(out, self.params["W" + last], self.params["b" + last])
        if y is None:
            return scores

        loss, dscores = softmax_loss(scores, y)
        grads = {}
        dout, grads["W" + last], grads["b" + last] = affine_backward(dscores, cache)
        for i in range(self.num_layers - 1, 0, -1):
            cache = caches[i - 1]
            if self.fused:
                dout, dW, db = affine_relu_backward(dout, cache)
            else:
                fc_cache, relu_cache = cache
                da = relu_backward(dout, relu_cache)
                dout, dW, db = affine_backward(da, fc_cache)
            grads["W%d" % i], grads["b%d" % i] = dW, db
        for i in range(1, self.num_layers + 1):
            W = self.params["W%d" % i]
            loss += 0.5 * self.reg * np.sum(W * W)
            grads["W%d" % i] += self.reg * W
        return loss, grads


class Solver:
    """Minibatch SGD with momentum and learning rate decay; keeps the parameters that did best on the validation set."""

    def __init__(self, model, data, learning_rate=1e-2, momentum=0.9, lr_decay=1.0, batch_size=50, num_epochs=10, seed=0):
        self.model = model
        self.X_train, self.y_train = data["X_train"], data["y_train"]
        self.X_val, self.y_val = data["X_val"], data["y_val"]
        self.learning_rate, self.momentum, self.lr_decay = learning_rate, momentum, lr_decay
        self.batch_size, self.num_epochs = batch_size, num_epochs
        self.rng = np.random.RandomState(seed)
        self.velocity = {p: np.zeros_like(w) for p, w in model.params.items()}
        self.loss_history, self.val_acc_history = [], []
        self.best_val_acc, self.best_params = 0, {}

    def step(self):
        mask = self.rng.choice(self.X_train.shape[0], self.batch_size)
        loss, grads = self.model.loss(self.X_train[mask], self.y_train[mask])
        self.loss_history.append(loss)
        for p, w in self.model.params.items():
            v = self.momentum * self.velocity[p] - self.learning_rate * grads[p]
            self.velocity[p] = v
            self.model.params[p] = w + v

    def check_accuracy(self, X, y):
        scores = self.model.loss(X)
        return np.mean(np.argmax(scores, axis=1) == y)

    def train(self):
        iterations_per_epoch = max(self.X_train.shape[0] // self.batch_size, 1)
        for t in range(self.num_epochs * iterations_per_epoch):
            self.step()
            if (t + 1) % iterations_per_epoch == 0:
                self.learning_rate *= self.lr_decay
                val_acc = self.check_accuracy(self.X_val, self.y_val)
                self.val_acc_history.append(val_acc)
                if val_acc > self.best_val_acc:
                    self.best_val_acc = val_acc
                    self.best_params = {k: v.copy() for k, v in self.model.params.items()}
        self.model.params = self.best_params


# ------------------------------------------------------------------------------------------------

BACKENDS = [info.name for info in rectilinear.list_backends() if info.usable and info.name not in NEVER_CHOSEN]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with rectilinear.use_backend(request.param):
        yield request.param


@pytest.fixture
def images():
    """Twelve small images of three classes, as (N, channels, height, width)."""
    rng = np.random.default_rng(3)
    return rng.standard_normal((12, 2, 3, 2)), rng.integers(3, size=12)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("reg", [0.0, 0.7])
@pytest.mark.parametrize("hidden", [[], [5], [5, 4], [4, 5, 4, 3]])
def test_gradients_at_any_depth(hidden, reg, fused, images):
    X, y = images
    model = FullyConnectedNet(12, hidden, 3, weight_scale=0.5, reg=reg, fused=fused)
    for name in model.params:
        if name.startswith("b"):
            # No bias of 0: a sample that no unit of the layer below keeps would sit on ReLU's kink.
            model.params[name] += np.linspace(-0.31, 0.29, model.params[name].size)
    _, grads = model.loss(X, y)
    assert sorted(grads) == sorted(model.params)
    h = 1e-6
    for name, values in model.params.items():
        for index in np.ndindex(values.shape):
            kept = values[index]
            values[index] = kept + h
            above, _ = model.loss(X, y)
            values[index] = kept - h
            below, _ = model.loss(X, y)
            values[index] = kept
            assert grads[name][index] == pytest.approx((above - below) / (2 * h), abs=2e-8), (name, index)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_and_composed_are_one(dtype, images):
    X, y = images
    results = [FullyConnectedNet(12, [6, 5], 3, weight_scale=0.5, dtype=dtype, fused=fused).loss(X, y) for fused in (True, False)]
    eps = np.finfo(dtype).eps
    assert results[0][0] == pytest.approx(results[1][0], rel=50 * float(eps))
    for name, gradient in results[0][1].items():
        assert gradient.dtype == dtype
        np.testing.assert_allclose(gradient, results[1][1][name], rtol=0, atol=50 * eps)


def test_initial_loss_is_that_of_guessing(images):
    X, y = images
    loss, _ = FullyConnectedNet(12, [6, 5], 3, weight_scale=1e-4).loss(X, y)
    assert loss == pytest.approx(np.log(3), abs=1e-4)
    assert "%.4f" % loss == "1.0986"


def test_a_relu_of_ones_own_reads_the_fused_cache(images):
    """The cache's ReLU half may be a mask; `>= 0` and `> 0` must select what the forward kept all the same."""
    X, _ = images
    rng = np.random.default_rng(0)
    w, b, dout = rng.standard_normal((12, 5)), rng.standard_normal(5), rng.standard_normal((12, 5))
    _, cache = affine_relu_forward(X, w, b)
    fc_cache, relu_cache = cache
    expected = affine_relu_backward(dout, cache)
    for keep in (relu_cache >= 0, relu_cache > 0):
        for got, wanted in zip(affine_backward(dout * keep, fc_cache), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.smoke
def test_the_solver_overfits_fifty_images():
    rng = np.random.default_rng(5)
    X, y = rng.standard_normal((50, 3, 4, 4)), rng.integers(10, size=50)
    data = {"X_train": X, "y_train": y, "X_val": X, "y_val": y}
    model = FullyConnectedNet(48, [50, 50], 10, weight_scale=0.1)
    solver = Solver(model, data, learning_rate=3e-2, batch_size=25, num_epochs=60)
    solver.train()
    assert solver.best_val_acc == 1.0
    assert solver.loss_history[-1] < 0.1 < solver.loss_history[0]


def test_the_star_brings_the_seven_functions():
    assert [name for name in dir(rectilinear.layers) if name in rectilinear.layers.__all__ and name not in globals()] == []
