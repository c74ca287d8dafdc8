"""The affine forward pass: out = x w + b, with ReLU and the keep-mask bits at the store: a single product (`matmul`)."""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.host import host
from rectilinear.kernels.loops.matmul import compute, forget_packed_columns, lay_out, prepare, slot_bytes
from rectilinear.kernels.loops.plan import Matmul, plan_forward, schedule_forward
from rectilinear.kernels.micro.library import lanes
from rectilinear.kernels.micro.tile import BITS
from rectilinear.kernels.runtime.cache import jit, jit_inner
from rectilinear.kernels.runtime.memory import CHANGED, data_of, extent_of, has_extents, read_stack, size_of, stride_of
from rectilinear.kernels.runtime.native import c_address, let_go_of_gil, take_gil_back
from rectilinear.kernels.runtime.operands import Rows
from rectilinear.kernels.runtime.records import address_of, at
from rectilinear.kernels.runtime.threads import TINY_WORK, layer_work, parallel_for, task_of, threads_for

SCATTERED = -1
"""What the pass answers to a bias whose elements do not lie side by side."""


@jit_inner
def _read(zero: Any, job: Matmul, x: int, w: int, b: int, out: int, bits: int) -> int:
    """Write the operands into the job; 0, or CHANGED or SCATTERED."""
    size = size_of(zero)
    groups, n, d, m = extent_of(w, -3), extent_of(x, -2), extent_of(x, -1), extent_of(w, -1)
    job.groups, job.n, job.k, job.m = groups, n, d, m
    if not (
        read_stack(job.a, x, size, groups, n, d)
        and read_stack(job.b, w, size, groups, d, m)
        and read_stack(job.c, out, size, groups, n, m)
        and read_stack(job.bits, bits, 1, groups, n, (m + 7) >> 3)
        and (b == 0 or has_extents(b, 1, groups, m))
    ):
        return CHANGED
    job.flags |= BITS if bits != 0 else 0
    if b != 0:
        if stride_of(b, -1, size) != size and groups > 0:
            return SCATTERED
        job.bias = Rows(data_of(b), stride_of(b, -2, size))
    return 0


def entry(zero: Any) -> Any:
    """The forward pass for zero's dtype: (ids of x, w, b or 0, out, bits or 0; RELU or 0; scratch, its bytes; threads).

    It returns 0, or how many bytes of scratch it needs and has not got, or below 0 SCATTERED or CHANGED.
    """

    before = task_of(Matmul, zero, prepare)

    @jit_inner
    def task(index: int, address: int, slot: int) -> None:
        job = at(Matmul, address)
        for i in range(index * job.tasks.run, min((index + 1) * job.tasks.run, job.tasks.count)):
            compute(zero, i, job, slot)

    @jit(nogil=False)
    def forward(x: int, w: int, b: int, out: int, bits: int, flags: int, scratch: int, scratch_bytes: int, threads: int) -> int:
        job = Matmul(flags=flags)
        objection = _read(zero, job, x, w, b, out, bits)
        if objection != 0:
            return objection
        work = layer_work(job.groups, job.n, job.k, job.m)
        threads = threads_for(zero, work, threads)
        plan_forward(job, host(zero))
        schedule_forward(job, host(zero), threads)
        job.panel = job.k * job.plan.width * lanes(zero) * size_of(zero)
        job.slots = Rows(lay_out(zero, job, scratch), slot_bytes(zero, job))
        runs = -(-job.tasks.count // job.tasks.run)
        workers = min(threads, max(1, runs))
        needed = job.slots.data + workers * job.slots.row - scratch
        if needed > scratch_bytes:
            return needed
        others = let_go_of_gil(work > TINY_WORK)
        forget_packed_columns(job, workers)
        parallel_for(c_address(before), address_of(job), job.groups * (job.tasks.parts + job.tasks.copies), threads)
        parallel_for(c_address(task), address_of(job), runs, threads)
        take_gil_back(others)
        return 0

    return forward
