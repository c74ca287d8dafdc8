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
from rectilinear.kernels.runtime.memory import CHANGED, extent_of, has_extents, read_stack, size_of, stride_of
from rectilinear.kernels.runtime.native import let_go_of_gil, take_gil_back
from rectilinear.kernels.runtime.threads import TINY_WORK, layer_work, threads_for


@jit_inner
def _read(zero: Any, job: Backward, dout: int, keep: int, x: int, w: int) -> int:
    """Write the operands into the job; 0, or CHANGED."""
    size, kind = size_of(zero), job.keep_kind
    groups, n, d, m = extent_of(w, -3), extent_of(dout, -2), extent_of(w, -2), extent_of(w, -1)
    if not (has_extents(dout, groups, n, m) and has_extents(x, groups, n, d) and has_extents(w, groups, d, m)):
        return CHANGED
    job.groups, job.n, job.d, job.m = groups, n, d, m
    read_stack(job.dout, dout, size)
    read_stack(job.x, x, size)
    read_stack(job.w, w, size)
    if kind != 0:
        columns = extent_of(keep, -1) if kind == KEEP_BITS else m
        if not has_extents(keep, groups, n, columns) or (kind == KEEP_BITS and columns < (m + 7) >> 3):
            return CHANGED
        read_stack(job.keep, keep, 1 if kind == KEEP_BITS else size)
    return 0


@jit_inner
def _read_results(zero: Any, job: Backward, dx: int, dw: int, db: int) -> int:
    """Write where results are to go into the job; 0, or CHANGED."""
    size, groups = size_of(zero), job.groups
    if dx != 0:
        if not has_extents(dx, groups, job.n, job.d):
            return CHANGED
        read_stack(job.dx, dx, size)
    if dw != 0:
        if not has_extents(dw, groups, job.d, job.m):
            return CHANGED
        read_stack(job.dw, dw, size)
    if db != 0:
        if not has_extents(db, 1, groups, job.m):
            return CHANGED
        read_stack(job.db, db, size)
        job.db.group = stride_of(db, -2, size)
    return 0


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
        if _read(zero, job, dout, keep, x, w) != 0 or _read_results(zero, job, dx, dw, db) != 0:
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
