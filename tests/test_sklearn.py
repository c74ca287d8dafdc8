"""rectilinear.sklearn: scikit-learn's results from our passes, and scikit-learn itself wherever they do not serve."""

from __future__ import annotations

import importlib
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

import rectilinear
from rectilinear.threads import available_cores

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

neural_network: Any = None
ours: Any = None
private: Any = None
update: Any = None


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    """scikit-learn is imported where these tests run, and not where they are only collected."""
    global neural_network, ours, private, update
    neural_network, ours, private, update = map(
        importlib.import_module,
        ("sklearn.neural_network", "rectilinear.sklearn", "rectilinear.sklearn.private", "rectilinear.sklearn.update"),
    )


def data(kind: str, dtype: str = "float64", n: int = 130) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((n, 12)).astype(dtype)
    z = x @ rng.standard_normal((12, 3)) + rng.standard_normal((n, 3))
    y = {"multiclass": z.argmax(1), "binary": z[:, 0] > 0, "multilabel": (z > 0).astype(int), "one": z[:, 0], "many": z}[kind]
    return x, y.astype(dtype) if y.dtype.kind == "f" else y


def pair(kind: str, **options):
    """The same estimator of scikit-learn and of ours."""
    name = "MLPRegressor" if kind in ("one", "many") else "MLPClassifier"
    given = {"hidden_layer_sizes": (17, 9), "batch_size": 32, "max_iter": 2, "random_state": 3} | options
    return [getattr(module, name)(**given) for module in (neural_network, ours)]


def parameters(net) -> list[np.ndarray]:
    return [*net.coefs_, *net.intercepts_]


@pytest.fixture
def served(monkeypatch) -> list[str]:
    """Says "step" for each update of ours, "parent: ..." for each reason why the parent computes."""
    seen: list[str] = []
    step = update.Update.update_params
    monkeypatch.setattr(update.Update, "update_params", lambda *given: (seen.append("step"), step(*given))[1])
    monkeypatch.setattr(ours._log, "debug", lambda text, reason: seen.append(f"parent: {reason}"))
    return seen


# ---------------------------------------------------------------- the same results


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "adam"},
        {"solver": "sgd"},
        {"solver": "sgd", "nesterovs_momentum": False, "learning_rate": "invscaling", "alpha": 3.0},
        {"solver": "adam", "hidden_layer_sizes": (), "alpha": 0.0, "shuffle": False},
        {"solver": "adam", "early_stopping": True, "max_iter": 12, "n_iter_no_change": 1},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("kind", ["multiclass", "binary", "multilabel", "one", "many"])
