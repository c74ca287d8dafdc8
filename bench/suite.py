"""What every suite does with a case: build it under a backend, time it, check what it returns against float64."""

import rectilinear as rl
from rectilinear.measure import ours
from rectilinear.measure.reference import check, inputs

BACKENDS = [info.name for info in rl.list_backends() if info.usable and info.name not in ("auto", "generic")]
WARM_UP = 2


def run(benchmark, backend, case):
    """Group the results by case, so that pytest-benchmark's tables compare backends."""
    benchmark.group = case.name
    benchmark.extra_info |= {"flops": case.flops, "bytes_read": case.bytes_read, "bytes_written": case.bytes_written}
    with rl.use_backend(backend):
        timed = ours.build(case, inputs(case))
        for _ in range(WARM_UP):  # compiles, wakes threads, touches pages
            timed.call()
        benchmark(timed.call)
        # A training step has changed its parameters: it is checked from the start.
        fresh = ours.build(case, inputs(case)) if case.kind == "train" else timed
        assert check(case, inputs(case), fresh.results(fresh.call())) is None
