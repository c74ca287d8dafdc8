"""The micro-kernel generator: one register tile of a product, as LLVM vector code.

A tile is mr rows by nv vectors of C, held in registers while K runs:

    C[i, j] = init[i, j] + sum over k of A[i, k] B[k, j]

A is read an element at a time and broadcast, through a row and a column stride, so it may lie in rows, in
columns or in a packed block. B is read nv vectors at a time from consecutive columns, with one stride between
the rows of k: a packed panel or the operand itself. `init` is zero, the bias or what C holds (the earlier blocks of K).
The epilogue applies ReLU and writes the keep-mask bits, from registers, and stores C once; where fewer
columns than the tile has are wanted, it stores those through a mask and touches nothing beyond them.

All the shapes of a target, widths and dtypes come from the same code here. What is not here: packing, blocking, threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from rectilinear.kernels.simd import Simd

I1, I8, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
PTR = ir.PointerType()

ACCUMULATE, RELU, BITS = 1, 2, 4
"""Flags: start from what C holds; apply ReLU; write keep-mask bits (with RELU)."""

ROWS_PER_BASE = 4
"""Rows of A addressed from one pointer, as base + {0, 1, 2, 3} strides: 14 rows need four pointers and three offsets."""

PARAMETERS = ("k", "a", "a_row", "a_col", "b", "b_row", "c", "c_row", "bias", "flags", "bits", "bits_row", "columns")
"""All 64-bit integers; addresses and strides in bytes. `columns` counts the wanted columns, 1 to nv * lanes."""


@dataclass(frozen=True)
class Tile:
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

    @property
    def scalar(self) -> ir.Type:
        return ir.FloatType() if self.itemsize == 4 else ir.DoubleType()

    @property
    def vector(self) -> ir.VectorType:
        return ir.VectorType(self.scalar, self.lanes)

    @property
    def suffix(self) -> str:
        return f"v{self.lanes}f{8 * self.itemsize}"


def emit_tile(module: ir.Module, tile: Tile, name: str) -> ir.Function:
    """Add the micro-kernel ``void name(PARAMETERS)`` to `module`."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * len(PARAMETERS)), name)
    for argument, parameter in zip(function.args, PARAMETERS, strict=True):
        argument.name = parameter
    _Emitter(module, tile, function).run()
    return function


