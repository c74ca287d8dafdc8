"""The generator of inner products of rows: C^T[j, i] = bias[i, j] + sum over k of A[i, k] B[j, k].

It is how dx = dz w^T is computed for few rows, and results of few columns: both operands are read along their rows, so that w is not
transposed, and no vector of C is padded. Sums are kept a vector of partial sums for each element, added up at the end in a fixed order.
They come out a few elements of a row of C^T at a time.
"""

from __future__ import annotations

from llvmlite import ir

from rectilinear.kernels.micro.emit import I32, I64, Emitter, Tail, Values, float_vector
from rectilinear.kernels.micro.simd import LINE_BYTES, Simd
from rectilinear.kernels.runtime.operands import Matrix, Rows
from rectilinear.kernels.runtime.records import record


@record
class DotsOperands:
    """`rows` of A and `columns`, rows of B. C^T is written in tiles of whole height: it must have room for `rows` rounded up to
    `DOTS_TALL`. With `adds` not 0 the sums are added to what it holds. `bias` has an element for each of C, most of them the same, or no
    data. Beside a single row of B, rows of A so many bytes `ahead` are prefetched; none where it is 0."""

    k: int = 0
    rows: int = 0
    columns: int = 0
    a: Rows = Rows()
    b: Rows = Rows()
    c: Rows = Rows()
    bias: Matrix = Matrix()
    adds: int = 0
    ahead: int = 0


DOTS_COLUMNS = 3
"""Rows of B taken together."""

DOTS_TALL = 8
"""Rows of A taken together with a single row of B: fewer sums would wait for each other."""

DOTS_LINES = 2
"""Of a row's beginning, what is prefetched: where rows are short hardware has not begun to look ahead when they end."""


def dots_rows(simd: Simd) -> int:
    """Rows of A taken together with two rows of B or DOTS_COLUMNS: as many as the registers can hold sums for."""
    return max(rows for rows in (2, 4, 8) if (rows + 1) * DOTS_COLUMNS + simd.spare <= simd.registers)


def emit_dots(module: ir.Module, simd: Simd, itemsize: int, name: str) -> ir.Function:
    """Add ``void name(DotsOperands *)`` to `module`."""
    return _DotsEmitter(module, simd, itemsize, name).emit()


