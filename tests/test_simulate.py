"""The simulation of many cores: threads share what there is, and no plan beats the roofline."""

from __future__ import annotations

import pytest

from rectilinear.kernels.loops.host import Cache, Caches, host_of
from rectilinear.kernels.micro.simd import AVX512
from tools.simulate import Machine, Phase, Task, bound, efficiency, seconds, seconds_of

HOST = host_of(AVX512, 4, Caches(Cache(32 << 10, 8), Cache(1 << 20, 8), Cache(32 << 20, 16)), cores=64)
IDEAL = Machine(claim=0, start=0)


def test_threads_claim_runs_and_share_the_memory() -> None:
    second = Task(operations=IDEAL.peak)
    assert seconds_of(Phase([second] * 5), 1, IDEAL) == pytest.approx(5)
    assert seconds_of(Phase([second] * 5), 2, IDEAL) == pytest.approx(3)
    assert seconds_of(Phase([second] * 5, run=4), 2, IDEAL) == pytest.approx(4)
    assert seconds_of(Phase([Task(memory=IDEAL.core)] * 64), 64, IDEAL) == pytest.approx(64 * IDEAL.core / IDEAL.memory)
    # What waits for no memory goes on at full speed.
    mixed = [Task(memory=IDEAL.core)] * 63 + [second]
    assert seconds_of(Phase(mixed), 64, IDEAL) == pytest.approx(63 * IDEAL.core / IDEAL.memory)


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_a_pass_is_never_faster_than_the_roofline(op: str) -> None:
    shape = (512, 512, 512)
    times = [seconds(op, shape, HOST, threads, Machine()) for threads in (1, 2, 4, 64)]
    assert times == sorted(times, reverse=True)
    for threads, time in zip((1, 2, 4, 64), times, strict=True):
        assert bound(op, shape, HOST, threads, IDEAL) <= time


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("shape", [(2048, 2048, 2048), (65536, 64, 64), (16384, 256, 256)], ids=str)
def test_64_cores_are_used(op: str, shape: tuple[int, int, int]) -> None:
    assert efficiency(op, shape, HOST, 64, Machine()) > 0.85
