"""Generators of the passes over rows that surround a product: copy, mask and sum a block in one go; transpose into panels.

`emit_rows` reads a block of a matrix once and does, as asked: apply a keep-mask (zero where not kept), write the
result to a pack buffer, add its columns to a row of sums. It is how dZ comes to be without ever being a matrix, and
how db is summed in the same pass. `emit_transpose` packs the panel of a transposed operand.
"""

from __future__ import annotations

from llvmlite import ir

from rectilinear.kernels.emit import I8, I64, Emitter, Values, float_vector
from rectilinear.kernels.simd import Simd

KEEP_Z, KEEP_BITS, WRITE, SUM, PAD, AHEAD = 1, 2, 4, 8, 16, 32
"""Flags: mask by pre-activations z, or by keep-mask bits; write to dst; add to sums; write whole vectors, 0 beyond cols; ask
for the rows of src that come next.

AHEAD is for a src that lies in memory: hardware looks ahead along a row, and rows end before it has got far (10^7 elements, rows of
100: 1.46 times as fast, in L2 and L3 0.9 times; Zen 4)."""

ROWS_PARAMETERS = ("rows", "cols", "src", "src_row", "keep", "keep_row", "dst", "dst_row", "sums", "flags")
TRANSPOSE_PARAMETERS = ("k", "columns", "src", "src_row", "dst", "dst_row")

ROW_GROUP = 4
"""Rows taken together: their sum goes to `sums` with one load and store, and the chain of additions is a quarter as long."""


def row_lanes(simd: Simd, itemsize: int) -> int:
    """Elements per step of a row pass: a whole number of keep-mask bytes, also where a register holds fewer."""
    return max(8, simd.lanes(itemsize))


