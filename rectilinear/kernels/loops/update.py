"""The update of parameters along their gradients, all parameters of a model in one call.

The arrays are looked at here and not in Python: that one call costs less than a look at the flags of one array does there. Whatever is
unusual is left to the caller, before anything is written.
"""

from __future__ import annotations

from typing import Any

from numba import types

from rectilinear.kernels.loops.elementwise import QUICK_BYTES, RUN_BYTES, SHARED_BYTES
from rectilinear.kernels.micro.library import sgd
from rectilinear.kernels.micro.sgd import DECAY, MOMENTUM, SgdOperands
from rectilinear.kernels.runtime.cache import jit, jit_inner
from rectilinear.kernels.runtime.memory import (
    C_ORDER,
    CHANGED,
    F_ORDER,
    WRITEABLE,
    bits_of,
    count_of,
    data_of,
    dtype_of,
    flags_of,
    have_same_shape,
    item_of,
    length_of,
    size_of,
    type_of,
)
from rectilinear.kernels.runtime.native import c_address, external, let_go_of_gil, take_gil_back
from rectilinear.kernels.runtime.records import address_of, at, record
from rectilinear.kernels.runtime.threads import parallel_for

OVERFLOWED = 1
"""What the entry answers where finite values came to be others; all has been moved nevertheless."""

_malloc, _free = external("malloc", 1, types.intp), external("free", 1, types.void)


@record
class Move:
    """One parameter, `count` elements that lie side by side, and the number of its first task."""

    count: int = 0
    w: int = 0
    dw: int = 0
    v: int = 0
    flags: int = 0
    first: int = 0


_MOVE_BYTES: int = Move.layout.size  # type: ignore[attr-defined]


@record
class Word:
    value: int = 0


@record
class Update:
    """The job: `count` moves, one after the other in memory. A task takes `run` elements of one. Rates as in `SgdOperands`."""

    moves: int = 0
    count: int = 0
    run: int = 0
    lr: int = 0
    momentum: int = 0
    decay: int = 0
    overflow: Word = Word()


@jit_inner
def _move_at(job: Update, index: int) -> int:
    return job.moves + index * _MOVE_BYTES


@jit_inner
def _task(zero: Any, index: int, job: Update) -> None:
    last = job.count - 1
    while at(Move, _move_at(job, last)).first > index:
        last -= 1
    move = at(Move, _move_at(job, last))
    done = (index - move.first) * job.run
    start = done * size_of(zero)
    sgd(
        zero,
        SgdOperands(
            count=min(job.run, move.count - done),
            w=move.w + start,
            dw=move.dw + start,
            v=move.v + start,
            flags=move.flags,
            lr=job.lr,
            momentum=job.momentum,
            decay=job.decay,
            overflow=address_of(job.overflow),
        ),
    )


@jit_inner
def _is_kin(array: int, like: int) -> bool:
    """Whether a Python object is a base array of the dtype of `like`, which is known to be one."""
    return type_of(array) == type_of(like) and dtype_of(array) == dtype_of(like)


@jit_inner
def _read(move: Move, w: int, dw: int, v: int, like: int) -> bool:
    """Write where the arrays of a parameter lie into `move`; whether they are as a kernel wants them. v may be 0: no array."""
    if not (_is_kin(w, like) and _is_kin(dw, like) and have_same_shape(dw, w) and flags_of(w) & WRITEABLE != 0):
        return False
    order = flags_of(w) & flags_of(dw) & (C_ORDER | F_ORDER)
    if v != 0:
        if not (_is_kin(v, like) and have_same_shape(v, w) and flags_of(v) & WRITEABLE != 0):
            return False
        order &= flags_of(v)
    move.count, move.w, move.dw, move.v = count_of(w), data_of(w), data_of(dw), 0 if v == 0 else data_of(v)
    return order != 0


@jit_inner
def _meet(a: int, a_bytes: int, b: int, b_bytes: int) -> bool:
    return a != 0 and b != 0 and a < b + b_bytes and b < a + a_bytes


@jit_inner
def _are_apart(a: Move, b: Move, size: int) -> bool:
    """Whether nothing that is written for a parameter lies where something of another, or another array of its own, lies."""
    n, m = a.count * size, b.count * size
    if _meet(a.w, n, b.dw, m) or _meet(b.w, m, a.dw, n) or _meet(a.v, n, b.dw, m) or _meet(b.v, m, a.dw, n):
        return False
    if _meet(a.v, n, b.w, m) or _meet(b.v, m, a.w, n):
        return False
    return address_of(a) == address_of(b) or not (_meet(a.w, n, b.w, m) or _meet(a.v, n, b.v, m))


@jit_inner
def _prepare(job: Update, w: int, dw: int, v: int, size: int) -> int:
    """Read the arrays in these tuples into the job's moves; the bytes of w, or CHANGED where something is unusual."""
    total, like = 0, item_of(w, 0)
    for i in range(job.count):
        move = at(Move, _move_at(job, i))
        if not _read(move, item_of(w, i), item_of(dw, i), item_of(v, i) if job.momentum != 0 else 0, like):
            return CHANGED
        for j in range(i + 1):
            if not _are_apart(move, at(Move, _move_at(job, j)), size):
                return CHANGED
        total += move.count * size
    return total


@jit_inner
def _share_out(job: Update, decayed: int) -> int:
    """Number the tasks of all moves; returns how many they are."""
    tasks = 0
    for i in range(job.count):
        move = at(Move, _move_at(job, i))
        move.flags = (DECAY if i < decayed and job.decay != 0 else 0) | (MOMENTUM if job.momentum != 0 else 0)
        move.first = tasks
        tasks += -(-move.count // job.run)
    return tasks


def entry(zero: Any) -> Any:
    """SGD of zero's dtype: a jitted function of the ids of three tuples of arrays, w, dw and v, and the rates.

    The first array must be a base array of zero's dtype. Without momentum v is not looked at. The first `decayed` parameters decay.
    Returns 0, OVERFLOWED, or CHANGED where something is not as `_read` and `_are_apart` want it: nothing has been written then.
    """

    @jit_inner
    def task(index: int, address: int, slot: int) -> None:
        _task(zero, index, at(Update, address))

    @jit(nogil=False)
    def step(w: int, dw: int, v: int, decayed: int, lr: float, momentum: float, decay: float, threads: int) -> int:
        size = size_of(zero)
        job = Update(count=length_of(w), lr=bits_of(-lr), momentum=bits_of(momentum), decay=bits_of(decay))
        job.moves = _malloc(job.count * _MOVE_BYTES)
        if job.moves == 0:
            return CHANGED
        total = _prepare(job, w, dw, v, size)
        if total >= 0:
            shared = total > SHARED_BYTES
            job.run = RUN_BYTES // size if shared else max(total // size, 1)
            tasks = _share_out(job, decayed)
            others = let_go_of_gil(total > QUICK_BYTES)
            parallel_for(c_address(task), address_of(job), tasks, threads if shared else 1)
            take_gil_back(others)
        _free(job.moves)
        return total if total < 0 else OVERFLOWED * job.overflow.value

    return step
