"""The generator of the pass over the rows of a matrix that surrounds a product: mask, copy and sum a block in one go.

    for i in range(rows):
        row = src[i, :] where keep says so, else 0          (KEEP_Z, KEEP_BITS)
        dst[i, :] = row                                     (WRITE; padded with 0 to whole vectors: PAD)
        sums[:] += row                                      (SUM)

It is how dz comes to be without ever being a matrix, and how db is summed in the same pass.
"""

from __future__ import annotations

from llvmlite import ir

from rectilinear.kernels.micro.emit import I8, I64, Emitter, Tail, Values, float_vector
from rectilinear.kernels.micro.simd import Simd
from rectilinear.kernels.runtime.operands import Rows
from rectilinear.kernels.runtime.records import record

KEEP_Z, KEEP_BITS, WRITE, SUM, PAD, PREFETCH = 1, 2, 4, 8, 16, 32
"""Flags: mask by pre-activations z, or by keep-mask bits; write to dst; add to sums; write whole vectors, 0 beyond `columns`;
prefetch the rows of src that come next.

PREFETCH is for a src that lies in memory: hardware looks ahead along a row, and rows end before it has got far (10^7 elements, rows of
100: 1.46 times as fast, in L2 and L3 0.9 times; Zen 4)."""


@record
class RowsOperands:
    """`keep` is where z or the bits lie."""

    rows: int = 0
    columns: int = 0
    src: Rows = Rows()
    keep: Rows = Rows()
    dst: Rows = Rows()
    sums: int = 0
    flags: int = 0


ROW_GROUP = 4
"""Rows taken together: their sum goes to `sums` with one load and store, and the chain of additions is a quarter as long."""


def row_lanes(simd: Simd, itemsize: int) -> int:
    """Elements per step of a row pass: a whole number of keep-mask bytes, also where a register holds fewer."""
    return max(8, simd.lanes(itemsize))


def emit_rows(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """Add ``void name(RowsOperands *)`` to `module`; src, z, dst and sums lie with unit stride along the columns."""
    return _RowsEmitter(module, simd, name, RowsOperands, float_vector(itemsize, row_lanes(simd, itemsize))).emit()


class _RowsEmitter(Emitter):
    def run(self) -> None:
        builder, rows = self.builder, self.arg["rows"]
        grouped = builder.and_(rows, I64(-ROW_GROUP))
        with self.steps(I64(0), grouped, ROW_GROUP) as i:
            self._group(i, ROW_GROUP)
        with self.steps(grouped, rows, 1) as i:
            self._group(i, 1)

    def _group(self, first: ir.Value, count: int) -> None:
        """All columns of `count` rows."""
        rows = [self.builder.add(first, I64(r)) for r in range(count)]
        for (j,), tail in self.vectors(I64(0), self.arg["columns"]):
            self._vectors(rows, j, tail)

    def _vectors(self, rows: Values, j: ir.Value, tail: Tail | None) -> None:
        at = self.builder.mul(j, I64(self.itemsize))

        def place(matrix: str, row: ir.Value) -> ir.Value:
            return self.builder.add(self.row(matrix, row), at)

        with self.builder.if_then(self.flag(PREFETCH)):
            for row in rows:
                self.prefetch(place("src", self.builder.add(row, I64(ROW_GROUP))))
        values = [self.load(place("src", row), tail) for row in rows]
        values = self.choose(
            self.flag(KEEP_Z),
            lambda: self._masked(values, [self.keeps(self.load(place("keep", row), tail)) for row in rows]),
            lambda: self.choose(
                self.flag(KEEP_BITS),
                lambda: self._masked(values, [self._bits(row, j, tail) for row in rows]),
                lambda: values,
            ),
        )
        with self.builder.if_then(self.flag(WRITE)):
            self._write([place("dst", row) for row in rows], values, tail)
        with self.builder.if_then(self.flag(SUM)):
            sums = self.builder.add(self.arg["sums"], at)
            self.store(self.builder.fadd(self.load(sums, tail), self._tree_sum(values)), sums, tail)

    def _masked(self, values: Values, keeps: Values) -> Values:
        # A select, not a product: where not kept the result is 0 for NaN and inf too.
        return [self.builder.select(keep, value, self.zero) for keep, value in zip(keeps, values, strict=True)]

    def _bits(self, row: ir.Value, j: ir.Value, tail: Tail | None) -> ir.Value:
        """The keep-mask of one vector. In a tail only the bytes that hold wanted columns are read."""
        builder, arg, lanes = self.builder, self.arg, self.vector.count
        address = builder.add(self.row("keep", row), builder.lshr(j, I64(3)))
        kind = ir.IntType(lanes)
        if tail is None:
            bits = self.load_scalar(address, kind)
        else:
            left = builder.sub(arg["columns"], j)
            bits = kind(0)
            for t in range(lanes // 8):
                byte_at = builder.add(address, I64(t))
                reached = builder.select(builder.icmp_signed(">", left, I64(8 * t)), byte_at, address)
                byte = self.load_scalar(reached, I8)
                wide = byte if lanes == 8 else builder.zext(byte, kind)
                bits = builder.or_(bits, builder.shl(wide, kind(8 * t)))
        return builder.bitcast(bits, ir.VectorType(ir.IntType(1), lanes))

    def _write(self, places: Values, values: Values, tail: Tail | None) -> None:
        if tail is None:
            self.store_all(values, places)
            return
        with self.builder.if_else(self.flag(PAD)) as (padded, not_padded):
            with padded:
                self.store_all(values, places)
            with not_padded:
                self.store_all(values, places, tail)

    def _tree_sum(self, values: Values) -> ir.Value:
        while len(values) > 1:
            values = [self.builder.fadd(values[i], values[i + 1]) for i in range(0, len(values), 2)]
        return values[0]
