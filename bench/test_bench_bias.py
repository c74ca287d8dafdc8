"""Suite: the bias reduction, db = dout.sum(0)."""

import pytest
from suite import BACKENDS, run

PASSES = ("db",)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias(benchmark, backend, case):
    run(benchmark, backend, case)
