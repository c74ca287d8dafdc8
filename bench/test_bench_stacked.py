"""Suite: the stacked form, a batched matmul."""

import pytest
from suite import BACKENDS, run

PASSES = ("stacked",)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stacked(benchmark, backend, case):
    run(benchmark, backend, case)
