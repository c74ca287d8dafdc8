"""The generator of packing by rows: whole panels of an operand that lies in rows, several side by side.

for k in range(k):
    for p in range(panels):
        dst[p][k, :] = src[k, p * apart : p * apart + width]        (panels `panel` bytes apart, what they are made of `apart` bytes)
"""

from __future__ import annotations

from llvmlite import ir

from rectilinear.kernels.micro.emit import I64, Emitter, float_vector
from rectilinear.kernels.micro.simd import Simd
from rectilinear.kernels.runtime.operands import Rows
from rectilinear.kernels.runtime.records import record


@record
class PanelsOperands:
    k: int = 0
    panels: int = 0
    panel: int = 0
    apart: int = 0
    src: Rows = Rows()
    dst: Rows = Rows()


def emit_panels(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """Add ``void name(PanelsOperands *)`` to `module`, for panels of B, as wide as full tiles."""
    return _PanelsEmitter(module, simd, name, itemsize, simd.tile(itemsize)[1]).emit()


def emit_panels_of_a(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """The same for panels of A, as wide as full tiles are high, padded to whole vectors with what follows in `src`."""
    return _PanelsEmitter(module, simd, name, itemsize, -(-simd.tile(itemsize)[0] // simd.lanes(itemsize))).emit()


class _PanelsEmitter(Emitter):
    def __init__(self, module: ir.Module, simd: Simd, name: str, itemsize: int, width: int) -> None:
        super().__init__(module, simd, name, PanelsOperands, float_vector(itemsize, simd.lanes(itemsize)))
        self.width = width

    def run(self) -> None:
        arg = self.arg
        with self.steps(I64(0), arg["k"], 1) as k:
            src, dst = self.row("src", k), self.row("dst", k)
            with self.steps(I64(0), arg["panels"], 1) as p:
                start, place = self.offset(src, p, arg["apart"]), self.offset(dst, p, arg["panel"])
                step = self.vector.count * self.itemsize
                values = [self.load(self.offset(start, v, step)) for v in range(self.width)]
                for v, value in enumerate(values):
                    self.store(value, self.offset(place, v, step))
