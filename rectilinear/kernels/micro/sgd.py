"""The generator of a step of stochastic gradient descent over a run of elements; `lr` is given with its sign turned.

for i in range(count):
    move = lr * (decay * w[i] + dw[i])  # without DECAY: lr * dw[i]
    if MOMENTUM:
        move = v[i] = move + momentum * v[i]
    w[i] = w[i] + move

Every product and every sum is rounded by itself, so that the bits are those of the same lines in NumPy; memory bounds it, and fused
multiply-adds would gain nothing. Where something that is not finite came of finite values, the word at `overflow` is set to 1.
"""

from __future__ import annotations

import functools

from llvmlite import ir

from rectilinear.kernels.micro.emit import I64, Emitter, Values, float_vector
from rectilinear.kernels.micro.simd import Simd
from rectilinear.kernels.runtime.records import record

DECAY, MOMENTUM = 1, 2
"""Flags."""

UNROLL = 2
"""Vectors of each operand at a time; with four, AVX2 has too few registers for the check."""


@record
class SgdOperands:
    """`lr`, `momentum` and `decay` are the bits of float64 numbers, which are rounded to T as NumPy rounds Python's floats."""

    count: int = 0
    w: int = 0
    dw: int = 0
    v: int = 0
    flags: int = 0
    lr: int = 0
    momentum: int = 0
    decay: int = 0
    overflow: int = 0


def emit_sgd(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """Add ``void name(SgdOperands *)`` to `module`."""
    return _SgdEmitter(module, simd, name, SgdOperands, float_vector(itemsize, simd.lanes(itemsize))).emit()


class _SgdEmitter(Emitter):
    def run(self) -> None:
        self.lr, self.momentum, self.decay = map(self._rate, ("lr", "momentum", "decay"))

        def with_decay(decay: bool) -> Values:
            return self.choose(self.flag(MOMENTUM), lambda: self._run(decay, True), lambda: self._run(decay, False))

        self.choose(self.flag(DECAY), lambda: with_decay(True), lambda: with_decay(False))

    def _rate(self, name: str) -> ir.Value:
        value = self.builder.bitcast(self.arg[name], ir.DoubleType())
        return self.splat(value if self.itemsize == 8 else self.builder.fptrunc(value, self.vector.element))

    def _run(self, decay: bool, momentum: bool) -> Values:
        builder = self.builder
        names = ("w", "dw", "v") if momentum else ("w", "dw")

        for indices, tail in self.vectors(I64(0), self.arg["count"], UNROLL):
            results, strange = [], []
            for index in indices:
                place = {name: self.offset(self.arg[name], index, self.itemsize) for name in names}
                given = {name: self.load(place[name], tail) for name in names}
                gradient = builder.fadd(builder.fmul(self.decay, given["w"]), given["dw"]) if decay else given["dw"]
                move = builder.fmul(self.lr, gradient)
                if momentum:
                    move = builder.fadd(move, builder.fmul(self.momentum, given["v"]))
                value = builder.fadd(given["w"], move)
                results += [(value, place["w"])] + ([(move, place["v"])] if momentum else [])
                strange.append((self._infinite(value), [self._infinite(x) for x in given.values()]))
            self._look(strange)
            values, addresses = zip(*results, strict=True)
            self.store_all(list(values), list(addresses), tail)
        return []

    def _infinite(self, x: ir.Value) -> ir.Value:
        """0 where x is finite, else NaN."""
        return self.builder.fsub(x, x)

    def _look(self, strange: list[tuple[ir.Value, Values]]) -> None:
        """Set the word at `overflow` if a value is not finite but all that it came of is. Without any such value, a branch not taken."""
        builder = self.builder
        with builder.if_then(self._any(self._is_nan(self._sum([value for value, _ in strange]))), likely=False):
            fresh = [builder.and_(self._is_nan(value), builder.not_(self._is_nan(self._sum(given)))) for value, given in strange]
            with builder.if_then(self._any(functools.reduce(builder.or_, fresh))):
                builder.store_atomic(I64(1), builder.inttoptr(self.arg["overflow"], I64.as_pointer()), "monotonic", 8)

    def _sum(self, values: Values) -> ir.Value:
        return functools.reduce(self.builder.fadd, values)

    def _is_nan(self, x: ir.Value) -> ir.Value:
        return self.builder.fcmp_unordered("uno", x, x)

    def _any(self, mask: ir.Value) -> ir.Value:
        bits = ir.IntType(self.vector.count)
        return self.builder.icmp_unsigned("!=", self.builder.bitcast(mask, bits), bits(0))
