"""Suite: what a call on CuPy arrays costs the host, while launches, products and allocations do nothing; in multiples of `np.maximum`.

Needs CuPy and no GPU: ``.venv-cuda/bin/python -m pytest bench/test_bench_host_cost.py --benchmark-enable``. The table's ratios are
to the quickest, which is the unit. ``python tests/cuda/host_cost.py`` measures all of them in turns.
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "tests" / "cuda"))

import host_cost

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("layer", host_cost.SHAPES)
@pytest.mark.parametrize("name", ["np.maximum", *host_cost.CALLS])
def test_host_cost(benchmark, name, layer):
    with host_cost.idle_backend():
        benchmark(host_cost.maximum() if name == "np.maximum" else host_cost.calls(layer)[name])
