"""The generator of ReLU over a run of elements: dst[i] = src[i] where keep[i] is kept, else 0. `keep` is x,
which in the forward is `src` as well.

    for i in range(count):
        dst[i] = 0 if keep[i] < 0 else src[i]

Where the run is too long for the caches it stores past them: a plain store first reads the line that it overwrites, a third of all traffic.
"""

from __future__ import annotations

from llvmlite import ir

from rectilinear.kernels.micro.emit import I32, I64, Emitter, Tail, Values, float_vector
from rectilinear.kernels.micro.simd import Simd
from rectilinear.kernels.runtime.records import record

PAST_CACHES = 1
"""Flag: use non-temporal stores."""

UNROLL = 4


@record
class ReluOperands:
    count: int = 0
    src: int = 0
    keep: int = 0
    dst: int = 0
    flags: int = 0


def emit_relu(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """Add ``void name(ReluOperands *)`` to `module`. dst may be src."""
    return _ReluEmitter(module, simd, name, ReluOperands, float_vector(itemsize, simd.lanes(itemsize))).emit()


class _ReluEmitter(Emitter):
    def run(self) -> None:
        self.choose(self.flag(PAST_CACHES), self._past_caches, lambda: self._run(I64(0), nontemporal=False))

    def _past_caches(self) -> Values:
        """Up to the first aligned vector of dst by itself, then streams."""
        builder, width = self.builder, self.vector.count * self.itemsize
        ahead = builder.and_(builder.neg(self.arg["dst"]), I64(width - 1))
        head = builder.udiv(ahead, I64(self.itemsize))
        shorter = builder.icmp_signed("<", head, self.arg["count"])
        head = builder.select(shorter, head, self.arg["count"])
        self._vector(I64(0), self.first_lanes(head))
        # An address that is no multiple of the element's size never comes to be aligned.
        aligned = builder.icmp_signed("==", builder.urem(ahead, I64(self.itemsize)), I64(0))
        return self.choose(aligned, lambda: self._run(head, nontemporal=True), lambda: self._run(head, nontemporal=False))

    def _run(self, start: ir.Value, *, nontemporal: bool) -> Values:
        for indices, tail in self.vectors(start, self.arg["count"], UNROLL):
            if tail is not None:
                self._vector(indices[0], tail)
            else:
                for value, index in [(self._value(index, None), index) for index in indices]:
                    self._store(value, index, nontemporal)
        return []

    def _value(self, index: ir.Value, tail: Tail | None) -> ir.Value:
        keep = self.keeps(self.load(self.offset(self.arg["keep"], index, self.itemsize), tail))
        return self.builder.select(keep, self.load(self.offset(self.arg["src"], index, self.itemsize), tail), self.zero)

    def _vector(self, index: ir.Value, tail: Tail) -> None:
        self.store(self._value(index, tail), self.offset(self.arg["dst"], index, self.itemsize), tail)

    def _store(self, value: ir.Value, index: ir.Value, nontemporal: bool) -> None:
        pointer = self.pointer(self.offset(self.arg["dst"], index, self.itemsize))
        width = self.vector.count * self.itemsize
        store = self.builder.store(value, pointer, align=width if nontemporal else 1)
        if nontemporal:
            store.set_metadata("nontemporal", self.module.add_metadata([I32(1)]))
