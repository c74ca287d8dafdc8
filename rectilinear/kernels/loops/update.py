"""The update of parameters along their gradients, all parameters of a model in one call.

Whatever is unusual about the arrays is left to the caller, before anything is written.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.elementwise import QUICK_BYTES, RUN_BYTES, SHARED_BYTES
from rectilinear.kernels.loops.parameters import (
    Parameter,
    Parameters,
    fits,
    give_back,
    make_room,
    number_tasks,
    owner_of_task,
    parameter,
    read,
)
from rectilinear.kernels.micro.library import sgd
from rectilinear.kernels.micro.sgd import DECAY, MOMENTUM, SgdOperands
from rectilinear.kernels.runtime.cache import jit, jit_inner
from rectilinear.kernels.runtime.memory import C_ORDER, CHANGED, F_ORDER, WRITEABLE, bits_of, data_of, flags_of, item_of, length_of, size_of
from rectilinear.kernels.runtime.native import c_address
from rectilinear.kernels.runtime.operands import Word
from rectilinear.kernels.runtime.records import address_of, at, record
from rectilinear.kernels.runtime.threads import parallel_for_without_gil, task_of

OVERFLOWED = 1
"""What the entry answers where finite values came to be others; all has been moved nevertheless."""


@record
class Update:
    """The job. Rates as in `SgdOperands`."""

    parameters: Parameters = Parameters()
    lr: int = 0
    momentum: int = 0
    decay: int = 0
    overflow: Word = Word()


@jit_inner
def _task(zero: Any, index: int, job: Update, slot: int) -> None:
    own = at(Parameter, owner_of_task(job.parameters, index))
    done = (index - own.first) * job.parameters.run
    start = done * size_of(zero)
    s = SgdOperands(count=min(job.parameters.run, own.count - done), w=own.w + start, dw=own.dw + start, v=own.v + start, flags=own.flags)
    s.lr, s.momentum, s.decay, s.overflow = job.lr, job.momentum, job.decay, address_of(job.overflow)
    sgd(zero, s)


@jit_inner
def _read(own: Parameter, w: int, dw: int, v: int, like: int) -> bool:
    """Write where the arrays of a parameter lie; whether they are as a kernel wants them. v may be 0: no array."""
    if not (fits(w, like, w, WRITEABLE) and fits(dw, like, w, 0) and (v == 0 or fits(v, like, w, WRITEABLE))):
        return False
    read(own, w)
    own.dw, own.v = data_of(dw), 0 if v == 0 else data_of(v)
    order = flags_of(w) & flags_of(dw) & (C_ORDER | F_ORDER)
    return order & flags_of(v) != 0 if v != 0 else order != 0


@jit_inner
def _meet(a: int, a_bytes: int, b: int, b_bytes: int) -> bool:
    return a != 0 and b != 0 and a < b + b_bytes and b < a + a_bytes


@jit_inner
def _are_apart(a: Parameter, b: Parameter, size: int) -> bool:
    """Whether nothing that is written for a parameter lies where something of another, or another array of its own, lies."""
    n, m = a.count * size, b.count * size
    if _meet(a.w, n, b.dw, m) or _meet(b.w, m, a.dw, n) or _meet(a.v, n, b.dw, m) or _meet(b.v, m, a.dw, n):
        return False
    if _meet(a.v, n, b.w, m) or _meet(b.v, m, a.w, n):
        return False
    return address_of(a) == address_of(b) or not (_meet(a.w, n, b.w, m) or _meet(a.v, n, b.v, m))


@jit_inner
def _prepare(job: Update, w: int, dw: int, v: int, decayed: int, size: int) -> int:
    """Read the arrays in these tuples into the job's parameters; the bytes of w, or CHANGED where something is unusual."""
    total, like = 0, item_of(w, 0)
    for i in range(job.parameters.count):
        own = at(Parameter, parameter(job.parameters, i))
        if not _read(own, item_of(w, i), item_of(dw, i), item_of(v, i) if job.momentum != 0 else 0, like):
            return CHANGED
        for j in range(i + 1):
            if not _are_apart(own, at(Parameter, parameter(job.parameters, j)), size):
                return CHANGED
        own.flags = (DECAY if i < decayed and job.decay != 0 else 0) | (MOMENTUM if job.momentum != 0 else 0)
        total += own.count * size
    return total


def entry(zero: Any) -> Any:
    """SGD of zero's dtype: a jitted function of the ids of three tuples of arrays, w, dw and v, and the rates.

    The first array must be a base array of zero's dtype. Without momentum v is not looked at. The first `decayed` parameters decay.
    Returns 0, OVERFLOWED, or CHANGED where something is not as `_read` and `_are_apart` want it: nothing has been written then.
    """
    task = task_of(Update, zero, _task)

    @jit(nogil=False)
    def step(w: int, dw: int, v: int, decayed: int, lr: float, momentum: float, decay: float, threads: int) -> int:
        size = size_of(zero)
        job = Update(lr=bits_of(-lr), momentum=bits_of(momentum), decay=bits_of(decay))
        job.parameters.count = length_of(w)
        if length_of(dw) != length_of(w) or (job.momentum != 0 and length_of(v) != length_of(w)) or not make_room(job.parameters):
            return CHANGED
        total = _prepare(job, w, dw, v, decayed, size)
        if total >= 0:
            shared = total > SHARED_BYTES
            job.parameters.run = RUN_BYTES // size if shared else max(total // size, 1)
            tasks = number_tasks(job.parameters)
            parallel_for_without_gil(total > QUICK_BYTES, c_address(task), address_of(job), tasks, threads if shared else 1)
        give_back(job.parameters)
        return total if total < 0 else OVERFLOWED * job.overflow.value

    return step
