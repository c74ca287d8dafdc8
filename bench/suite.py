"""What every suite does with a case: build it under a backend, time it, check what it returns against float64.

On a GPU, where a call returns once it is launched, what pytest-benchmark times is one call that is waited for. The time by CUDA
events of calls that are not, the host's share of it, and the copies go to ``extra_info``.
"""

import rectilinear as rl
from rectilinear.backends.registry import NEVER_CHOSEN
from rectilinear.measure import ours, worker
from rectilinear.measure.reference import check, inputs

BACKENDS = [info.name for info in rl.list_backends() if info.usable and info.name not in NEVER_CHOSEN]
WARM_UP = 3
TURN = 0.05
"""Seconds of calls between CUDA events, as in a turn of the full grid."""


def run(benchmark, backend, case):
    """Group the results by case, so that pytest-benchmark's tables compare backends."""
    benchmark.group = case.name
    benchmark.extra_info |= {"flops": case.flops, "bytes_read": case.bytes_read, "bytes_written": case.bytes_written}
    with rl.use_backend(backend):
        timed = ours.build(case, inputs(case))
        for _ in range(WARM_UP):  # compiles, wakes threads, touches pages
            timed.call()
        benchmark(waiting(timed))
        if timed.gpu:
            benchmark.extra_info |= on_gpu(timed, case)
        # A training step has changed its parameters: it is checked from the start.
        fresh = ours.build(case, inputs(case)) if case.kind == "train" else timed
        assert check(case, inputs(case), fresh.results(fresh.call())) is None


def waiting(timed):
    """The call, followed by a wait for the GPU where it is on one."""
    if timed.gpu is None:
        return timed.call

    def call_and_wait():
        timed.call()
        timed.gpu.wait()

    return call_and_wait


def on_gpu(timed, case):
    """Seconds per call by events and of the host alone, and what copying the inputs there and the results back takes."""
    guess = timed.gpu.elapsed(timed.call, worker.BATCHES) / worker.BATCHES
    seconds = worker.per_call(timed.call, TURN, guess, timed.gpu)
    copies = timed.gpu.copies(inputs(case).values(), timed.call())
    return {"gpu": timed.gpu.device, "event_seconds": seconds, "launch_seconds": timed.gpu.launch(timed.call), "copies": copies}