class _Emitter:
    def __init__(self, module: ir.Module, tile: Tile, function: ir.Function) -> None:
        self.module, self.tile, self.function = module, tile, function
        self.arg = dict(zip(PARAMETERS, function.args, strict=True))
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))

    def run(self) -> None:
        builder, tile, arg = self.builder, self.tile, self.arg
        self.full = builder.icmp_signed("==", arg["columns"], I64(tile.nr), name="full")
        self.column_masks = [self._column_mask(v) for v in range(tile.nv)]
        accumulators = self._sum_over_k(self._start())
        accumulators = self._relu(accumulators)
        self._store(accumulators)
        builder.ret_void()

    # Start: zero, bias or C.

    def _start(self) -> list[ir.Value]:
        builder, tile, arg = self.builder, self.tile, self.arg
        zero = ir.Constant(tile.vector, None)
        has_bias = builder.icmp_signed("!=", arg["bias"], I64(0))
        accumulate = self._flag(ACCUMULATE)
        from_zero = [zero] * (tile.mr * tile.nv)

        def bias_rows(masked: bool) -> list[ir.Value]:
            return self._row(arg["bias"], masked) * tile.mr

        def c_rows(masked: bool) -> list[ir.Value]:
            return [value for i in range(tile.mr) for value in self._row(self._c_row(i), masked)]

        def when_not_accumulating() -> list[ir.Value]:
            return self._choose(has_bias, lambda: self._full_or_masked(bias_rows), lambda: from_zero)

        return self._choose(accumulate, lambda: self._full_or_masked(c_rows), when_not_accumulating)

    def _row(self, address: ir.Value, masked: bool) -> list[ir.Value]:
        """nv vectors from `address`; where masked, only the wanted columns are read."""
        tile = self.tile
        return [self._load(address, v, masked) for v in range(tile.nv)]

    def _load(self, address: ir.Value, v: int, masked: bool) -> ir.Value:
        builder, tile = self.builder, self.tile
        pointer = self._pointer(builder.add(address, I64(v * tile.simd.width)))
        if not masked:
            return builder.load(pointer, align=1, typ=tile.vector)
        load = self._declare(
            f"llvm.masked.load.{tile.suffix}.p0", tile.vector, [PTR, I32, ir.VectorType(I1, tile.lanes), tile.vector]
        )
        return builder.call(load, [pointer, I32(1), self.column_masks[v], ir.Constant(tile.vector, None)])

    # The inner loop.

    def _sum_over_k(self, start: list[ir.Value]) -> list[ir.Value]:
        builder, arg = self.builder, self.arg
        bases = [
            builder.add(arg["a"], builder.mul(arg["a_row"], I64(i))) for i in range(0, self.tile.mr, ROWS_PER_BASE)
        ]
        offsets = [builder.mul(arg["a_row"], I64(i)) for i in range(min(ROWS_PER_BASE, self.tile.mr))]
        state = [arg["b"], *bases, *start]
        return self._loop(arg["k"], state, offsets)[1 + len(bases) :]

    def _loop(self, turns: ir.Value, state: list[ir.Value], offsets: list[ir.Value]) -> list[ir.Value]:
        # Not unrolled: 28 multiply-adds hide the few address instructions, and two or four steps in one block make
        # LLVM hoist the broadcasts of A and spill accumulators (54 moves for 56 multiply-adds, 14x32 on AVX-512).
        builder = self.builder
        before = builder.block
        body = builder.append_basic_block("k")
        after = builder.append_basic_block("k.end")
        builder.cbranch(builder.icmp_signed("==", turns, I64(0)), after, body)

        builder.position_at_end(body)
        left = builder.phi(I64)
        left.add_incoming(turns, before)
        current = [self._phi(value, before) for value in state]
        values = self._step(current, offsets)
        next_left = builder.sub(left, I64(1))
        left.add_incoming(next_left, body)
        for phi, value in zip(current, values, strict=True):
            phi.add_incoming(value, body)
        builder.cbranch(builder.icmp_signed("==", next_left, I64(0)), after, body)

        builder.position_at_end(after)
        result = []
        for value, updated in zip(state, values, strict=True):
            phi = self._phi(value, before)
            phi.add_incoming(updated, body)
            result.append(phi)
        return result

    def _step(self, state: list[ir.Value], offsets: list[ir.Value]) -> list[ir.Value]:
        """One rank-1 update of the tile, pointers moved on by one k."""
        builder, tile, arg = self.builder, self.tile, self.arg
        bases_end = 1 + -(-tile.mr // ROWS_PER_BASE)
        b, bases, accumulators = state[0], state[1:bases_end], state[bases_end:]
        columns = self._row(b, masked=False)
        updated = []
        for i in range(tile.mr):
            address = builder.add(bases[i // ROWS_PER_BASE], offsets[i % ROWS_PER_BASE])
            broadcast = self._splat(builder.load(self._pointer(address), align=1, typ=tile.scalar))
            for v in range(tile.nv):
                updated.append(self._multiply_add(broadcast, columns[v], accumulators[i * tile.nv + v]))
        moved = [builder.add(base, arg["a_col"]) for base in bases]
        return [builder.add(b, arg["b_row"]), *moved, *updated]

    def _multiply_add(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        # fmuladd, not fma: where the target has no fused instruction, fma would become one libm call per lane.
        vector = self.tile.vector
        return self.builder.call(
            self._declare(f"llvm.fmuladd.{self.tile.suffix}", vector, [vector, vector, vector]), [x, y, z]
        )

    # Epilogue.

    def _relu(self, accumulators: list[ir.Value]) -> list[ir.Value]:
        """Where not (z < 0) the value itself (NaN and -0.0 included), else +0."""
        builder, tile = self.builder, self.tile
        zero = ir.Constant(tile.vector, None)

        def apply() -> list[ir.Value]:
            # uge: true for NaN as well, the predicate of KeepMask.
            keeps = [builder.fcmp_unordered("uge", value, zero) for value in accumulators]
            self._write_bits(keeps)
            return [builder.select(keep, value, zero) for keep, value in zip(keeps, accumulators, strict=True)]

        return self._choose(self._flag(RELU), apply, lambda: accumulators)

    def _write_bits(self, keeps: list[ir.Value]) -> None:
        builder, tile = self.builder, self.tile

        def write() -> list[ir.Value]:
            rows = [self._bits_of_row(keeps[i * tile.nv : (i + 1) * tile.nv]) for i in range(tile.mr)]
            self._choose(self.full, lambda: self._write_full_bits(rows), lambda: self._write_tail_bits(rows))
            return []

        self._choose(self._flag(BITS), write, list)

    def _bits_of_row(self, keeps: list[ir.Value]) -> ir.Value:
        """The keep bits of one row of the tile as an integer of nr bits, column 0 lowest."""
        builder, lanes = self.builder, self.tile.lanes
        joined = keeps
        while len(joined) > 1:
            indices = ir.Constant(ir.VectorType(I32, 2 * lanes), [I32(i) for i in range(2 * lanes)])
            joined = [builder.shuffle_vector(joined[i], joined[i + 1], indices) for i in range(0, len(joined), 2)]
            lanes *= 2
        return builder.bitcast(joined[0], ir.IntType(self.tile.nr))

    def _bits_row(self, i: int | ir.Value) -> ir.Value:
        index = I64(i) if isinstance(i, int) else i
        return self.builder.add(self.arg["bits"], self.builder.mul(self.arg["bits_row"], index))

    def _write_full_bits(self, rows: list[ir.Value]) -> list[ir.Value]:
        for i, row in enumerate(rows):
            self.builder.store(row, self._pointer(self._bits_row(i)), align=1)
        return []

    def _write_tail_bits(self, rows: list[ir.Value]) -> list[ir.Value]:
        """Whole bytes only as far as the wanted columns reach, bits beyond them zero."""
        builder, tile = self.builder, self.tile
        kind, wide = ir.IntType(tile.nr), ir.IntType(tile.nr + 1)
        resize = builder.trunc if wide.width < 64 else builder.zext
        wanted = builder.trunc(builder.sub(builder.shl(wide(1), resize(self.arg["columns"], wide)), wide(1)), kind)
        for t in range(tile.nr // 8):
            reached = builder.icmp_signed(">", self.arg["columns"], I64(8 * t))
            with builder.if_then(reached):
                for i, row in enumerate(rows):
                    byte = builder.and_(row, wanted)
                    if tile.nr > 8:
                        byte = builder.trunc(builder.lshr(byte, kind(8 * t)), I8)
                    builder.store(byte, self._pointer(builder.add(self._bits_row(i), I64(t))), align=1)
        return []

    def _store(self, accumulators: list[ir.Value]) -> None:
        builder, tile = self.builder, self.tile

        def store(masked: bool) -> list[ir.Value]:
            for i in range(tile.mr):
                row = self._c_row(i)
                for v in range(tile.nv):
                    pointer = self._pointer(builder.add(row, I64(v * tile.simd.width)))
                    self._store_vector(accumulators[i * tile.nv + v], pointer, self.column_masks[v] if masked else None)
            return []

        self._full_or_masked(store)

    def _store_vector(self, value: ir.Value, pointer: ir.Value, mask: ir.Value | None) -> None:
        builder, tile = self.builder, self.tile
        if mask is None:
            builder.store(value, pointer, align=1)
            return
        masked = self._declare(
            f"llvm.masked.store.{tile.suffix}.p0", ir.VoidType(), [tile.vector, PTR, I32, ir.VectorType(I1, tile.lanes)]
        )
        builder.call(masked, [value, pointer, I32(1), mask])

    # Small helpers.

    def _column_mask(self, v: int) -> ir.Value:
        """Which lanes of vector v are wanted columns."""
        builder, tile = self.builder, self.tile
        lanes = ir.VectorType(I32, tile.lanes)
        index = ir.Constant(lanes, [I32(v * tile.lanes + lane) for lane in range(tile.lanes)])
        wanted = self._splat(builder.trunc(self.arg["columns"], I32), lanes)
        return builder.icmp_signed("<", index, wanted)

    def _c_row(self, i: int) -> ir.Value:
        return self.builder.add(self.arg["c"], self.builder.mul(self.arg["c_row"], I64(i)))

    def _flag(self, bit: int) -> ir.Value:
        return self.builder.icmp_signed("!=", self.builder.and_(self.arg["flags"], I64(bit)), I64(0))

    def _pointer(self, address: ir.Value) -> ir.Value:
        return self.builder.inttoptr(address, PTR)

    def _splat(self, value: ir.Value, vector: ir.VectorType | None = None) -> ir.Value:
        vector = vector or self.tile.vector
        single = self.builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
        indices = ir.Constant(ir.VectorType(I32, vector.count), None)
        return self.builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), indices)

    def _phi(self, value: ir.Value, block: ir.Block) -> ir.PhiInstr:
        phi = self.builder.phi(value.type)
        phi.add_incoming(value, block)
        return phi

    def _full_or_masked(self, make) -> list[ir.Value]:  # type: ignore[no-untyped-def]
        return self._choose(self.full, lambda: make(False), lambda: make(True))

    def _choose(self, condition: ir.Value, then, otherwise) -> list[ir.Value]:  # type: ignore[no-untyped-def]
        """Values from one of two emitted branches."""
        builder = self.builder
        with builder.if_else(condition) as (yes, no):
            with yes:
                chosen = then()
                chosen_block = builder.block
            with no:
                other = otherwise()
                other_block = builder.block
        merged = []
        for value, alternative in zip(chosen, other, strict=True):
            phi = self._phi(value, chosen_block)
            phi.add_incoming(alternative, other_block)
            merged.append(phi)
        return merged

    def _declare(self, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
        found = self.module.globals.get(name)
        if found is not None:
            return found
        return ir.Function(self.module, ir.FunctionType(result, arguments), name)
