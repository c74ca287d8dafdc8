"""Suite: the affine layer with and without ReLU, its backward pass and both."""

import pytest
from suite import BACKENDS, run

PASSES = (
    "affine",
    "forward",
    "backward",
    "step",
    "step_fortran",
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_affine(benchmark, backend, case):
    run(benchmark, backend, case)
