"""The generator of strips: a few rows of C along all their columns, from a few rows of B that are read as they lie.

For few rows of A and a B that comes from memory: the register tile of `tile` has nothing to use again there, and going
down a panel of B it touches a page with every k, where hardware does not look ahead. A strip is that same tile with
the loops changed about. It takes STRIP_DEPTH values of k at once, each row of B a stream of its own, and moves along
the columns; sums are carried on in between, in memory, and added to C every LONGEST_CHAIN values of k.
"""

from __future__ import annotations

from llvmlite import ir

from rectilinear.kernels.micro.emit import I1, I64, Tails, Values
from rectilinear.kernels.micro.simd import Simd
from rectilinear.kernels.micro.tile import Tile, TileEmitter
from rectilinear.kernels.runtime.operands import Rows
from rectilinear.kernels.runtime.records import record

STRIP_DEPTH = 8
"""Rows of B taken together."""

STRIP_ROWS = 8
"""Rows of A at most. A comes packed, so many elements of it for each k; its last row stands in all places beyond."""

CONTINUE = 8
"""One more flag: start from what `init` holds."""


@record
class StripOperands:
    """As a tile's, but for `rows`, the wanted ones, 1 at least, `a`, which is packed, and `init`: the chains so far."""

    rows: int = 0
    a: int = 0
    b: Rows = Rows()
    init: Rows = Rows()
    c: Rows = Rows()
    bias: int = 0
    flags: int = 0
    bits: Rows = Rows()
    columns: int = 0


def strip_tiles(simd: Simd, itemsize: int) -> tuple[Tile, ...]:
    """The tiles that run along rows, lowest first."""
    _, nv = simd.tile(itemsize)
    return tuple(Tile(simd, itemsize, mr, nv) for mr in (1, 4, STRIP_ROWS) if mr <= simd.rows(nv))


def emit_strip(module: ir.Module, tile: Tile, name: str) -> ir.Function:
    """Add ``void name(StripOperands *)`` to `module`, for up to mr rows."""
    return _StripEmitter(module, tile, name, StripOperands).run()


class _StripEmitter(TileEmitter):
    def run(self) -> ir.Function:
        builder, columns, nr = self.builder, self.arg["columns"], self.tile.nr
        whole = builder.and_(columns, I64(-nr))
        with self.steps(I64(0), whole, nr) as j:
            self._panel(j, I64(nr), full=True)
        with builder.if_then(builder.icmp_signed("<", whole, columns)):
            self._panel(whole, builder.sub(columns, whole), full=False)
        builder.ret_void()
        return self.function

    def _panel(self, j: ir.Value, columns: ir.Value, *, full: bool) -> None:
        """The tile at column j: its arguments are those of the strip, moved on."""
        builder, tile, strip = self.builder, self.tile, self.arg
        at = builder.mul(j, I64(tile.itemsize))
        moved = {name: builder.add(strip[name], at) for name in ("b.data", "init.data", "c.data", "bias")}
        moved["bias"] = builder.select(builder.icmp_signed("!=", strip["bias"], I64(0)), moved["bias"], I64(0))
        moved["bits.data"] = builder.add(strip["bits.data"], builder.lshr(j, I64(3)))
        self.arg = strip | moved | {"columns": columns}
        self.full = I1(full)
        self.tails = self._tails(columns)
        sums = self.choose(self.flag(CONTINUE), self._chains_so_far, self._start)
        for k in range(STRIP_DEPTH):
            sums = self._add_products(k, sums, self.whole if full else self.tails)
        self._store(self._relu(self._added(sums)))
        self.arg = strip

    def _chains_so_far(self) -> Values:
        def init(tails: Tails) -> Values:
            return [value for i in range(self.tile.mr) for value in self._row(self._row_of("init", i), tails)]

        return self._full_or_tail(init)

    def _add_products(self, k: int, sums: Values, tails: Tails) -> Values:
        # A is an operand of the multiply-adds, loaded anew for every panel: for all that LLVM knows C is stored where it lies. Hoisted
        # out of the loop over columns it would be spilled as vectors.
        tile, arg = self.tile, self.arg
        columns = self._row(self.row("b", k), tails)
        updated = []
        for i in range(tile.mr):
            broadcast = self.splat(self.load_scalar(self.offset(arg["a"], k * STRIP_ROWS + i, tile.itemsize)))
            updated += [self.multiply_add(broadcast, columns[v], sums[i * tile.nv + v]) for v in range(tile.nv)]
        return updated

    # The tile may have more rows than are wanted: the last one is computed once more for each of those.

    def _row_of(self, matrix: str, i: int) -> ir.Value:
        last = self.builder.sub(self.arg["rows"], I64(1))
        index = self.builder.select(self.builder.icmp_signed("<", I64(i), last), I64(i), last)
        return self.row(matrix, index)

    def _c_row(self, i: int) -> ir.Value:
        return self._row_of("c", i)

    def _bits_row(self, i: int) -> ir.Value:
        return self._row_of("bits", i)