def emit_rows(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """Add ``void name(ROWS_PARAMETERS)`` to `module`; src, z, dst and sums lie with unit stride along the columns."""
    return _RowsEmitter(module, name, ROWS_PARAMETERS, float_vector(itemsize, row_lanes(simd, itemsize))).run()


def emit_transpose(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """Add ``void name(TRANSPOSE_PARAMETERS)``: dst[k, j] = src[j, k] for j < columns, 0 up to a whole vector."""
    emitter = _TransposeEmitter(module, name, TRANSPOSE_PARAMETERS, float_vector(itemsize, simd.lanes(itemsize)))
    return emitter.run()


class _RowsEmitter(Emitter):
    def run(self) -> ir.Function:
        builder, rows = self.builder, self.arg["rows"]
        grouped = builder.and_(rows, I64(-ROW_GROUP))
        with self.steps(I64(0), grouped, ROW_GROUP) as i:
            self._group(i, ROW_GROUP)
        with self.steps(grouped, rows, 1) as i:
            self._group(i, 1)
        builder.ret_void()
        return self.function

    def _group(self, first: ir.Value, count: int) -> None:
        """All columns of `count` rows."""
        builder, cols, lanes = self.builder, self.arg["cols"], self.vector.count
        rows = [builder.add(first, I64(r)) for r in range(count)]
        whole = builder.and_(cols, I64(-lanes))
        with self.steps(I64(0), whole, lanes) as j:
            self._vectors(rows, j, None)
        with builder.if_then(builder.icmp_signed("<", whole, cols)):
            self._vectors(rows, whole, self.lanes_below(builder.sub(cols, whole)))

    def _vectors(self, rows: Values, j: ir.Value, mask: ir.Value | None) -> None:
        arg = self.arg
        at = self.builder.mul(j, I64(self.itemsize))

        def place(matrix: str, row: ir.Value) -> ir.Value:
            return self.offset(self.builder.add(arg[matrix], at), row, arg[f"{matrix}_row"])

        with self.builder.if_then(self.flag(AHEAD)):
            for row in rows:
                self.prefetch(place("src", self.builder.add(row, I64(ROW_GROUP))))
        values = [self.load(place("src", row), mask) for row in rows]
        values = self.choose(
            self.flag(KEEP_Z),
            lambda: self._masked(values, [self.keeps(self.load(place("keep", row), mask)) for row in rows]),
            lambda: self.choose(
                self.flag(KEEP_BITS),
                lambda: self._masked(values, [self._bits(row, j, mask) for row in rows]),
                lambda: values,
            ),
        )
        with self.builder.if_then(self.flag(WRITE)):
            self._write([place("dst", row) for row in rows], values, mask)
        with self.builder.if_then(self.flag(SUM)):
            sums = self.builder.add(arg["sums"], at)
            self.store(self.builder.fadd(self.load(sums, mask), self._tree_sum(values)), sums, mask)

    def _masked(self, values: Values, keeps: Values) -> Values:
        # A select, not a product: where not kept the result is 0 for NaN and inf too.
        return [self.builder.select(keep, value, self.zero) for keep, value in zip(keeps, values, strict=True)]

    def _bits(self, row: ir.Value, j: ir.Value, mask: ir.Value | None) -> ir.Value:
        """The keep-mask of one vector. In a tail only the bytes that hold wanted columns are read."""
        builder, arg, lanes = self.builder, self.arg, self.vector.count
        address = self.offset(builder.add(arg["keep"], builder.lshr(j, I64(3))), row, arg["keep_row"])
        kind = ir.IntType(lanes)
        if mask is None:
            bits = self.load_scalar(address, kind)
        else:
            left = builder.sub(arg["cols"], j)
            bits = kind(0)
            for t in range(lanes // 8):
                byte_at = builder.add(address, I64(t))
                reached = builder.select(builder.icmp_signed(">", left, I64(8 * t)), byte_at, address)
                byte = self.load_scalar(reached, I8)
                wide = byte if lanes == 8 else builder.zext(byte, kind)
                bits = builder.or_(bits, builder.shl(wide, kind(8 * t)))
        return builder.bitcast(bits, ir.VectorType(ir.IntType(1), lanes))

    def _write(self, places: Values, values: Values, mask: ir.Value | None) -> None:
        def write(store_mask: ir.Value | None) -> Values:
            for place, value in zip(places, values, strict=True):
                self.store(value, place, store_mask)
            return []

        if mask is None:
            write(None)
        else:
            self.choose(self.flag(PAD), lambda: write(None), lambda: write(mask))

    def _tree_sum(self, values: Values) -> ir.Value:
        while len(values) > 1:
            values = [self.builder.fadd(values[i], values[i + 1]) for i in range(0, len(values), 2)]
        return values[0]


class _TransposeEmitter(Emitter):
    def run(self) -> ir.Function:
        builder, arg, lanes = self.builder, self.arg, self.vector.count
        groups = builder.and_(builder.add(arg["columns"], I64(lanes - 1)), I64(-lanes))
        whole = builder.and_(arg["k"], I64(-lanes))
        with self.steps(I64(0), groups, lanes) as j:
            with self.steps(I64(0), whole, lanes) as k:
                self._block(j, k, None)
            with builder.if_then(builder.icmp_signed("<", whole, arg["k"])):
                self._block(j, whole, builder.sub(arg["k"], whole))
        builder.ret_void()
        return self.function

    def _block(self, j: ir.Value, k: ir.Value, k_left: ir.Value | None) -> None:
        """One lanes-by-lanes block: rows j of src, columns k on."""
        builder, arg = self.builder, self.arg
        mask = None if k_left is None else self.lanes_below(k_left)
        at = builder.mul(k, I64(self.itemsize))
        rows = []
        for r in range(self.vector.count):
            index = builder.add(j, I64(r))
            inside = builder.icmp_signed("<", index, arg["columns"])
            # Beyond the last column the first is read again and dropped: no branch, and nothing outside is touched.
            address = self.offset(builder.add(arg["src"], at), builder.select(inside, index, I64(0)), arg["src_row"])
            rows.append(builder.select(inside, self.load(address, mask), self.zero))
        columns = self._transposed(rows)
        first = builder.add(self.offset(arg["dst"], k, arg["dst_row"]), builder.mul(j, I64(self.itemsize)))
        for t, column in enumerate(columns):
            place = self.offset(first, t, arg["dst_row"])
            if k_left is None:
                self.store(column, place)
            else:
                with builder.if_then(builder.icmp_signed("<", I64(t), k_left)):
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
