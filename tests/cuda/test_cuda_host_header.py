"""The header that runs CUDA on the CPU: what it is to report, it reports; and the loader checks what CuPy does not."""

from __future__ import annotations

import itertools

import host_build
import numpy as np
import pytest
from standin import Device, StandIn

SOURCE = """
extern "C" __global__ void __launch_bounds__(64) divergent(int* p) { if (threadIdx.x < 5) __syncthreads(); p[0] = 1; }
extern "C" __global__ void __launch_bounds__(64) returned(int* p) { if (threadIdx.x < 5) return; p[0] = __ballot_sync(~0u, 1); }
extern "C" __global__ void __launch_bounds__(64) partial(int* p) { p[0] = __ballot_sync(7u, 1); }
extern "C" __global__ void __launch_bounds__(64) whole(int* p) { p[0] = __ballot_sync(~0u, threadIdx.x & 1); }
extern "C" __global__ void __launch_bounds__(64) stuck(int* p)
{
    if (threadIdx.x == 0) __ballot_sync(~0u, 1);
    __syncthreads();
    p[0] = 1;
}
extern "C" __global__ void __launch_bounds__(64) unwritten(float* p) { __shared__ float s[64]; p[0] = s[3]; }
extern "C" __global__ void __launch_bounds__(64) last_writer(int* p) { p[0] = threadIdx.x; }
extern "C" __global__ void __launch_bounds__(64) hand_over(float* parts, unsigned* count, float* sum, int fenced, int cached)
{
    if (threadIdx.x) return;
    __stcg(parts + blockIdx.x, 1.0f);
    if (fenced) __threadfence();
    if (atomicAdd(count, 1u) + 1 < gridDim.x) return;
    float total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += cached ? parts[i] : __ldcg(parts + i);
    sum[0] = total;
}
extern "C" __global__ void __launch_bounds__(64) who_comes(int* order, unsigned* count)
{
    if (threadIdx.x) return;
    for (int i = 0; i < 3; ++i) order[atomicAdd(count, 1u)] = blockIdx.x;
}
extern "C" __global__ void __launch_bounds__(64) own_memory(int* wrong)
{
    __shared__ int mine;
    if (threadIdx.x == 0) mine = blockIdx.x;
    __syncthreads();
    if (mine != (int)blockIdx.x) wrong[0] = 1;
}
extern "C" __global__ void __launch_bounds__(64) scaled(float* p, int n, float by) { if (threadIdx.x < n) p[threadIdx.x] *= by; }
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> host_build.HostModule:
    return host_build.HostModule(host_build.build(SOURCE, "float32", tmp_path_factory.mktemp("header")), "float32", StandIn())


@pytest.fixture
def integers(module: host_build.HostModule) -> object:
    return module.cp.asarray(np.zeros(1, np.int32))


@pytest.mark.parametrize(
    ("kernel", "threads", "words"),
    [
        ("divergent", 64, "after some threads of the block returned"),
        ("returned", 64, "names a lane that returned"),
        ("partial", 64, "partial mask"),
        ("stuck", 64, "deadlock: the threads of block 0,0,0"),
        ("whole", 48, "incomplete warp"),
        ("whole", 2048, "invalid launch configuration"),
        ("whole", 0, "invalid launch configuration"),
    ],
)
def test_what_a_gpu_would_answer_with_nonsense_is_an_error(
    module: host_build.HostModule, integers: object, kernel: str, threads: int, words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        module.get_function(kernel)((1,), (threads,), (integers,))


def test_ballot(module: host_build.HostModule, integers: object) -> None:
    module.get_function("whole")((1,), (64,), (integers,))
    assert integers.get().view(np.uint32)[0] == 0xAAAAAAAA


def test_shared_memory_is_poisoned(module: host_build.HostModule) -> None:
    floats = module.cp.asarray(np.zeros(1, np.float32))
    module.get_function("unwritten")((1,), (64,), (floats,))
    assert np.isnan(floats.get()[0])


def test_schedules_order_the_threads(module: host_build.HostModule, integers: object) -> None:
    found = []
    for module.schedule in (0, 1, 7, 12345):
        module.get_function("last_writer")((1,), (64,), (integers,))
        found.append(int(integers.get()[0]))
    module.schedule = 0
    assert found[:2] == [63, 0]
    assert found[2] != found[3]


def hand_over(module: host_build.HostModule, schedule: int, fenced: bool, cached: bool) -> float:
    module.schedule = schedule
    parts, count, total = (module.cp.asarray(np.full(n, np.nan, np.float32)) for n in (6, 1, 1))
    count = module.cp.asarray(np.zeros(1, np.uint32))
    module.get_function("hand_over")((6,), (64,), (parts, count, total, np.int32(fenced), np.int32(cached)))
    module.schedule = 0
    assert (parts.get() == 1).all()  # all has arrived when the launch has ended
    return float(total.get()[0])


@pytest.mark.parametrize("schedule", [0, 1, 7, 12345])
def test_what_a_block_leaves_to_another_needs_a_fence_and_a_load_past_l1(module: host_build.HostModule, schedule: int) -> None:
    assert hand_over(module, schedule, fenced=True, cached=False) == 6
    assert np.isnan(hand_over(module, schedule, fenced=False, cached=False))
    assert np.isnan(hand_over(module, schedule, fenced=True, cached=True))


def test_shuffled_schedules_let_blocks_take_turns(module: host_build.HostModule) -> None:
    def order(schedule: int) -> list[int]:
        module.schedule = schedule
        order, count = module.cp.asarray(np.zeros(24, np.int32)), module.cp.asarray(np.zeros(1, np.uint32))
        module.get_function("who_comes")((8,), (64,), (order, count))
        module.schedule = 0
        found: list[int] = order.get().tolist()
        return found

    assert order(0) == sorted([*range(8)] * 3)
    assert order(1) == sorted([*range(8)] * 3, reverse=True)
    for schedule in (7, 12345):
        assert sorted(order(schedule)) == order(0)
        assert sum(a != b for a, b in itertools.pairwise(order(schedule))) > 10  # seven where each block ends before the next begins
        assert list(dict.fromkeys(order(schedule))) != [*range(8)]  # nor do they begin in their order


def test_blocks_that_take_turns_have_shared_memory_of_their_own(module: host_build.HostModule, integers: object) -> None:
    for module.schedule in (0, 1, 7, 12345):
        module.get_function("own_memory")((8,), (64,), (integers,))
    module.schedule = 0
    assert integers.get()[0] == 0


def test_subnormals_are_flushed_on_demand(module: host_build.HostModule) -> None:
    floats = module.cp.asarray(np.full(1, 2e-38, np.float32))
    module.get_function("scaled")((1,), (32,), (floats, np.int32(1), np.float32(0.5)))
    assert floats.get()[0] == 0
    module.flush = False
    floats = module.cp.asarray(np.full(1, 2e-38, np.float32))
    module.get_function("scaled")((1,), (32,), (floats, np.int32(1), np.float32(0.5)))
    module.flush = True
    assert floats.get()[0] == np.float32(1e-38)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (lambda a: (a,), "1 arguments given, the kernel takes 3"),
        (lambda a: (a, 1, np.float32(2)), "argument 1 is 1 \\(int\\), the kernel takes i4"),
        (lambda a: (a, np.int64(1), np.float32(2)), "argument 1 is .*int64.*, the kernel takes i4"),
        (lambda a: (a.astype(np.float64), np.int32(1), np.float32(2)), "argument 0 is float64, the kernel takes an array of float32"),
        (lambda a: (a.get(), np.int32(1), np.float32(2)), "argument 0 is float32, the kernel takes an array of float32"),
        (lambda a: (type(a)._of(np.zeros(9, "u1")[1:].view("f4")), np.int32(1), np.float32(2)), "argument 0 does not lie on a multiple"),
        (lambda a: (a[::2], np.int32(1), np.float32(2)), "argument 0 is not C-contiguous"),
    ],
)
def test_arguments_are_checked(module: host_build.HostModule, args: object, words: str) -> None:
    a = module.cp.asarray(np.zeros(8, np.float32))
    with pytest.raises(TypeError, match=words):
        module.get_function("scaled")((1,), (32,), args(a))


def test_a_launch_on_another_device_is_an_error(module: host_build.HostModule, integers: object) -> None:
    with Device(1), pytest.raises(RuntimeError, match="launch goes to <CUDA Device 1>"):
        module.get_function("last_writer")((1,), (32,), (integers,))
