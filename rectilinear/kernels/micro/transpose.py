"""The generator of packing by transposition: a panel of an operand that lies in columns.

for k in range(k):
    dst[k, :columns] = src[:columns, k]                 (padded with 0 to whole vectors)
"""

from __future__ import annotations

from llvmlite import ir

from rectilinear.kernels.micro.emit import I64, Emitter, Tail, Values, float_vector
from rectilinear.kernels.micro.simd import Simd
from rectilinear.kernels.runtime.operands import Rows
from rectilinear.kernels.runtime.records import record


@record
class TransposeOperands:
    k: int = 0
    columns: int = 0
    src: Rows = Rows()
    dst: Rows = Rows()


def emit_transpose(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """Add ``void name(TransposeOperands *)`` to `module`."""
    return _TransposeEmitter(module, simd, name, TransposeOperands, float_vector(itemsize, simd.lanes(itemsize))).emit()


class _TransposeEmitter(Emitter):
    def run(self) -> None:
        builder, arg, lanes = self.builder, self.arg, self.vector.count
        groups = builder.and_(builder.add(arg["columns"], I64(lanes - 1)), I64(-lanes))
        with self.steps(I64(0), groups, lanes) as j:
            for (k,), tail in self.vectors(I64(0), arg["k"]):
                self._block(j, k, tail)

    def _block(self, j: ir.Value, k: ir.Value, tail: Tail | None) -> None:
        """One lanes-by-lanes block: rows j of src, columns k on."""
        builder, arg = self.builder, self.arg
        at = builder.mul(k, I64(self.itemsize))
        rows = []
        for r in range(self.vector.count):
            index = builder.add(j, I64(r))
            inside = builder.icmp_signed("<", index, arg["columns"])
            # Beyond the last column the first is read again and dropped: no branch, and nothing outside is touched.
            address = builder.add(self.row("src", builder.select(inside, index, I64(0))), at)
            rows.append(builder.select(inside, self.load(address, tail), self.zero))
        columns = self._transposed(rows)
        first = builder.add(self.row("dst", k), builder.mul(j, I64(self.itemsize)))
        for t, column in enumerate(columns):
            place = self.offset(first, t, arg["dst.row"])
            if tail is None:
                self.store(column, place)
            else:
                with builder.if_then(builder.icmp_signed("<", I64(t), tail.count)):
                    self.store(column, place)

    def _transposed(self, rows: Values) -> Values:
        """Columns of a square of vectors, by log2(lanes) rounds of interleaving rows that are half the square apart."""
        lanes = self.vector.count
        half = lanes // 2
        low = [index for i in range(half) for index in (i, lanes + i)]
        high = [half + index for index in low]
        for _ in range(lanes.bit_length() - 1):
            rows = [self.shuffle(rows[r], rows[half + r], pattern) for r in range(half) for pattern in (low, high)]
        return rows
