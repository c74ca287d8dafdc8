"""The generator of packing by rows: whole panels of an operand that lies in rows, several side by side.

for k in range(k):
    for p in range(panels):
        dst[p][k, :] = src[k, p * nr : (p + 1) * nr]        (panels `panel` bytes apart)
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
    src: Rows = Rows()
    dst: Rows = Rows()


def emit_panels(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """Add ``void name(PanelsOperands *)`` to `module`, for panels as wide as full tiles."""
    return _PanelsEmitter(module, name, PanelsOperands, float_vector(itemsize, simd.lanes(itemsize)), simd.tile(itemsize)[1]).run()


class _PanelsEmitter(Emitter):
    def __init__(self, module: ir.Module, name: str, operands: type, vector: ir.VectorType, width: int) -> None:
        super().__init__(module, name, operands, vector)
        self.width = width

    def run(self) -> ir.Function:
        builder, arg = self.builder, self.arg
        step = self.vector.count * self.itemsize
        with self.steps(I64(0), arg["k"], 1) as k:
            src, dst = self.row("src", k), self.row("dst", k)
            with self.steps(I64(0), arg["panels"], 1) as p:
                place = self.offset(src, p, self.width * step)
                values = [self.load(self.offset(place, v, step)) for v in range(self.width)]
                for v, value in enumerate(values):
                    self.store(value, self.offset(self.offset(dst, p, arg["panel"]), v, step))
        builder.ret_void()
        return self.function