class _DotsEmitter(Emitter):
    def __init__(self, module: ir.Module, simd: Simd, itemsize: int, name: str) -> None:
        super().__init__(module, simd, name, DotsOperands, float_vector(itemsize, simd.lanes(itemsize)))
        self.together = {columns: dots_rows(simd) if columns > 1 else DOTS_TALL for columns in range(1, DOTS_COLUMNS + 1)}

    def run(self) -> None:
        builder, columns = self.builder, self.arg["columns"]
        whole = builder.mul(builder.udiv(columns, I64(DOTS_COLUMNS)), I64(DOTS_COLUMNS))
        with self.steps(I64(0), whole, DOTS_COLUMNS) as j:
            self._tiles(j, DOTS_COLUMNS)
        for left in range(1, DOTS_COLUMNS):
            with builder.if_then(builder.icmp_signed("==", builder.sub(columns, whole), I64(left))):
                self._tiles(whole, left)

    def _tiles(self, j: ir.Value, columns: int) -> None:
        """All rows of A against so many rows of B, several at a time; the first of these stands for each that A does not have."""
        builder, rows, together = self.builder, self.arg["rows"], self.together[columns]
        with self.steps(I64(0), builder.add(rows, I64(together - 1)), together) as i:
            of_a = [builder.add(i, I64(t)) for t in range(together)]
            of_a = [builder.select(builder.icmp_signed("<", index, rows), index, i) for index in of_a]
            of_b = [builder.add(j, I64(t)) for t in range(columns)]
            start = self.choose(
                builder.icmp_signed("!=", self.arg["bias.data"], I64(0)),
                lambda: [self._bias(row, column) for column in of_b for row in of_a],
                lambda: [self.zero] * (together * columns),
            )
            if columns == 1:
                self._prefetch([builder.add(self.row("a", row), self.arg["ahead"]) for row in of_a])
            sums = self._sum_over_k([self.row("a", row) for row in of_a], [self.row("b", column) for column in of_b], start)
            self._put_tile(i, j, sums, together)

    def _prefetch(self, rows: Values) -> None:
        with self.builder.if_then(self.builder.icmp_signed("!=", self.arg["ahead"], I64(0))):
            for row in rows:
                for line in range(DOTS_LINES):
                    self.prefetch(self.builder.add(row, I64(line * LINE_BYTES)))

    def _bias(self, row: ir.Value, column: ir.Value) -> ir.Value:
        """A vector of it and zeros, with which the chains of one element of C begin."""
        address = self.offset(self.row("bias", row), column, self.arg["bias.column"])
        return self.builder.insert_element(self.zero, self.load_scalar(address), I32(0))

    def _put_tile(self, i: ir.Value, j: ir.Value, sums: Values, rows: int) -> None:
        builder, arg = self.builder, self.arg
        adds = builder.icmp_signed("!=", arg["adds"], I64(0))
        for t in range(len(sums) // rows):
            place = self.offset(self.row("c", builder.add(j, I64(t))), i, self.itemsize)
            for vector in self._added_up(sums[t * rows : (t + 1) * rows]):
                self._put(vector, place, adds)
                place = builder.add(place, I64(vector.type.count * self.itemsize))

    def _put(self, vector: ir.Value, place: ir.Value, adds: ir.Value) -> None:
        """Store a vector of sums, added to what is there or not."""

        def total() -> Values:
            return [self.builder.fadd(self.builder.load(self.pointer(place), align=1, typ=vector.type), vector)]

        (result,) = self.choose(adds, total, lambda: [vector])
        self.builder.store(result, self.pointer(place), align=1)

    def _sum_over_k(self, a: Values, b: Values, start: Values) -> Values:
        builder, lanes = self.builder, self.vector.count
        whole = builder.and_(self.arg["k"], I64(-lanes))
        left = builder.sub(self.arg["k"], whole)
        before = builder.block
        head, body, after = (builder.append_basic_block(name) for name in ("k.head", "k", "k.end"))
        builder.branch(head)
        builder.position_at_end(head)
        at = self.phi(I64(0), before)
        sums = [self.phi(value, before) for value in start]
        builder.cbranch(builder.icmp_signed("<", at, whole), body, after)
        builder.position_at_end(body)
        updated = self._step(a, b, at, sums, None)
        at.add_incoming(builder.add(at, I64(lanes)), body)
        for phi, value in zip(sums, updated, strict=True):
            phi.add_incoming(value, body)
        self.not_unrolled(builder.branch(head))
        builder.position_at_end(after)
        rest = builder.icmp_signed(">", left, I64(0))
        return self.choose(rest, lambda: self._step(a, b, whole, sums, self.first_lanes(left)), lambda: list(sums))

    def _step(self, a: Values, b: Values, at: ir.Value, sums: Values, tail: Tail | None) -> Values:
        """One vector of k; in a tail, what lies beyond the rows' ends is not read and counts as 0."""
        offset = self.builder.mul(at, I64(self.itemsize))
        columns = [self.load(self.builder.add(address, offset), tail) for address in b]
        updated: Values = list(sums)
        for i, address in enumerate(a):
            row = self.load(self.builder.add(address, offset), tail)
            for t, column in enumerate(columns):
                updated[t * len(a) + i] = self.multiply_add(row, column, sums[t * len(a) + i])
        return updated

    def _added_up(self, vectors: Values) -> Values:
        """The sum of the lanes of each vector, in vectors of as many as fit: by halves, two vectors becoming one."""
        lanes = self.vector.count
        while lanes > 1:
            groups = vectors[0].type.count // lanes
            pairs = [vectors[i : i + 2] for i in range(0, len(vectors), 2)]
            taken = groups * len(pairs[0])
            low = [group * lanes + lane for group in range(taken) for lane in range(lanes // 2)]
            high = [index + lanes // 2 for index in low]
            vectors = [self.builder.fadd(self.shuffle(pair[0], pair[-1], low), self.shuffle(pair[0], pair[-1], high)) for pair in pairs]
            lanes //= 2
        return vectors
