"""The kernel behind `rectilinear.sklearn.update`: a step of scikit-learn's Adam or SGD over all parameters, each array read once.

scikit-learn's optimizers make a fresh array for each operation, a dozen per step, which in small batches takes longer than the passes
through the net. Here a step is

    g = (dw + decay * w) * scale        the gradient of the mean loss with its penalty; intercepts do not decay
    Adam:  m = beta_1 m + (1 - beta_1) g;  v = beta_2 v + (1 - beta_2) g g;  w = w + descent m / (sqrt(v) + epsilon)
    SGD:   v = momentum v + descent g;     w = w + v, with Nesterov's momentum w = w + (momentum v + descent g)
    total = sum of w w over all that decays, for the penalty in the loss of the next batch

`descent` is the learning rate with its sign turned. Every product and sum is rounded by itself, so that the bits are those of the same
lines in NumPy. The arrays are looked at in here, not in Python, and whatever is unusual is left to the caller before anything is written.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from rectilinear.kernels.loops.elementwise import QUICK_BYTES, SHARED_BYTES
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
from rectilinear.kernels.micro.emit import I32, I64, Emitter, Tail, Values, float_vector
from rectilinear.kernels.micro.library import host_simd
from rectilinear.kernels.runtime.cache import jit, jit_inner
from rectilinear.kernels.runtime.fingerprint import digest
from rectilinear.kernels.runtime.linking import Once, by_name, publish
from rectilinear.kernels.runtime.memory import C_ORDER, CHANGED, WRITEABLE, data_of, get, item_of, length_of, put, size_of
from rectilinear.kernels.runtime.native import c_address, external, intrinsic
from rectilinear.kernels.runtime.records import address_of, at, record
from rectilinear.kernels.runtime.threads import parallel_for_without_gil, task_of

RATES = ("decay", "scale", "descent", "momentum", "rest", "second", "second_rest", "epsilon", "total")
"""The float64 numbers that a step is given and, the last one, gives. Adam: momentum is beta_1, second beta_2, the rests 1 - beta."""

_TOTAL = RATES.index("total")

ADAM, NESTEROV, SUM_ALONE, DECAYS = 1, 2, 4, 8
"""Flags. Without ADAM it is SGD, without NESTEROV with plain momentum. SUM_ALONE: only the total of w is wanted. DECAYS is set in here."""

RUN_BYTES = 64 << 10
"""What a task handles of each array: so few sums in float32 for each lane that the total is good to six digits."""

_malloc, _free = external("malloc", 1, types.intp), external("free", 1, types.void)


@record
class RunOperands:
    """A run of `count` elements of one parameter. The sum of squares goes to `total`, a float64; `rates` has those of `RATES`."""

    count: int = 0
    w: int = 0
    dw: int = 0
    m: int = 0
    v: int = 0
    rates: int = 0
    total: int = 0
    flags: int = 0


@record
class Step:
    """The job, `size` bytes of w in all."""

    parameters: Parameters = Parameters()
    size: int = 0
    rates: int = 0
    totals: int = 0


# ---------------------------------------------------------------- the vector code


class _RunEmitter(Emitter):
    def run(self) -> None:
        self.rates = {name: self._rate(index) for index, name in enumerate(RATES[:-1])}
        self.sum = self.builder.alloca(self.vector)
        self.builder.store(self.zero, self.sum)

        def by(adam: bool, nesterov: bool) -> Values:
            return self.choose(self.flag(DECAYS), lambda: self._loop(adam, nesterov, True), lambda: self._loop(adam, nesterov, False))

        def by_flags() -> Values:
            return self.choose(
                self.flag(ADAM),
                lambda: by(True, False),
                lambda: self.choose(self.flag(NESTEROV), lambda: by(False, True), lambda: by(False, False)),
            )

        self.choose(self.flag(SUM_ALONE), self._squares, by_flags)
        lanes = self.builder.load(self.sum, typ=self.vector)
        total = ir.DoubleType()(0.0)
        for lane in range(self.vector.count):
            value = self.builder.extract_element(lanes, I32(lane))
            total = self.builder.fadd(total, value if self.itemsize == 8 else self.builder.fpext(value, ir.DoubleType()))
        self.builder.store(total, self.pointer(self.arg["total"]), align=8)

    def _rate(self, index: int) -> ir.Value:
        value = self.load_scalar(self.offset(self.arg["rates"], index, 8), ir.DoubleType())
        return self.splat(value if self.itemsize == 8 else self.builder.fptrunc(value, self.vector.element))

    def _loop(self, adam: bool, nesterov: bool, decays: bool) -> Values:
        for (index,), tail in self.vectors(I64(0), self.arg["count"]):
            place = {name: self.offset(self.arg[name], index, self.itemsize) for name in ("w", "dw", "m", "v")}
            value = self._moved(place, tail, adam, nesterov, decays)
            if decays:  # lanes beyond the end are 0 in all operands, and stay so
                self._add_square(value)
        return []

    def _squares(self) -> Values:
        for (index,), tail in self.vectors(I64(0), self.arg["count"]):
            self._add_square(self.load(self.offset(self.arg["w"], index, self.itemsize), tail))
        return []

    def _add_square(self, value: ir.Value) -> None:
        total = self.builder.load(self.sum, typ=self.vector)
        self.builder.store(self.builder.fadd(total, self.builder.fmul(value, value)), self.sum)

    def _moved(self, place: dict[str, ir.Value], tail: Tail | None, adam: bool, nesterov: bool, decays: bool) -> ir.Value:
        """Move one vector; its new value."""
        builder, rates = self.builder, self.rates
        w, g, v = (self.load(place[name], tail) for name in ("w", "dw", "v"))
        if decays:
            g = builder.fadd(g, builder.fmul(rates["decay"], w))
        g = builder.fmul(g, rates["scale"])
        if adam:
            m = builder.fadd(builder.fmul(rates["momentum"], self.load(place["m"], tail)), builder.fmul(rates["rest"], g))
            self.store(m, place["m"], tail)
            v = builder.fadd(builder.fmul(rates["second"], v), builder.fmul(rates["second_rest"], builder.fmul(g, g)))
            root = builder.call(self.declare("llvm.sqrt", "", self.vector, [self.vector]), [v])
            move = builder.fdiv(builder.fmul(rates["descent"], m), builder.fadd(root, rates["epsilon"]))
        else:
            down = builder.fmul(rates["descent"], g)
            v = move = builder.fadd(builder.fmul(rates["momentum"], v), down)
            if nesterov:
                move = builder.fadd(builder.fmul(rates["momentum"], v), down)
        value = builder.fadd(w, move)
        self.store(v, place["v"], tail)
        self.store(value, place["w"], tail)
        return value


_run = by_name("rectilinear_sklearn_step")


def _load(itemsize: int) -> None:
    """Compile the vector code of a dtype and publish it."""
    simd = host_simd()
    # Cached by its name, since what is compiled here follows from this file, of which the cache sees jitted functions alone.
    name = f"step.{digest(inspect.getsource(sys.modules[__name__]))[:16]}"

    @intrinsic
    def emit(typingctx):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector = float_vector(itemsize, simd.lanes(itemsize))
            kernel = _RunEmitter(builder.module, simd, name, RunOperands, vector).emit()
            kernel.linkage = "internal"
            return cgutils.pack_array(builder, [builder.ptrtoint(kernel, I64)])

        return types.UniTuple(types.intp, 1)(), codegen

    @jit()
    def addresses() -> Any:
        return emit()

    publish(f"rectilinear_sklearn_step_f{8 * itemsize}", addresses()[0], addresses)


# ---------------------------------------------------------------- the loops around it


@jit_inner
def _task(zero: Any, index: int, job: Step, slot: int) -> None:
    own = at(Parameter, owner_of_task(job.parameters, index))
    done = (index - own.first) * job.parameters.run
    start = done * size_of(zero)
    _run(
        zero,
        RunOperands(
            count=min(job.parameters.run, own.count - done),
            w=own.w + start,
            dw=own.dw + start,
            m=own.m + start,
            v=own.v + start,
            rates=job.rates,
            total=job.totals + 8 * index,
            flags=own.flags,
        ),
    )


@jit_inner
def _prepare(job: Step, w: int, dw: int, m: int, v: int, decayed: int, flags: int, size: int) -> int:
    """Read the arrays in these tuples into the job's parameters; 0, or CHANGED where something is unusual."""
    like, written = item_of(w, 0), C_ORDER | WRITEABLE
    for i in range(job.parameters.count):
        own, array, moment = at(Parameter, parameter(job.parameters, i)), item_of(w, i), item_of(v, i)
        if not (fits(array, like, array, written) and fits(item_of(dw, i), like, array, C_ORDER) and fits(moment, like, array, written)):
            return CHANGED
        read(own, array)
        own.dw, own.v = data_of(item_of(dw, i)), data_of(moment)
        if flags & ADAM != 0:
            if not fits(item_of(m, i), like, array, written):
                return CHANGED
            own.m = data_of(item_of(m, i))
        own.flags = flags | (DECAYS if i < decayed else 0)
        job.size += own.count * size
    return 0


