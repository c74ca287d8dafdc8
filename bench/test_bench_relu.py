"""Suite: ReLU alone, forward and backward."""

import pytest
from suite import BACKENDS, run

PASSES = (
    "relu_forward",
    "relu_backward",
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu(benchmark, backend, case):
    run(benchmark, backend, case)