def test_coefficients_and_losses_are_scikit_learns(kind, options, served):
    x, y = data(kind)
    theirs, mine = (net.fit(x, y) for net in pair(kind, **options))
    assert served.count("step") >= 10
    assert theirs.n_iter_ == mine.n_iter_
    for a, b in zip(parameters(theirs), parameters(mine), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-8)
    np.testing.assert_allclose(mine.loss_curve_, theirs.loss_curve_, rtol=1e-6)
    np.testing.assert_allclose(mine._forward_pass_fast(x), theirs._forward_pass_fast(x), rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(mine.predict(x).shape, theirs.predict(x).shape)


@pytest.mark.parametrize("solver", ["adam", "sgd"])
@pytest.mark.parametrize("kind", ["multiclass", "many"])
def test_float32_stays_float32(kind, solver, served):
    x, y = data(kind, "float32")
    theirs, mine = (net.fit(x, y) for net in pair(kind, solver=solver))
    assert "step" in served
    assert {array.dtype for array in parameters(mine)} == {np.dtype("float32")} == {mine._forward_pass_fast(x).dtype}
    for a, b in zip(parameters(theirs), parameters(mine), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mine.loss_curve_, theirs.loss_curve_, rtol=1e-5)


@pytest.mark.parametrize("kind", ["multiclass", "binary", "one"])
def test_sample_weights_weigh(kind, served):
    if "sample_weight" not in inspect.signature(neural_network.MLPClassifier.fit).parameters:
        pytest.skip("scikit-learn takes sample weights since 1.7")
    x, y = data(kind)
    weights = np.random.default_rng(1).integers(0, 3, len(x)) + 0.5
    theirs, mine = (net.fit(x, y, sample_weight=weights) for net in pair(kind))
    assert "step" in served
    for a, b in zip(parameters(theirs), parameters(mine), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-8)
    np.testing.assert_allclose(mine.loss_curve_, theirs.loss_curve_, rtol=1e-6)


def test_no_gradient_passes_at_zero(served):
    """Half of all hidden sums are exactly 0: there ours, left to itself, would pass, and move the intercepts."""
    x, y = data("multiclass")
    nets = pair("multiclass", hidden_layer_sizes=(16,), solver="sgd", momentum=0.0)
    for net in nets:
        net.partial_fit(x, y, classes=[0, 1, 2])
        net.coefs_[0][:, :8] = 0
        net.intercepts_[0][:8] = 0
        net.partial_fit(x, y)
    theirs, mine = nets
    assert "step" in served
    np.testing.assert_array_equal(mine.intercepts_[0][:8], 0)
    for a, b in zip(parameters(theirs), parameters(mine), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-8)


def test_partial_fits_go_on_where_the_last_one_stopped(served):
    x, y = data("multiclass")
    theirs, mine = pair("multiclass")
    for start in (0, 40, 80):
        for net in (theirs, mine):
            net.partial_fit(x[start : start + 40], y[start : start + 40], classes=[0, 1, 2])
            net.coefs_[0] *= 0.5  # the penalty of the next one is that of these
    assert mine._optimizer.t == theirs._optimizer.t == 6
    np.testing.assert_allclose(mine.loss_curve_, theirs.loss_curve_, rtol=1e-6)
    for a, b in zip(parameters(theirs), parameters(mine), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-8)


# ---------------------------------------------------------------- the parent's work


def test_what_is_not_served_is_the_parents_to_the_bit(served):
    sparse = importlib.import_module("scipy.sparse")
    x, y = data("multiclass")
    for options, given, reason in (
        ({}, sparse.csr_matrix(x), "not a dense array"),
        ({"activation": "tanh"}, x, "activation is 'tanh'"),
        ({"solver": "lbfgs"}, x, None),
    ):
        del served[:]
        theirs, mine = (net.fit(given, y) for net in pair("multiclass", **options))
        assert "step" not in served
        assert reason is None or reason in served[0]
        for a, b in zip(parameters(theirs), parameters(mine), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_numpy_backend_leaves_all_to_the_parent(served):
    x, y = data("one")
    with rectilinear.use_backend("numpy"):
        theirs, mine = (net.fit(x, y) for net in pair("one"))
        np.testing.assert_array_equal(mine.predict(x), theirs.predict(x))
    assert set(served) == {"parent: the numpy backend is chosen, which does what scikit-learn does"}


def test_another_backend_computes_with_the_parents_update(served):
    """The update is numba's; another backend's passes do without."""
    x, y = data("one")
    theirs, mine = pair("one")
    theirs.fit(x, y)
    with rectilinear.use_backend("loopback"):
        mine.fit(x, y)
    assert served == []
    for a, b in zip(parameters(theirs), parameters(mine), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-8)


def test_a_version_of_scikit_learn_that_is_not_known_computes_by_itself(served, monkeypatch):
    monkeypatch.setitem(private._REPLACED, "_backprop", "self X y activations")
    found = private._look()
    assert found.startswith("_backprop takes (self, X, y, activations")
    monkeypatch.setattr(private, "strange", found)
    x, y = data("one")
    theirs, mine = (net.fit(x, y) for net in pair("one"))
    np.testing.assert_array_equal(mine.predict(x), theirs.predict(x))
    assert set(served) == {f"parent: {found}"}


def test_inputs_of_other_dtypes_are_predicted_as_there(served):
    x, y = data("multiclass")
    theirs, mine = (net.fit(x, y) for net in pair("multiclass"))
    for given in (np.round(x).astype(np.int16), x.astype(np.float32), x[:1], x > 0, x.astype(np.float16), np.asfortranarray(x)):
        a, b = theirs.predict_proba(given), mine.predict_proba(given)
        assert a.dtype == b.dtype
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-9)
    for net in (theirs, mine):  # coefficients of float64 moved by gradients of float32
        net.partial_fit(x.astype(np.float32), y)
    assert "parent: x is float32, but coefficients are float64" in served


# ---------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_a_fit_leaves_scikit_learns_objects_behind(solver, monkeypatch):
    x, y = data("multiclass")
    theirs, mine = (net.fit(x, y) for net in pair("multiclass", solver=solver))
    assert type(mine._optimizer) is type(theirs._optimizer)
    assert vars(mine).keys() == vars(theirs).keys()

    def fails(*given):
        raise RuntimeError("in the middle of a fit")

    monkeypatch.setattr(ours, "_loss", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        mine.fit(x, y)
    assert type(mine._optimizer) is type(theirs._optimizer)
    assert vars(mine).keys() == vars(theirs).keys()


def test_pickles_and_clones():
    x, y = data("multiclass")
    net = pair("multiclass")[1].fit(x, y)
    again = pickle.loads(pickle.dumps(net))
    np.testing.assert_array_equal(again.predict_proba(x), net.predict_proba(x))
    np.testing.assert_array_equal(again.partial_fit(x, y).coefs_[0], net.partial_fit(x, y).coefs_[0])
    twin = importlib.import_module("sklearn.base").clone(net)
    assert type(twin) is ours.MLPClassifier
    assert twin.get_params() == net.get_params()
    assert not hasattr(twin, "coefs_")


def test_grid_search_in_two_processes_runs_no_more_threads_than_cores():
    x, y = data("multiclass")

    def threads(net, x, y):  # sent by value, since the workers need not import this file
        net.predict(x)
        return float(rectilinear.get_num_threads())

    grid_search = importlib.import_module("sklearn.model_selection").GridSearchCV
    search = grid_search(pair("multiclass")[1], {"alpha": [0.1, 1.0]}, cv=2, n_jobs=2, scoring=threads, refit=False).fit(x, y)
    each = search.cv_results_["mean_test_score"]
    assert 1 <= max(each) <= max(1, available_cores() // 2)


# ---------------------------------------------------------------- the update


def tensors(rng, shapes, dtype, order="C"):
    return [np.asarray(rng.standard_normal(shape), dtype, order=order) for shape in shapes]


SHAPES = [(90, 101), (101, 7), (101,), (7,)]  # coefficients, then intercepts; the first takes two tasks in float64


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", [lambda p: private.ADAM(p), lambda p: private.SGD(p), lambda p: private.SGD(p, nesterov=False)])
def test_an_update_is_scikit_learns(make, dtype, order):
    """To the bit in float64, where the number of samples is a power of two: scikit-learn divides by it, we multiply."""
    rng = np.random.default_rng(2)
    params = tensors(rng, SHAPES, dtype, order)
    mine, sums = [p.copy(order="K") for p in params], []
    optimizer, fused = make(params), update.update_of(make(mine), mine)
    for _ in range(3):
        grads = tensors(rng, SHAPES, dtype)
        sums.append((fused.squares(mine[:2]), sum(float(np.sum(p.astype(float) ** 2)) for p in mine[:2])))
        fused.decay, fused.divisor = 0.5, 64
        fused.update_params(mine, [g.copy() for g in grads])
        optimizer.update_params(params, [(g + 0.5 * p if i < 2 else g) / 64 for i, (g, p) in enumerate(zip(grads, params, strict=True))])
    for a, b in zip(params, mine, strict=True):
        if dtype == "float64":
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(*zip(*sums, strict=True), rtol=1e-6)
    theirs, state = vars(optimizer), vars(fused.optimizer)
    assert theirs.keys() == state.keys()
    assert theirs.get("t") == state.get("t")
    for name in theirs.keys() & {"ms", "vs", "velocities"}:
        for a, b in zip(theirs[name], state[name], strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_an_update_has_the_same_bits_for_every_number_of_threads():
    shapes = [(300, 200), (200, 3), (200,), (3,)]
    results = []
    for threads in (1, 2, 5):
        rng = np.random.default_rng(4)
        params = tensors(rng, shapes, "float64")
        fused = update.update_of(private.ADAM(params), params)
        with rectilinear.num_threads(threads):
            fused.update_params(params, tensors(rng, shapes, "float64"))
        results.append((fused.squares(params[:2]), *(p.tobytes() for p in params)))
    assert results[0] == results[1] == results[2]


# ---------------------------------------------------------------- scikit-learn's own checks

ESTIMATORS = ["MLPClassifier", "MLPRegressor"]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_few_of_scikit_learns_checks(name):
    """The rest of them is nightly."""
    checks = importlib.import_module("sklearn.utils.estimator_checks")
    for check in (
        "check_estimators_dtypes",
        "check_fit2d_1sample",
        "check_fit2d_predict1d",
        "check_dict_unchanged",
        "check_estimators_nan_inf",
        "check_estimators_overwrite_params",
        "check_n_features_in",
        "check_methods_subset_invariance",
    ):
        getattr(checks, check)(name, getattr(ours, name)(max_iter=100))


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_scikit_learns_checks(name):
    importlib.import_module("sklearn.utils.estimator_checks").check_estimator(getattr(ours, name)(max_iter=100))