@jit_inner
def _add_up(job: Step, tasks: int) -> None:
    """The tasks' sums in the order of the tasks, whoever ran them."""
    total = 0.0
    for index in range(tasks):
        total += get(0.0, job.totals + 8 * index)
    put(job.rates + 8 * _TOTAL, total)


@Once
def step(itemsize: int) -> Any:
    """The step of a dtype: a jitted function of the ids of four tuples of arrays, w, dw, m and v, the address of the rates, and flags.

    The first array must be a base array of this dtype. No array may lie where another does. `decayed` is how many of the first
    parameters decay. Returns 0, or CHANGED where arrays are not as `_prepare` wants them: nothing has been written then.
    """
    zero = np.dtype(f"f{itemsize}").type(0)
    _load(itemsize)
    task = task_of(Step, zero, _task)

    @jit(nogil=False)
    def take(w: int, dw: int, m: int, v: int, rates: int, decayed: int, flags: int, threads: int) -> int:
        size = size_of(zero)
        job = Step(rates=rates)
        job.parameters.count, job.parameters.run = length_of(w), RUN_BYTES // size
        if length_of(dw) != length_of(w) or length_of(v) != length_of(w) or (flags & ADAM != 0 and length_of(m) != length_of(w)):
            return CHANGED
        if not make_room(job.parameters):
            return CHANGED
        if _prepare(job, w, dw, m, v, decayed, flags, size) == 0:
            tasks = number_tasks(job.parameters)
            job.totals = _malloc(8 * max(tasks, 1))
            if job.totals != 0:
                helpers = threads if job.size > SHARED_BYTES else 1
                parallel_for_without_gil(job.size > QUICK_BYTES, c_address(task), address_of(job), tasks, helpers)
                _add_up(job, tasks)
                _free(job.totals)
        give_back(job.parameters)
        return CHANGED if job.totals == 0 else 0

    return take
