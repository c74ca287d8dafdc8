"""Generators of the passes that memory bounds: ReLU over a run of elements, softmax over rows.

`emit_relu` writes dst = src where kept, else 0; the keep-set comes from a second run (x for the backward pass, src itself for
the forward). Where the run is too long for the caches it stores past them: a plain store first reads the line that it
overwrites, a third of all traffic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from llvmlite import ir

from rectilinear.kernels.emit import I32, I64, Emitter, Values, float_vector
from rectilinear.kernels.simd import Simd

PAST_CACHES = 1
"""Flag: use non-temporal stores."""

RELU_PARAMETERS = ("count", "src", "keep", "dst", "flags")
SOFTMAX_PARAMETERS = ("rows", "cols", "src", "src_row", "dst", "dst_row", "stats", "samples")

UNROLL = 4


def emit_relu(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """Add ``void name(RELU_PARAMETERS)`` to `module`. dst may be src."""
    return _ReluEmitter(module, name, RELU_PARAMETERS, float_vector(itemsize, simd.lanes(itemsize))).run()


def emit_softmax(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """Add ``void name(SOFTMAX_PARAMETERS)``: dst = softmax(src) / samples by rows, and each row's maximum and sum to stats."""
    return _SoftmaxEmitter(module, name, SOFTMAX_PARAMETERS, float_vector(itemsize, simd.lanes(itemsize))).run()


class _ReluEmitter(Emitter):
    def run(self) -> ir.Function:
        builder = self.builder
        self.choose(self.flag(PAST_CACHES), self._past_caches, lambda: self._run(I64(0), nontemporal=False))
        builder.ret_void()
        return self.function

    def _past_caches(self) -> Values:
        """Up to the first aligned vector of dst by itself, then streams."""
        builder, width = self.builder, self.vector.count * self.itemsize
        ahead = builder.and_(builder.neg(self.arg["dst"]), I64(width - 1))
        head = builder.udiv(ahead, I64(self.itemsize))
        shorter = builder.icmp_signed("<", head, self.arg["count"])
        head = builder.select(shorter, head, self.arg["count"])
        self._vector(I64(0), self.lanes_below(head))
        # An address that is no multiple of the element's size never comes to be aligned.
        aligned = builder.icmp_signed("==", builder.urem(ahead, I64(self.itemsize)), I64(0))
        return self.choose(aligned, lambda: self._run(head, nontemporal=True), lambda: self._run(head, nontemporal=False))

    def _run(self, start: ir.Value, *, nontemporal: bool) -> Values:
        builder, count = self.builder, self.arg["count"]
        done = self._loop(start, UNROLL, nontemporal)
        done = self._loop(done, 1, nontemporal)
        with builder.if_then(builder.icmp_signed("<", done, count)):
            self._vector(done, self.lanes_below(builder.sub(count, done)))
        return []

    def _loop(self, start: ir.Value, vectors: int, nontemporal: bool) -> ir.Value:
        """Whole groups of `vectors` vectors from `start`; returns where it stopped."""
        builder, lanes = self.builder, self.vector.count
        step = vectors * lanes
        with self.steps(start, self.arg["count"], step) as i:
            values = [self._value(builder.add(i, I64(v * lanes)), None) for v in range(vectors)]
            for v, value in enumerate(values):
                self._store(value, builder.add(i, I64(v * lanes)), nontemporal)
        whole = builder.sdiv(builder.sub(self.arg["count"], start), I64(step))
        return builder.add(start, builder.mul(whole, I64(step)))

    def _value(self, index: ir.Value, mask: ir.Value | None) -> ir.Value:
        keep = self.keeps(self.load(self.offset(self.arg["keep"], index, self.itemsize), mask))
        return self.builder.select(keep, self.load(self.offset(self.arg["src"], index, self.itemsize), mask), self.zero)

    def _vector(self, index: ir.Value, mask: ir.Value) -> None:
        self.store(self._value(index, mask), self.offset(self.arg["dst"], index, self.itemsize), mask)

    def _store(self, value: ir.Value, index: ir.Value, nontemporal: bool) -> None:
        pointer = self.pointer(self.offset(self.arg["dst"], index, self.itemsize))
        width = self.vector.count * self.itemsize
        store = self.builder.store(value, pointer, align=width if nontemporal else 1)
        if nontemporal:
            store.set_metadata("nontemporal", self.module.add_metadata([I32(1)]))


class _SoftmaxEmitter(Emitter):
    def run(self) -> ir.Function:
        builder, arg = self.builder, self.arg
        self.bits = ir.VectorType(ir.IntType(8 * self.itemsize), self.vector.count)
        self.accumulator = builder.alloca(self.vector)
        with self.steps(I64(0), arg["rows"], 1) as i:
            src, dst = self.offset(arg["src"], i, arg["src_row"]), self.offset(arg["dst"], i, arg["dst_row"])
            stats = self.offset(arg["stats"], i, 2 * self.itemsize)
            self._row(src, dst, stats)
        builder.ret_void()
        return self.function

    def _row(self, src: ir.Value, dst: ir.Value, stats: ir.Value) -> None:
        builder = self.builder
        lowest = self._constant(-math.inf)

        builder.store(lowest, self.accumulator)
        for at, mask in self._vectors():
            value = self.load(builder.add(src, at), mask)
            value = value if mask is None else builder.select(mask, value, lowest)
            best = builder.load(self.accumulator, typ=self.vector)
            builder.store(builder.select(builder.fcmp_ordered(">", value, best), value, best), self.accumulator)
        top = self._reduce(lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))

        builder.store(self.zero, self.accumulator)
        for at, mask in self._vectors():
            value = self._exp(builder.fsub(self.load(builder.add(src, at), mask), self.splat(top)))
            value = value if mask is None else builder.select(mask, value, self.zero)
            self.store(value, builder.add(dst, at), mask)
            builder.store(builder.fadd(builder.load(self.accumulator, typ=self.vector), value), self.accumulator)
        total = self._reduce(builder.fadd)

        builder.store(top, self.pointer(stats), align=1)
        builder.store(total, self.pointer(self.offset(stats, 1, self.itemsize)), align=1)
        samples = builder.sitofp(self.arg["samples"], self.vector.element)
        divisor = self.splat(builder.fmul(total, samples))
        for at, mask in self._vectors():
            place = builder.add(dst, at)
            self.store(builder.fdiv(self.load(place, mask), divisor), place, mask)

    def _vectors(self) -> Iterator[tuple[ir.Value, ir.Value | None]]:
        """Emits one row's loop over whole vectors, then its tail: yields offset in bytes and mask."""
        builder, cols, lanes = self.builder, self.arg["cols"], self.vector.count
        whole = builder.and_(cols, I64(-lanes))
        with self.steps(I64(0), whole, lanes) as j:
            yield builder.mul(j, I64(self.itemsize)), None
        with builder.if_then(builder.icmp_signed("<", whole, cols)):
            yield builder.mul(whole, I64(self.itemsize)), self.lanes_below(builder.sub(cols, whole))

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
