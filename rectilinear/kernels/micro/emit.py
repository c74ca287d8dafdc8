"""What the generators of vector code share: LLVM's building blocks in short form, for vectors of one type.

Every emitted kernel is a C function that takes the address of a record of operands (`runtime.records`) and returns nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

from rectilinear.kernels.micro.simd import LINE_BYTES, Simd
from rectilinear.kernels.runtime.records import offsets_of

I1, I8, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
PTR = ir.PointerType()

Values = list[ir.Value]


def float_vector(itemsize: int, lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.FloatType() if itemsize == 4 else ir.DoubleType(), lanes)


@dataclass(frozen=True)
class Tail:
    """The first `count` lanes of a vector, all or none where it is beyond: what a row's last vector has of the row."""

    count: ir.Value
    mask: ir.Value


Tails = list[Tail | None]


class Emitter(ABC):
    """Writes the function ``void name(operands)`` into `module`, where `operands` is the address of a record of that class."""

    def __init__(self, module: ir.Module, simd: Simd, name: str, operands: type, vector: ir.VectorType) -> None:
        self.module, self.simd, self.vector = module, simd, vector
        self.itemsize = 4 if isinstance(vector.element, ir.FloatType) else 8
        self.zero = ir.Constant(vector, None)
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64]), name)
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        (record,) = self.function.args
        self.places = {field: self.pointer(self.offset(record, offset, 1)) for field, offset in offsets_of(operands).items()}
        self.arg = self.operands()

    def emit(self) -> ir.Function:
        self.run()
        self.builder.ret_void()
        return self.function

    @abstractmethod
    def run(self) -> None:
        """Write what the kernel does."""

    def operands(self) -> dict[str, ir.Value]:
        """The fields of the record as they are here."""
        return {field: self.builder.load(place, name=field, align=8, typ=I64) for field, place in self.places.items()}

    # Memory. Nothing is assumed of alignment: on the machines meant, an aligned address is fast by itself.

    def pointer(self, address: ir.Value) -> ir.Value:
        return self.builder.inttoptr(address, PTR)

    def offset(self, address: ir.Value, index: int | ir.Value, stride: int | ir.Value) -> ir.Value:
        """address + index * stride."""
        index = I64(index) if isinstance(index, int) else index
        stride = I64(stride) if isinstance(stride, int) else stride
        return self.builder.add(address, self.builder.mul(index, stride))

    def row(self, matrix: str, index: int | ir.Value) -> ir.Value:
        """Where a row of an operand begins."""
        return self.offset(self.arg[f"{matrix}.data"], index, self.arg[f"{matrix}.row"])

    def opaque(self, value: ir.Value) -> ir.Value:
        """The same integer, of which LLVM knows nothing more: an empty assembler instruction."""
        return self.builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [value], side_effect=False)

    def load(self, address: ir.Value, tail: Tail | None = None) -> ir.Value:
        """A vector from `address`; beyond a tail nothing is read, and lanes are 0."""
        pointer = self.pointer(address)
        if tail is None:
            return self.builder.load(pointer, align=1, typ=self.vector)
        load = self.declare("llvm.masked.load", ".p0", self.vector, [PTR, I32, tail.mask.type, self.vector])
        return self.builder.call(load, [pointer, I32(1), tail.mask, self.zero])

    def store(self, value: ir.Value, address: ir.Value, tail: Tail | None = None) -> None:
        self.store_all([value], [address], tail)

    def store_all(self, values: Values, addresses: Values, tail: Tail | None = None) -> None:
        """Vectors to `addresses`, of which nothing is touched beyond a tail."""
        if tail is None:
            for value, address in zip(values, addresses, strict=True):
                self.builder.store(value, self.pointer(address), align=1)
        elif self.simd.stores_by_mask:
            store = self.declare("llvm.masked.store", ".p0", ir.VoidType(), [self.vector, PTR, I32, tail.mask.type])
            for value, address in zip(values, addresses, strict=True):
                self.builder.call(store, [value, self.pointer(address), I32(1), tail.mask])
        else:
            with self.builder.if_else(self.builder.icmp_signed(">=", tail.count, I64(self.vector.count))) as (whole, part):
                with whole:
                    self.store_all(values, addresses)
                with part, self.builder.if_then(self.builder.icmp_signed(">", tail.count, I64(0))):
                    self._store_by_halves(values, addresses, tail.count)

    def _store_by_halves(self, values: Values, addresses: Values, count: ir.Value) -> None:
        """The first `count` lanes, fewer than all: half a vector, or none, then of what is left half again, down to one lane."""
        # AVX2 has an instruction for it, but AMD's processors take 42 steps for that (uops.info), 20 cycles and more.
        builder, lanes = self.builder, self.vector.count
        while lanes > 1:
            half = lanes // 2
            low, high = ([self.shuffle(value, value, list(part)) for value in values] for part in (range(half), range(half, lanes)))
            wanted = builder.icmp_signed("!=", builder.and_(count, I64(half)), I64(0))
            done = builder.mul(builder.and_(count, I64(-lanes)), I64(self.itemsize))
            with builder.if_then(wanted):
                for value, address in zip(low, addresses, strict=True):
                    builder.store(value, self.pointer(builder.add(address, done)), align=1)
            values = [builder.select(wanted, *rest) for rest in zip(high, low, strict=True)]
            lanes = half

    def load_scalar(self, address: ir.Value, kind: ir.Type | None = None) -> ir.Value:
        return self.builder.load(self.pointer(address), align=1, typ=kind or self.vector.element)

    def prefetch(self, address: ir.Value) -> None:
        """Prefetch a line into L2. Any address will do: none is touched."""
        kind = ir.FunctionType(ir.VoidType(), [PTR, I32, I32, I32])
        found = self.module.globals.get("llvm.prefetch.p0") or ir.Function(self.module, kind, "llvm.prefetch.p0")
        self.builder.call(found, [self.pointer(address), I32(0), I32(2), I32(1)])

    # Vectors.

    def splat(self, value: ir.Value, vector: ir.VectorType | None = None) -> ir.Value:
        vector = vector or self.vector
        undefined = ir.Constant(vector, ir.Undefined)
        single = self.builder.insert_element(undefined, value, I32(0))
        return self.builder.shuffle_vector(single, undefined, ir.Constant(ir.VectorType(I32, vector.count), None))

    def shuffle(self, a: ir.Value, b: ir.Value, indices: list[int]) -> ir.Value:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(indices)), [I32(i) for i in indices]))

    def first_lanes(self, count: ir.Value) -> Tail:
        lanes = ir.VectorType(I32, self.vector.count)
        index = ir.Constant(lanes, [I32(lane) for lane in range(self.vector.count)])
        return Tail(count, self.builder.icmp_signed("<", index, self.splat(self.builder.trunc(count, I32), lanes)))

    def multiply_add(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        # fmuladd, not fma: where the target has no fused instruction, fma would become one libm call per lane.
        return self.builder.call(self.declare("llvm.fmuladd", "", self.vector, [self.vector] * 3), [x, y, z])

    def keeps(self, z: ir.Value) -> ir.Value:
        """not (z < 0), the one predicate of ReLU: true for NaN and -0.0."""
        return self.builder.fcmp_unordered("uge", z, self.zero)

    # Control.

    def flag(self, bit: int) -> ir.Value:
        return self.builder.icmp_signed("!=", self.builder.and_(self.arg["flags"], I64(bit)), I64(0))

    def not_unrolled(self, branch: ir.Instruction) -> None:
        """Mark the loop that `branch` goes back in: LLVM is not to unroll it, as it does for some processors, out of registers then,
        and is to begin it with a cache line."""
        properties = (["llvm.loop.unroll.disable"], ["llvm.loop.align", I32(LINE_BYTES)])
        loop = self.module.add_metadata([self.module.add_metadata(named) for named in properties])
        loop.operands = (loop, *loop.operands)  # LLVM knows loops by metadata that begin with themselves
        branch.set_metadata("llvm.loop", loop)

    def in_order(self) -> None:
        """Loads before this place stay before it, those after it after: an empty assembler instruction that may touch any memory."""
        self.builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)

    def choose(self, condition: ir.Value, then: Callable[[], Values], otherwise: Callable[[], Values]) -> Values:
        """Values from one of two emitted branches."""
        with self.builder.if_else(condition) as (yes, no):
            with yes:
                chosen = then()
                chosen_block = self.builder.block
            with no:
                other = otherwise()
                other_block = self.builder.block
        return [self.phi(value, chosen_block, alternative, other_block) for value, alternative in zip(chosen, other, strict=True)]

    def phi(self, value: ir.Value, block: ir.Block, *more: ir.Value | ir.Block) -> ir.PhiInstr:
        phi = self.builder.phi(value.type)
        phi.add_incoming(value, block)
        if more:
            phi.add_incoming(*more)
        return phi

    @contextmanager
    def steps(self, start: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
        """A loop over start, start + step, ... while a whole step fits below stop."""
        builder = self.builder
        head, body = builder.append_basic_block("head"), builder.append_basic_block("body")
        before = builder.block
        builder.branch(head)
        builder.position_at_end(head)
        index = self.phi(start, before)
        after = builder.append_basic_block("after")
        following = builder.add(index, I64(step))
        builder.cbranch(builder.icmp_signed("<=", following, stop), body, after)
        builder.position_at_end(body)
        yield index
        index.add_incoming(following, builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    def vectors(self, start: ir.Value, stop: ir.Value, unroll: int = 1) -> Iterator[tuple[Values, Tail | None]]:
        """Loops over all elements from start to stop: yields, once for each loop, the indices of `unroll` vectors (a power of two), of a
        single one, and of the one that has a tail."""
        builder, lanes = self.builder, self.vector.count
        for group in dict.fromkeys((unroll, 1)):
            with self.steps(start, stop, group * lanes) as i:
                yield [builder.add(i, I64(v * lanes)) for v in range(group)], None
            start = builder.add(start, builder.and_(builder.sub(stop, start), I64(-group * lanes)))
        with builder.if_then(builder.icmp_signed("<", start, stop)):
            yield [start], self.first_lanes(builder.sub(stop, start))

    def declare(self, name: str, suffix: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
        """LLVM's intrinsic `name` for this emitter's vector type."""
        mangled = f"{name}.v{self.vector.count}f{8 * self.itemsize}{suffix}"
        found = self.module.globals.get(mangled)
        return found or ir.Function(self.module, ir.FunctionType(result, arguments), mangled)
