"""The generator of softmax by rows, with each row's maximum and sum of exponentials, from which the loss is computed.

for i in range(rows):
    top = max(src[i, :])
    total = sum(exp(src[i, :] - top))
    stats[i, :] = top, total
    dst[i, :] = exp(src[i, :] - top) / (total * samples)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from llvmlite import ir

from rectilinear.kernels.micro.emit import I32, I64, Emitter, Tail, float_vector
from rectilinear.kernels.micro.simd import Simd
from rectilinear.kernels.runtime.operands import Rows
from rectilinear.kernels.runtime.records import record


@record
class SoftmaxOperands:
    """`stats` has two elements for each row. `samples` is what the gradient is divided by."""

    rows: int = 0
    columns: int = 0
    src: Rows = Rows()
    dst: Rows = Rows()
    stats: int = 0
    samples: int = 0


def emit_softmax(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """Add ``void name(SoftmaxOperands *)`` to `module`. dst may be src."""
    return _SoftmaxEmitter(module, simd, name, SoftmaxOperands, float_vector(itemsize, simd.lanes(itemsize))).emit()


class _SoftmaxEmitter(Emitter):
    def run(self) -> None:
        builder, arg = self.builder, self.arg
        self.bits = ir.VectorType(ir.IntType(8 * self.itemsize), self.vector.count)
        self.accumulator = builder.alloca(self.vector)
        with self.steps(I64(0), arg["rows"], 1) as i:
            src, dst = self.row("src", i), self.row("dst", i)
            stats = self.offset(arg["stats"], i, 2 * self.itemsize)
            self._row(src, dst, stats)

    def _row(self, src: ir.Value, dst: ir.Value, stats: ir.Value) -> None:
        builder = self.builder
        lowest = self._constant(-math.inf)

        builder.store(lowest, self.accumulator)
        for at, tail in self._vectors():
            value = self.load(builder.add(src, at), tail)
            value = value if tail is None else builder.select(tail.mask, value, lowest)
            best = builder.load(self.accumulator, typ=self.vector)
            builder.store(builder.select(builder.fcmp_ordered(">", value, best), value, best), self.accumulator)
        top = self._reduce(lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))

        builder.store(self.zero, self.accumulator)
        for at, tail in self._vectors():
            value = self._exp(builder.fsub(self.load(builder.add(src, at), tail), self.splat(top)))
            value = value if tail is None else builder.select(tail.mask, value, self.zero)
            self.store(value, builder.add(dst, at), tail)
            builder.store(builder.fadd(builder.load(self.accumulator, typ=self.vector), value), self.accumulator)
        total = self._reduce(builder.fadd)

        builder.store(top, self.pointer(stats), align=1)
        builder.store(total, self.pointer(self.offset(stats, 1, self.itemsize)), align=1)
        samples = builder.sitofp(self.arg["samples"], self.vector.element)
        divisor = self.splat(builder.fmul(total, samples))
        for at, tail in self._vectors():
            place = builder.add(dst, at)
            self.store(builder.fdiv(self.load(place, tail), divisor), place, tail)

    def _vectors(self) -> Iterator[tuple[ir.Value, Tail | None]]:
        """`vectors` of a row, by their offsets in bytes."""
        for (j,), tail in self.vectors(I64(0), self.arg["columns"]):
            yield self.builder.mul(j, I64(self.itemsize)), tail

    def _reduce(self, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """The accumulator's lanes combined, in a tree."""
        lanes = [
            self.builder.extract_element(self.builder.load(self.accumulator, typ=self.vector), I32(i)) for i in range(self.vector.count)
        ]
        while len(lanes) > 1:
            lanes = [combine(lanes[i], lanes[i + 1]) for i in range(0, len(lanes), 2)]
        return lanes[0]

    def _exp(self, x: ir.Value) -> ir.Value:
        """exp of x <= 0: 2**k times a Taylor polynomial of the rest, whose remainder is below a tenth of an ulp."""
        builder, single = self.builder, self.itemsize == 4
        # Below this the result is 0 in any case, and half of k still the exponent of a normal number; NaN stays.
        least = self._constant(-170.0 if single else -800.0)
        x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
        # Adding 1.5 * 2**mantissa rounds to an integer that then sits in the low bits.
        shift = 1.5 * 2.0 ** (23 if single else 52)
        shifted = self.multiply_add(x, self._constant(1 / math.log(2)), self._constant(shift))
        k = builder.fsub(shifted, self._constant(shift))
        high = 0.693359375 if single else 6.93145751953125e-1  # few bits, so that k * high is exact
        low = math.log(2) - high if single else 1.42860682030941723212e-6
        rest = self.multiply_add(k, self._constant(-high), x)
        rest = self.multiply_add(k, self._constant(-low), rest)
        degree = 7 if single else 13
        value = self._constant(1 / math.factorial(degree))
        for power in range(degree - 1, -1, -1):
            value = self.multiply_add(value, rest, self._constant(1 / math.factorial(power)))
        # In two halves, since 2**k alone may be too small for a normal number where the result is not yet 0.
        integer = builder.sub(builder.bitcast(shifted, self.bits), builder.bitcast(self._constant(shift), self.bits))
        half = builder.ashr(integer, self._bits(1))
        return builder.fmul(builder.fmul(value, self._power(half)), self._power(builder.sub(integer, half)))

    def _power(self, k: ir.Value) -> ir.Value:
        """2**k for k in the range of normal numbers."""
        single = self.itemsize == 4
        biased = self.builder.add(k, self._bits(127 if single else 1023))
        return self.builder.bitcast(self.builder.shl(biased, self._bits(23 if single else 52)), self.vector)

    def _constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.vector, [value] * self.vector.count)

    def _bits(self, value: int) -> ir.Constant:
        return ir.Constant(self.bits, [value] * self.vector.count)
