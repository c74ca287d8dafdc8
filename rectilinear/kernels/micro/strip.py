"""The generator of strips: C (n, m) = init + A (n, k) B (k, m) for a few rows, with B read along its rows as they lie; or for any number of
rows and a single k.

    for k in range(0, K, STRIP_DEPTH):          so many rows of B at once, each a stream; what is left over one by one
        for i in range(0, n, mr):               from the second on, they are in the cache
            for j in range(0, m, nr):
                C[i, j] += A[i, k] B[k, j]      mr by nr elements

For few rows of A the register tile of `tile` has nothing to use again, and going down a panel of B it touches a page with every k, where
hardware does not look ahead. A strip is that same tile with the loops changed about. Sums are carried on in between, in memory.
"""

from __future__ import annotations

from dataclasses import replace

from llvmlite import ir

from rectilinear.kernels.micro.emit import I1, I64, Tails, Values
from rectilinear.kernels.micro.simd import BITS_PER_BYTE, Simd
from rectilinear.kernels.micro.tile import Tile, TileEmitter
from rectilinear.kernels.runtime.operands import Rows
from rectilinear.kernels.runtime.records import record

STRIP_DEPTH = 8
"""Rows of B taken together."""

STRIP_ROWS = 8
"""Rows of A at most, but for a single k."""


@record
class StripOperands:
    """As a tile's, but for `rows`, those wanted, `columns`, all of them, `a`, which is packed, and `sums`, which holds the chains so far.

    `a` has a single row's elements side by side, and those of a single k; of more rows and k, for each k those of all of them, from one k
    to the next `strip_step`: the last row's stands in all places up to STRIP_ROWS.
    """

    k: int = 0
    rows: int = 0
    columns: int = 0
    a: int = 0
    b: Rows = Rows()
    sums: Rows = Rows()
    c: Rows = Rows()
    bias: int = 0
    flags: int = 0
    bits: Rows = Rows()


def strip_tiles(simd: Simd, itemsize: int) -> tuple[Tile, ...]:
    """The tiles that run along rows, lowest first: for a single row twice as wide as others."""
    _, nv = simd.tile(itemsize)
    heights = [mr for mr in (4, STRIP_ROWS) if mr <= simd.rows(nv)] or [simd.rows(nv)]
    return (Tile(simd, itemsize, 1, 2 * nv), *(Tile(simd, itemsize, mr, nv) for mr in heights))


def strip_step(simd: Simd, itemsize: int) -> int:
    """Elements of packed A for each k, of more rows than one: as many as packing writes."""
    return max(STRIP_ROWS, simd.lanes(itemsize))


def emit_strip(module: ir.Module, tile: Tile, name: str) -> ir.Function:
    """Add ``void name(StripOperands *)`` to `module`, by tiles of mr rows; the one of one row serves a single row, or a single k."""
    return _StripEmitter(module, tile, name, StripOperands).emit()


class _StripEmitter(TileEmitter):
    def run(self) -> None:
        builder, k = self.builder, self.arg["k"]
        self.step = 1 if self.tile.mr == 1 else strip_step(self.simd, self.itemsize)
        whole = builder.and_(k, I64(-STRIP_DEPTH))
        with self.steps(I64(0), whole, STRIP_DEPTH) as first:
            self._strip(first, STRIP_DEPTH)
        with self.steps(whole, k, 1) as first:
            self._strip(first, 1)

    def _strip(self, first: ir.Value, depth: int) -> None:
        """All of C, so many k further. The last one goes to C, the others to the sums."""
        builder, arg = self.builder, self.arg
        self.begins = builder.icmp_signed("==", first, I64(0))
        last = builder.icmp_signed("==", builder.add(first, I64(depth)), arg["k"])
        ends = {"flags": I64(0), "c.data": arg["sums.data"], "c.row": arg["sums.row"]}
        moved = {"a": self.offset(arg["a"], first, self.step * self.itemsize), "b.data": self.row("b", first)}
        self.arg = arg | moved | {name: builder.select(last, arg[name], other) for name, other in ends.items()}
        with self.steps(I64(0), builder.add(arg["rows"], I64(self.tile.mr - 1)), self.tile.mr) as self.first_row:
            self._columns(depth)
        self.arg = arg

    def _columns(self, depth: int) -> None:
        """All panels of a few rows: wide ones, then ones as narrow as a byte of the mask allows, of which the last may have a tail."""
        builder, columns, wide = self.builder, self.arg["columns"], self.tile
        done: ir.Value = I64(0)
        for tile in dict.fromkeys((wide, replace(wide, nv=max(1, BITS_PER_BYTE // wide.lanes)))):
            self.tile, self.whole = tile, [None] * tile.nv
            whole = builder.and_(columns, I64(-tile.nr))
            with self.steps(done, whole, tile.nr) as j:
                self._panel(j, I64(tile.nr), depth, full=True)
            done = whole
        with builder.if_then(builder.icmp_signed("<", done, columns)):
            self._panel(done, builder.sub(columns, done), depth, full=False)
        self.tile, self.whole = wide, [None] * wide.nv

    def _panel(self, j: ir.Value, columns: ir.Value, depth: int, *, full: bool) -> None:
        """The tiles at column j: their arguments are those of the strip, moved on."""
        builder, tile, strip = self.builder, self.tile, self.arg
        at = builder.mul(j, I64(tile.itemsize))
        moved = {name: builder.add(strip[name], at) for name in ("b.data", "sums.data", "c.data", "bias")}
        moved["bias"] = builder.select(builder.icmp_signed("!=", strip["bias"], I64(0)), moved["bias"], I64(0))
        moved["bits.data"] = builder.add(strip["bits.data"], builder.lshr(j, I64(3)))
        self.arg = strip | moved | {"columns": columns}
        self.full, tails = I1(full), self.whole if full else self._tails()
        sums = self.choose(self.begins, self._start, self._chains_so_far)
        for k in range(depth):
            sums = self._add_products(k, sums, tails)
        self._store(self._relu(self._added(sums)))
        self.arg = strip

    def _chains_so_far(self) -> Values:
        def so_far(tails: Tails) -> Values:
            return [value for i in range(self.tile.mr) for value in self._row(self._row_of("sums", i), tails)]

        return self._full_or_tail(so_far)

    def _add_products(self, k: int, sums: Values, tails: Tails) -> Values:
        # A is an operand of the multiply-adds, loaded anew for every panel: for all that LLVM knows C is stored where it lies. Hoisted
        # out of the loop over columns it would be spilled as vectors.
        tile = self.tile
        columns = self._row(self.row("b", k), tails)
        a = self.offset(self.arg["a"], self.first_row, tile.itemsize)
        updated = []
        for i in range(tile.mr):
            broadcast = self.splat(self.load_scalar(self.offset(a, k * self.step + i, tile.itemsize)))
            updated += [self.multiply_add(broadcast, columns[v], sums[i * tile.nv + v]) for v in range(tile.nv)]
        return updated

    # The tile may have more rows than are wanted: the last one is computed once more for each of those.

    def _row_of(self, matrix: str, i: int) -> ir.Value:
        index, last = self.builder.add(self.first_row, I64(i)), self.builder.sub(self.arg["rows"], I64(1))
        return self.row(matrix, self.builder.select(self.builder.icmp_signed("<", index, last), index, last))

    def _c_row(self, i: int) -> ir.Value:
        return self._row_of("c", i)

    def _bits_row(self, i: int) -> ir.Value:
        return self._row_of("bits", i)
