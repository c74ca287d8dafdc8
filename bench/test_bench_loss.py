"""Suite: softmax loss, and one whole training step of a 784-512-256-10 net."""

import pytest
from suite import BACKENDS, run

PASSES = (
    "softmax",
    "train",
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss(benchmark, backend, case):
    run(benchmark, backend, case)
