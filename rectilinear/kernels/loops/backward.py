"""The affine backward pass: dx = dz w^T, dw = x^T dz, db = sum of dz over rows, with dz = dout where kept, else 0.

Two ways through, chosen by shape and host, never by the number of threads, since they add up in different orders: `slabs`, for long and
narrow operands, and `blocks`, for the rest. What they are made of is in `gradients`.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops import blocks, slabs
from rectilinear.kernels.loops.host import host
from rectilinear.kernels.loops.plan import Backward, plan_backward, schedule_backward
from rectilinear.kernels.micro.rows import KEEP_BITS
from rectilinear.kernels.runtime.cache import jit, jit_inner
from rectilinear.kernels.runtime.memory import CHANGED, extent_of, read_stack, size_of
from rectilinear.kernels.runtime.native import let_go_of_gil, take_gil_back
from rectilinear.kernels.runtime.threads import TINY_WORK, layer_work, threads_for


@jit_inner
def _read(zero: Any, job: Backward, dout: int, keep: int, x: int, w: int) -> bool:
    """Write the operands into the job; whether their extents fit one another."""
    size, kind = size_of(zero), job.keep_kind
    groups, n, d, m = extent_of(w, -3), extent_of(dout, -2), extent_of(w, -2), extent_of(w, -1)
    job.groups, job.n, job.d, job.m = groups, n, d, m
    item, columns = (1, max(extent_of(keep, -1), (m + 7) >> 3)) if kind == KEEP_BITS else (size, m)
    return (
        read_stack(job.dout, dout, size, groups, n, m)
        and read_stack(job.x, x, size, groups, n, d)
        and read_stack(job.w, w, size, groups, d, m)
        and read_stack(job.keep, keep if kind != 0 else 0, item, groups, n, columns)
    )


@jit_inner
def _read_results(zero: Any, job: Backward, dx: int, dw: int, db: int) -> bool:
    """Write where results are to go into the job; whether their extents are right."""
    size, groups, n, d, m = size_of(zero), job.groups, job.n, job.d, job.m
    return (
        read_stack(job.dx, dx, size, groups, n, d)
        and read_stack(job.dw, dw, size, groups, d, m)
        and read_stack(job.db, db, size, 1, groups, m)
    )


def entry(zero: Any) -> Any:
    """The backward pass for zero's dtype, as a jitted function of the ids of arrays (0 for one that is not there).

    It returns 0, or how many bytes of scratch it needs and has not got, or CHANGED.
    """
    by_slabs, by_blocks = slabs.runner(zero), blocks.runner(zero)

    @jit(nogil=False)
    def backward(
        dout: int, keep: int, kind: int, x: int, w: int, dx: int, dw: int, db: int, scratch: int, scratch_bytes: int, threads: int
    ) -> int:
        job = Backward(keep_kind=kind)
        if not (_read(zero, job, dout, keep, x, w) and _read_results(zero, job, dx, dw, db)):
            return CHANGED
        work = layer_work(job.groups, job.n, job.d, job.m)
        threads = threads_for(zero, work, threads)
        others = let_go_of_gil(work > TINY_WORK)
        plan_backward(job, host(zero))
        schedule_backward(job, host(zero), threads)
        if job.plan.by_slabs != 0:
            needed = by_slabs(job, scratch, scratch_bytes, threads)
        else:
            needed = by_blocks(job, scratch, scratch_bytes, threads)
        take_gil_back(others)
        return needed

    return backward
