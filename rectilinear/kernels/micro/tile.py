"""The micro-kernel generator: one register tile of a product, as LLVM vector code.

A tile is mr rows by nv vectors of C, held in registers while K runs:

    C[i, j] = init[i, j] + sum over k of A[i, k] B[k, j]

A is read an element at a time and broadcast, through a row and a column stride, so it may lie in rows, in
columns or in a packed block. B is read nv vectors at a time from consecutive columns, with one stride between
the rows of k: a packed panel or the operand itself. `init` is zero, the bias or what C holds, the sum over the earlier blocks of K,
which is added at the end: one chain of multiply-adds all along K would lose digits with its length. The epilogue applies ReLU and
writes the keep-mask bits, from registers, and stores C once; where fewer columns than the tile has are wanted, it touches nothing beyond
them.

All the shapes of a target, widths and dtypes come from the same code here. What is not here: packing, blocking, threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

from rectilinear.kernels.micro.emit import I8, I64, Emitter, Tails, Values, float_vector
from rectilinear.kernels.micro.simd import BITS_PER_BYTE, Simd
from rectilinear.kernels.runtime.operands import Matrix, Rows
from rectilinear.kernels.runtime.records import record

ADD, RELU, BITS = 1, 2, 4
"""Flags: add to what C holds; apply ReLU; write keep-mask bits (with RELU)."""

UNROLLED = 4
"""Accumulators of the tiles that LLVM may unroll: those that wait for their multiply-adds."""

OWN_BASES, ROWS_PER_BASE = 6, 3
"""Up to so many rows of A have a pointer each, to which the loop adds one offset, the same for all; of more, three are addressed from one
pointer, as base + {0, 1, 2} strides: there are 15 registers for addresses.

Pointers are opaque to LLVM. It else finds that each is the one before plus a stride, and adds up one after the other: as many cycles for
every k as there are rows, more than the multiply-adds take (6 x 16 on AVX2 ran at 65 % of the peak, Zen 4)."""


@record
class Steps:
    """Bytes from one tile's operands to the next one's."""

    a: int = 0
    b: int = 0
    c: int = 0
    bias: int = 0
    bits: int = 0
    prefetch: int = 0


@record
class TileOperands:
    """`tiles` tiles, one or more, are computed one after the other, and the record is moved on by `steps` after each. `bias` is 0 where
    there is none. `columns` counts the wanted columns, 1 to nv * lanes. With every k one cache line is prefetched, but by the smallest
    tiles, which loads bound: first the one at `prefetch`, then `prefetch_step` bytes further each time."""

    tiles: int = 0
    k: int = 0
    a: Matrix = Matrix()
    b: Rows = Rows()
    c: Rows = Rows()
    bias: int = 0
    flags: int = 0
    bits: Rows = Rows()
    columns: int = 0
    prefetch: int = 0
    prefetch_step: int = 0
    steps: Steps = Steps()


@dataclass(frozen=True)
class Tile:
    """mr rows by nv vectors. nv is a power of two and nv * lanes a multiple of 8, so that tiles own whole mask bytes."""

    simd: Simd
    itemsize: int
    mr: int
    nv: int

    @property
    def lanes(self) -> int:
        return self.simd.lanes(self.itemsize)

    @property
    def nr(self) -> int:
        return self.nv * self.lanes


def emit_tile(module: ir.Module, tile: Tile, name: str) -> ir.Function:
    """Add the micro-kernel ``void name(TileOperands *)`` to `module`."""
    return TileEmitter(module, tile, name).emit()


class TileEmitter(Emitter):
    def __init__(self, module: ir.Module, tile: Tile, name: str, operands: type = TileOperands) -> None:
        super().__init__(module, tile.simd, name, operands, float_vector(tile.itemsize, tile.lanes))
        self.tile = tile
        self.whole: Tails = [None] * tile.nv
        self.rows_per_base = 1 if tile.mr <= OWN_BASES else ROWS_PER_BASE

    def run(self) -> None:
        with self._tile_after_tile():
            self.full = self.builder.icmp_signed("==", self.arg["columns"], I64(self.tile.nr))
            self._store(self._relu(self._added(self._sum_over_k(self._start()))))

    @contextmanager
    def _tile_after_tile(self) -> Iterator[None]:
        """The loop over tiles: a call for each would cost as much as four steps of k of a tall one.

        The operands are read anew for each tile: kept in registers over the loop they would be spilled, and with them what LLVM computes
        from them.
        """
        builder = self.builder
        body, after = builder.append_basic_block("tile"), builder.append_basic_block("tile.end")
        builder.branch(body)
        builder.position_at_end(body)
        self.arg = arg = self.operands()
        steps = {"tiles": I64(-1), "bias": arg["steps.bias"], "prefetch": arg["steps.prefetch"]}
        steps |= {f"{name}.data": arg[f"steps.{name}"] for name in ("a", "b", "c", "bits")}
        for name, step in steps.items():  # now: if it were written at the end, the next tile would wait for it
            builder.store(builder.add(arg[name], step), self.places[name], align=8)
        yield
        left = builder.load(self.places["tiles"], align=8, typ=I64)
        builder.cbranch(builder.icmp_signed("==", left, I64(0)), after, body)
        builder.position_at_end(after)

    # Start: zero or the bias. End: what C holds is added.

    def _start(self) -> Values:
        tile, bias = self.tile, self.arg["bias"]
        return self.choose(
            self.builder.icmp_signed("!=", bias, I64(0)),
            lambda: self._full_or_tail(lambda tails: self._row(bias, tails) * tile.mr),
            lambda: [self.zero] * (tile.mr * tile.nv),
        )

    def _added(self, sums: Values) -> Values:
        """The sums of this block of K, and of those before it."""

        def add(tails: Tails) -> Values:
            c = [value for i in range(self.tile.mr) for value in self._row(self._c_row(i), tails)]
            return [self.builder.fadd(old, new) for old, new in zip(c, sums, strict=True)]

        return self.choose(self.flag(ADD), lambda: self._full_or_tail(add), lambda: sums)

    def _tails(self) -> Tails:
        return [self.first_lanes(self.builder.sub(self.arg["columns"], I64(v * self.tile.lanes))) for v in range(self.tile.nv)]

    def _row(self, address: ir.Value, tails: Tails) -> Values:
        """nv vectors from `address`; nothing is read beyond their tails."""
        return [self.load(self.offset(address, v, self.simd.width), tail) for v, tail in enumerate(tails)]

    def _c_row(self, i: int) -> ir.Value:
        return self.row("c", i)

    # The inner loop.

    def _sum_over_k(self, start: Values) -> Values:
        # Not unrolled: 28 multiply-adds hide the few address instructions, and two or four steps in one block make
        # LLVM hoist the broadcasts of A and spill accumulators (54 moves for 56 multiply-adds, 14x32 on AVX-512).
        builder, arg = self.builder, self.arg
        first_rows = range(0, self.tile.mr, self.rows_per_base)
        # All of A's pointers move by the same offset where each row has its own, else each by itself.
        moving = [I64(0)] if self.rows_per_base == 1 else [self.row("a", i) for i in first_rows]
        self.bases = [self.opaque(self.row("a", i)) for i in first_rows] if self.rows_per_base == 1 else []
        state = [arg["k"], arg["b.data"], arg["prefetch"], *moving, *start]

        before = builder.block
        body, after = builder.append_basic_block("k"), builder.append_basic_block("k.end")
        builder.cbranch(builder.icmp_signed("==", arg["k"], I64(0)), after, body)
        builder.position_at_end(body)
        current = [self.phi(value, before) for value in state]
        following = self._step(current[:3], current[3 : 3 + len(moving)], current[3 + len(moving) :])
        for phi, value in zip(current, following, strict=True):
            phi.add_incoming(value, body)
        back = builder.cbranch(builder.icmp_signed("==", following[0], I64(0)), after, body)
        if self.tile.mr * self.tile.nv > UNROLLED:
            self.not_unrolled(back)
        builder.position_at_end(after)
        sums = list(zip(state, following, strict=True))[3 + len(moving) :]
        return [self.phi(value, before, updated, body) for value, updated in sums]

    def _step(self, counters: Values, moving: Values, accumulators: Values) -> Values:
        """One rank-1 update of the tile; pointers moved on by one k."""
        builder, tile, arg = self.builder, self.tile, self.arg
        k, b, prefetch = counters
        if tile.mr * tile.nv > tile.mr + tile.nv:  # else loads bound the tile, and this would be one more
            self.prefetch(prefetch)
        columns = self._row(b, self.whole)
        if self.rows_per_base == 1:
            rows = [builder.add(base, moving[0]) for base in self.bases]
        else:
            moving = [self.opaque(base) for base in moving]
            rows = [self.offset(base, i, arg["a.row"]) for base in moving for i in range(self.rows_per_base)]
        updated = []
        for i in range(tile.mr):
            broadcast = self.splat(self.load_scalar(rows[i]))
            if tile.mr * tile.nv > UNROLLED:
                self.in_order()  # with the last row's element loaded early, 6 x 8 of float64 on AVX2 ran at 0.94 of this speed (Zen 3)
            for v in range(tile.nv):
                updated.append(self.multiply_add(broadcast, columns[v], accumulators[i * tile.nv + v]))
        moved = [builder.add(place, arg["a.column"]) for place in moving]
        return [builder.sub(k, I64(1)), builder.add(b, arg["b.row"]), builder.add(prefetch, arg["prefetch_step"]), *moved, *updated]

    # Epilogue.

    def _relu(self, accumulators: Values) -> Values:
        def apply() -> Values:
            keeps = [self.keeps(value) for value in accumulators]
            self._write_bits(keeps)
            return [self.builder.select(keep, value, self.zero) for keep, value in zip(keeps, accumulators, strict=True)]

        return self.choose(self.flag(RELU), apply, lambda: accumulators)

    def _write_bits(self, keeps: Values) -> None:
        nv = self.tile.nv
        rows = [keeps[i : i + nv] for i in range(0, len(keeps), nv)]

        def write() -> Values:
            return self.choose(self.full, lambda: self._write_full_bits(rows), lambda: self._write_tail_bits(rows))

        self.choose(self.flag(BITS), write, list)

    def _bits_of_row(self, keeps: Values) -> Values:
        """The keep bits of one row of the tile, column 0 lowest, in integers of a vector's lanes, or of bytes where it has fewer than 8."""
        joined, lanes = keeps, self.tile.lanes
        while lanes < BITS_PER_BYTE:
            lanes *= 2
            joined = [self.shuffle(joined[i], joined[i + 1], list(range(lanes))) for i in range(0, len(joined), 2)]
        return [self.builder.bitcast(keep, ir.IntType(lanes)) for keep in joined]

    def _bits_row(self, i: int) -> ir.Value:
        return self.row("bits", i)

    def _write_full_bits(self, rows: list[Values]) -> Values:
        for i, row in enumerate(rows):
            for p, piece in enumerate(self._bits_of_row(row)):
                place = self.offset(self._bits_row(i), p, piece.type.width // BITS_PER_BYTE)
                self.builder.store(piece, self.pointer(place), align=1)
        return []

    def _write_tail_bits(self, rows: list[Values]) -> Values:
        """Whole bytes only as far as the wanted columns reach, bits beyond them zero."""
        builder = self.builder
        for t in range(self.tile.nr // BITS_PER_BYTE):
            left = builder.sub(self.arg["columns"], I64(t * BITS_PER_BYTE))
            with builder.if_then(builder.icmp_signed(">", left, I64(0))):
                some = builder.select(builder.icmp_signed("<", left, I64(BITS_PER_BYTE)), left, I64(BITS_PER_BYTE))
                wanted = builder.trunc(builder.sub(builder.shl(I64(1), some), I64(1)), I8)
                for i, row in enumerate(rows):
                    pieces = self._bits_of_row(row)
                    width = pieces[0].type.width
                    piece, shift = pieces[t * BITS_PER_BYTE // width], t * BITS_PER_BYTE % width
                    byte = piece if width == BITS_PER_BYTE else builder.trunc(builder.lshr(piece, piece.type(shift)), I8)
                    place = self.offset(self._bits_row(i), t, 1)
                    builder.store(builder.and_(byte, wanted), self.pointer(place), align=1)
        return []

    def _store(self, accumulators: Values) -> None:
        tile = self.tile

        def store(tails: Tails) -> Values:
            for v, tail in enumerate(tails):
                places = [self.offset(self._c_row(i), v, self.simd.width) for i in range(tile.mr)]
                self.store_all(accumulators[v :: tile.nv], places, tail)
            return []

        self._full_or_tail(store)

    def _full_or_tail(self, make: Callable[[Tails], Values]) -> Values:
        return self.choose(self.full, lambda: make(self.whole), lambda: make(self._tails()))
