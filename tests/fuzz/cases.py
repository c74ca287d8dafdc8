"""One fuzz case: a call of a public function, all of which follows from its seed and the instruction set.

Every operand, ``out`` and the bits of masks included, lies at the start or the end of memory whose neighbour page may not be touched
(`tests.guard`), in any layout that NumPy can express; so does what NumPy allocates during the call, fresh results and masks. What
lies between the elements of operands is poisoned: NaN in floats. Values are small whole numbers, so that every product is exact in
float32 and any wrong element is a wrong number. A few calls are bad ones, which must raise what is documented and write nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import rectilinear as r
from rectilinear.nn import SGD, ReLU, Sequential
from rectilinear.testing import reference
from tests.fuzz.layouts import Layouts, Operand
from tests.guard import Allocator, Memory

FUNCTIONS = (
    "affine_forward",
    "affine_backward",
    "affine_relu_forward",
    "affine_relu_backward",
    "relu_forward",
    "relu_backward",
    "softmax_loss",
    "sgd_step",
)

BAD_CALLS = 0.08
"""The share of calls that are to be refused."""

SPOILS = {
    "affine_forward": ("out", "shape"),
    "affine_backward": ("out", "shape"),
    "affine_relu_forward": ("out", "shape"),
    "affine_relu_backward": ("out", "shape", "mask", "mask"),
    "relu_forward": ("out",),
    "relu_backward": ("out", "shape", "mask", "mask"),
    "softmax_loss": ("out", "shape", "label"),
    "sgd_step": ("shape", "read-only"),
}
"""What may be wrong with a bad call."""

WORK, MORE_WORK, MOST_WORK = 1 << 16, 1 << 19, 1 << 21
"""Multiply-adds of a call, at most: of most, of one in 10, where a second thread that is awake helps, of one in 50, where one is woken."""

BLOCKS: tuple[dict[str, int], ...] = (
    {},
    {},
    {"kc": 8, "mc": 24},
    {"kc": 8, "mc": 24},
    {"past": 2, "page": 1},
    {"past": 1, "l2": 1},
    {"past": 1000},
    {"l1_ways": 2},
    {"l1_ways": 2, "cores": 1},
)
"""What `host.publish_host` is told: the host's block sizes, block edges at small extents, the ways for long and far memory, x copied, slabs
wherever w is small."""

MIXED = ("f4", "f8", "f2", ">f4", ">f8", "i1", "i8", "?")
"""Dtypes of operands but the first, in one call of 20."""


class Failed(Exception):  # noqa: N818  # it is what the case did
    """What was wrong with the call."""


class Machine(NamedTuple):
    """Who works, and the extents around which its kernels change their ways, by itemsize."""

    backend: str
    extents: dict[int, tuple[int, ...]]
    depths: dict[int, int]


def machine(backend: str) -> Machine:
    if backend != "numba":
        return Machine(backend, {4: (4, 8, 16, 64), 8: (4, 8, 16, 64)}, {4: 256, 8: 256})
    from rectilinear.kernels.loops import host
    from rectilinear.kernels.micro import library
    from rectilinear.kernels.micro.strip import STRIP_ROWS

    unit = library.host_simd()
    extents, depths = {}, {}
    for size in (4, 8):
        mr, nv = unit.tile(size)
        lanes = unit.lanes(size)
        extents[size] = (mr, 2 * mr, lanes, nv * lanes, 2 * nv * lanes, 8 * lanes, STRIP_ROWS, 16)
        depths[size] = host.this_host(size).kc
    return Machine(backend, extents, depths)


class Case:
    """The call that a seed stands for. Making it calls nothing yet."""

    def __init__(self, seed: int, machine: Machine, memory: Memory) -> None:
        memory.take_back_all()
        self.seed, self.machine = seed, machine
        self.random = random.Random(seed)
        choice, chance = self.random.choice, self.random.random
        self.function: str = choice(FUNCTIONS)
        self.dtype = np.dtype(choice(("f4", "f8")))
        self.threads = choice((1, 1, 2))
        self.blocks = choice(BLOCKS)
        self.layouts = Layouts(self.random, memory, plain=chance() < 0.25)
        self.fresh_at_end = chance() < 0.6
        self.mixed, self.voted = chance() < 0.05, False
        roll = chance()
        self.work = MOST_WORK if roll < 0.02 else MORE_WORK if roll < 0.1 else WORK
        self.spoil: str | None = choice(SPOILS[self.function]) if chance() < BAD_CALLS else None
        self.error: type[Exception] | tuple[type[Exception], ...] | None = None
        """What the call has to raise; None for a good one."""
        self.operands: list[Operand] = []
        self.notes: list[str] = []
        self.call: Callable[[], Any]
        self.check: Callable[[Any], None]
        getattr(self, f"_{self.function}")()

    def __str__(self) -> str:
        head = f"{self.function} {self.dtype} backend {self.machine.backend} threads {self.threads} blocks {self.blocks or 'of the host'}"
        wanted = [] if self.error is None else [f"a bad call: {self.spoil}"]
        return "\n    ".join([head, *wanted, *self.notes, *map(str, self.operands)])

    def run(self, allocator: Allocator) -> None:
        """Make the call. Raises `Failed`, or whatever the call should not have raised."""
        self._publish()
        allocator.at_end = self.fresh_at_end
        with r.num_threads(self.threads):
            try:
                with allocator:
                    result = self.call()
            except Exception as error:
                if self.error is None or not isinstance(error, self.error):
                    raise
                for operand in self.operands:
                    operand.result = False
            else:
                if self.error is not None:
                    raise Failed(f"a bad call ({self.spoil}) was accepted")
                self.check(result)
        if not allocator.intact():
            raise Failed("memory beside a fresh array was written to")
        for operand in self.operands:
            if not operand.untouched():
                what = "something beside the result" if operand.result else "an operand that is only read, or a result of a refused call"
                raise Failed(f"memory of {operand.name} changed: {what}")

    def _publish(self) -> None:
        if self.machine.backend == "numba":
            from rectilinear.kernels.loops import host, passes

            passes.prepare[self.dtype.itemsize]
            host.publish_host(self.dtype.itemsize, **self.blocks)

    # ------------------------------------------------------------ extents

    def _extent(self) -> int:
        """0, 1, 2, 3, around a register tile, around kc, long."""
        rng, size = self.random, self.dtype.itemsize
        roll = rng.random() if self.work == WORK else rng.uniform(0.35, 1)
        if roll < 0.45:
            return rng.choice((0, 1, 1, 1, 2, 2, 3, 3, 5, 7))
        if roll < 0.85:
            return max(0, rng.choice(self.machine.extents[size]) + rng.choice((-1, 0, 1)))
        if roll < 0.95:
            kc = self.blocks.get("kc", self.machine.depths[size])
            return kc * rng.choice((1, 1, 2)) + rng.choice((-1, 0, 1))
        return rng.choice((300, 512, 1024, 2048, 4096)) + rng.choice((-1, 0, 1))

    def _extents(self, count: int) -> list[int]:
        """So many, whose product is within this case's work; that of the others where one is 0."""
        extents = [self._extent() for _ in range(count)]
        while math.prod(max(extent, 1) for extent in extents) > self.work:
            extents[extents.index(max(extents))] //= self.random.choice((2, 3, 8))
        return extents

    def _features(self, d: int) -> tuple[int, ...]:
        """Axes whose product is d."""
        rng = self.random
        if rng.random() < 0.7:
            return (d,)
        if d == 1:
            return rng.choice(((), (1, 1), (1, 1, 1)))
        first = rng.choice([q for q in range(1, min(d, 40) + 1) if d % q == 0] or [3])
        return rng.choice(((first, d // first), (d // first, first), (first, 1, d // first)))

    # ------------------------------------------------------------ operands

    def _input(self, name: str, shape: tuple[int, ...], dtype: Any = None, values: Callable[[np.ndarray], np.ndarray] | None = None) -> Any:
        """An operand full of small whole numbers, on which `values` may yet work. Without a dtype of its own it has a say in T."""
        kind = self.dtype if dtype is None else np.dtype(dtype)
        if dtype is None:
            if self.mixed and self.voted:
                kind = np.dtype(self.random.choice(MIXED))
            self.voted = True
            self.dtype = np.dtype(np.result_type(self.dtype, kind).type)
        strides = self.layouts.strides(shape, kind.itemsize, written=False)
        operand = self.layouts.place(name, shape, kind, strides)
        # Along an axis of stride 0 there is one value.
        held = tuple(1 if n > 1 and stride == 0 else n for n, stride in zip(shape, strides, strict=True))
        drawn = self.layouts.values(math.prod(held)).reshape(held)
        operand.hold((drawn if values is None else values(drawn)).astype(kind), held)
        if name != "dout" and self.random.random() < 0.2:
            operand.array.setflags(write=False)
        self.operands.append(operand)
        return operand

    # ------------------------------------------------------------ out

    def _out(self, name: str, shape: tuple[int, ...], among: list[Operand]) -> np.ndarray | None:
        """An ``out`` for such a result, or None; it may be the bad part of a bad call."""
        rng = self.random
        if self.spoil == "out" and self.error is None:
            bad = self._bad_out(name, shape, among)
            if bad is not None:
                return bad
        if rng.random() < 0.4:
            return None
        out = self.layouts.place(name, shape, self.dtype, self.layouts.strides(shape, self.dtype.itemsize, written=True))
        self.operands.append(out)
        return out.array

    def _bad_out(self, name: str, shape: tuple[int, ...], among: list[Operand]) -> np.ndarray | None:
        """One that shares memory with itself or an argument, or has another shape or dtype, or may not be written."""
        rng, size, dtype = self.random, self.dtype.itemsize, self.dtype
        kind = rng.choice(("itself", "itself", "argument", "shape", "dtype", "read-only"))
        self.notes.append(f"bad {name}: {kind}")
        strides = self.layouts.strides(shape, size, written=True)
        longer = [axis for axis, n in enumerate(shape) if n > 1]
        if kind == "itself":
            if not longer or 0 in shape:
                return None
            plain = [math.prod(shape[axis + 1 :]) * size for axis in range(len(shape))]
            axis = rng.choice(longer)
            inner = [other for other in longer if other > axis]
            # The first element of a row is the last, or the second, of the one before, or all rows are one, or elements are half apart.
            steps = [0, size // 2, -(size // 2)]
            if inner:
                steps += [plain[inner[-1]], plain[axis] - plain[inner[-1]], -plain[inner[-1]]]
            plain[axis] = rng.choice(steps)
            strides = tuple(plain)
            self.error = ValueError
        elif kind == "argument":
            others = [other for other in among if other.array.size and other.array.itemsize == size]
            if not others or 0 in shape:
                return None
            other = rng.choice(others)
            made = self._over(other, shape)
            if made is not None:
                self.error = ValueError
            return made
        elif kind == "shape":
            shape = rng.choice(((*shape, 1), (1, *shape), tuple(n + 1 for n in shape), shape[:-1])) if shape else (1,)
            strides = self.layouts.strides(shape, size, written=True)
            self.error = r.ShapeError
        elif kind == "dtype":
            dtype = np.dtype(rng.choice(("f8" if size == 4 else "f4", "i4", ">f4", ">f8")))
            strides = self.layouts.strides(shape, dtype.itemsize, written=True)
            self.error = r.DTypeError
        else:
            self.error = ValueError
        out = self.layouts.place(name, shape, dtype, strides)
        self.operands.append(out)
        if kind == "read-only":
            out.array.setflags(write=False)
        return out.array

    def _over(self, other: Operand, shape: tuple[int, ...]) -> np.ndarray | None:
        """A C-contiguous array whose first element is the first of `other`; None where its memory has no room."""
        size, start = self.dtype.itemsize, other.offset
        if start + math.prod(shape) * size > other.region.bytes.size:
            return None
        return np.ndarray(shape, self.dtype, other.region.bytes, start)

    # ------------------------------------------------------------ checks

    def _same(self, name: str, got: Any, out: np.ndarray | None, values: np.ndarray) -> None:
        """Whether a result is these values, of the right kind, and where it was to go."""
        if type(got) is not np.ndarray or got.dtype != self.dtype or got.shape != values.shape:
            met = f"{type(got).__name__} {getattr(got, 'dtype', '')} {getattr(got, 'shape', '')}"
            raise Failed(f"{name} is {met}, not {self.dtype} {values.shape}")
        if out is not None:
            if got is not out:
                raise Failed(f"{name} is not the array that was given as out")
        elif not got.flags.writeable or any(np.may_share_memory(got, operand.region.bytes) for operand in self.operands):
            raise Failed(f"{name} is not a fresh, writable array")
        if not np.array_equal(got, values):
            wrong = np.argwhere(~np.equal(got, values))
            first = tuple(map(int, wrong[0]))
            raise Failed(f"{name} has {len(wrong)} wrong elements of {got.size}, the first at {first}: {got[first]}, not {values[first]}")

    # ------------------------------------------------------------ affine

    def _affine_operands(self) -> tuple[Operand, Operand, Operand | None, tuple[int, ...]]:
        """x, w, b, and the output's shape."""
        rng = self.random
        groups = rng.choice((0, 1, 1, 2, 2, 3)) if rng.random() < 0.25 else None
        n, d, m = self._extents(3)
        lead: tuple[int, ...] = () if groups is None else (groups,)
        x = self._input("x", (*lead, n, *self._features(d)))
        w = self._input("w", (*lead, d, m))
        b_shape = (*lead, m)
        if self.spoil == "shape" and rng.random() < 0.5:
            b_shape = rng.choice(((*lead, m + 1), (*lead, m, 1), (*lead, 1, m)))
            self.error = r.ShapeError
        b = self._input("b", b_shape) if rng.random() < 0.7 or self.error else None
        return x, w, b, (*lead, n, m)

    def _affine_forward(self, relu: bool = False) -> None:
        x, w, b, shape = self._affine_operands()
        arguments = x.array, w.array, None if b is None else b.array
        out = self._out("out", shape, [operand for operand in (x, w, b) if operand])
        function = r.affine_relu_forward if relu else r.affine_forward
        self.call = lambda: function(*arguments, out=out)

        def check(result: Any) -> None:
            got, cache = result
            z = reference.affine_forward(x.values, w.values, None if b is None else b.values)
            self._same("out", got, out, reference.relu(z) if relu else z)
            if relu:
                cache, keep = cache
                self._same_keep(keep, z)
            if any(kept is not given for kept, given in zip(cache, arguments, strict=True)):
                raise Failed("the cache does not hold the caller's arrays")

        self.check = check

    def _same_keep(self, keep: Any, z: np.ndarray) -> None:
        if not isinstance(keep, r.KeepMask):
            return self._same("z of the cache", keep, None, z)
        bits = np.unpackbits(keep.bits, axis=-1, bitorder="little")
        m = z.shape[-1]
        if keep.shape != z.shape or not np.array_equal(bits[..., :m], z >= 0) or bits[..., m:].any():
            raise Failed("the mask is wrong")
        return None

    def _affine_relu_forward(self) -> None:
        self._affine_forward(relu=True)

    def _affine_backward(self, relu: bool = False) -> None:
        rng = self.random
        x, w, b, shape = self._affine_operands()
        dout_shape = shape
        if self.spoil == "shape" and self.error is None:
            dout_shape = rng.choice(((*shape[:-1], shape[-1] + 1), (*shape, 1), (shape[0] + 1, *shape[1:])))
            self.error = r.ShapeError
        dout = self._input("dout", dout_shape)
        keep, kept = self._relu_cache(shape) if relu else (None, None)
        needs = rng.choice(((True, True, True), tuple(rng.random() < 0.5 for _ in range(3))))
        wanted = (needs[0], needs[1], needs[2] and b is not None)
        among = [operand for operand in self.operands if operand.name != "bits"]
        shapes = (x.array.shape, w.array.shape, () if b is None else b.array.shape)
        outs = tuple(
            self._out(name, of, among) if want else None for name, of, want in zip(("dx", "dw", "db"), shapes, wanted, strict=True)
        )
        given = outs if any(out is not None for out in outs) or rng.random() < 0.2 else None
        cache = x.array, w.array, None if b is None else b.array
        self.notes.append(f"needs {needs}")
        if relu:
            self.call = lambda: r.affine_relu_backward(dout.array, (cache, keep()), needs=needs, out=given)
        else:
            self.call = lambda: r.affine_backward(dout.array, cache, needs=needs, out=given)

        def check(result: Any) -> None:
            dz = dout.values if kept is None else np.where(kept, dout.values, 0)
            right = reference.affine_backward(dz, x.values, w.values)
            for name, got, out, values, want in zip(("dx", "dw", "db"), result, outs, right, wanted, strict=True):
                if want:
                    self._same(name, got, out, values)
                elif got is not None:
                    raise Failed(f"{name} was not wanted")

        self.check = check

    def _affine_relu_backward(self) -> None:
        self._affine_backward(relu=True)

    # ------------------------------------------------------------ ReLU

    def _relu_cache(self, shape: tuple[int, ...]) -> tuple[Callable[[], Any], np.ndarray]:
        """What makes the relu half of a cache, which may be bad, and which elements it keeps."""
        rng = self.random
        masked = len(shape) in (2, 3) and (rng.random() < 0.6 or self.spoil == "mask")
        if not masked:
            z = self._input("z", shape)
            return lambda: z.array, reference.keep(z.values)
        row = -(-shape[-1] // 8)
        bits_shape: tuple[int, ...] = (*shape[:-1], row + rng.choice((0, 0, 0, 1, 3)))
        dtype = "u1"
        if self.spoil == "mask" and self.error is None:
            kind = rng.choice(("short", "rows", "dtype", "axes"))
            if kind == "short" and row > 0:
                bits_shape = (*shape[:-1], rng.randrange(row))
                self.error = ValueError
            elif kind == "rows":
                bits_shape = (*shape[:-2], shape[-2] + rng.choice((1, 2)) if shape[-2] < 2 else shape[-2] - 1, row)
                self.error = ValueError
            elif kind == "dtype":
                dtype = rng.choice(("?", "i1", "u2", "f4"))
                self.error = (ValueError, TypeError)
            elif kind == "axes":
                bits_shape = rng.choice((bits_shape[1:], (1, *bits_shape)))
                self.error = ValueError
            if self.error is not None:
                self.notes.append(f"bad mask: {kind}")

        def clean(drawn: np.ndarray) -> np.ndarray:
            """Bytes of any bits, 0 beyond the last element."""
            if dtype != "u1":
                return drawn
            whole = (drawn.astype(np.int64) * 37 + 111).astype(np.uint8)
            if whole.shape[-1] > 0 and shape[-1] > 0 and whole.shape[-1] > shape[-1] // 8:
                whole[..., row:] = 0
                if shape[-1] % 8 and whole.shape[-1] >= row:
                    whole[..., row - 1] &= (1 << shape[-1] % 8) - 1
            return whole

        bits = self._input("bits", bits_shape, dtype, clean)
        kept = np.zeros(shape, bool)
        if self.error is None:
            kept = np.unpackbits(bits.values.astype(np.uint8), axis=-1, count=shape[-1], bitorder="little").astype(bool)
        return lambda: r.KeepMask(bits.array, shape), kept

    def _relu_shape(self) -> tuple[int, ...]:
        return tuple(self._extents(self.random.choice((0, 1, 2, 2, 2, 3, 4))))

    def _relu_forward(self) -> None:
        x = self._input("x", self._relu_shape())
        out = self._out("out", x.array.shape, [x])
        self.call = lambda: r.relu_forward(x.array, out=out)

        def check(result: Any) -> None:
            got, cache = result
            self._same("out", got, out, reference.relu(x.values))
            if cache is not x.array:
                raise Failed("the cache is not x")

        self.check = check

    def _relu_backward(self) -> None:
        rng = self.random
        shape = self._relu_shape()
        keep, kept = self._relu_cache(shape)
        dout_shape = shape
        if self.spoil == "shape" and self.error is None:
            dout_shape = (*shape, 1) if rng.random() < 0.5 or not shape else (*shape[:-1], shape[-1] + 1)
            self.error = r.ShapeError
        dout = self._input("dout", dout_shape)
        apart = not any(n > 1 and stride == 0 for n, stride in zip(dout.array.shape, dout.array.strides, strict=True))
        if self.spoil is None and dout.array.dtype == self.dtype and apart and rng.random() < 0.2:
            out: np.ndarray | None = dout.array
            self.notes.append("out is dout")
            dout.result = True
        else:
            out = self._out("out", shape, [operand for operand in self.operands if operand.name != "bits"])
        self.call = lambda: r.relu_backward(dout.array, keep(), out=out)
        self.check = lambda got: self._same("dx", got, out, np.where(kept, dout.values, 0))

    # ------------------------------------------------------------ softmax

    def _softmax_loss(self) -> None:
        rng = self.random
        n, c = self._extents(2)
        c = max(c, 1)
        x = self._input("x", (n, c))
        labels = n
        if self.spoil == "shape":
            labels, self.error = n + 1, r.ShapeError
        kind = rng.choice(("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", ">i8"))
        most = min(c, 127 if kind in ("i1", "u1") else 1 << 15)

        def label(drawn: np.ndarray) -> np.ndarray:
            made = (drawn.astype(np.int64) * 7919 + 31337) % most
            if self.spoil == "label" and made.size and kind[-1] in "48":
                made[-1] = rng.choice((c, c + 1000, -1 if kind[-2] == "i" else c, (1 << 31) - 1))
                self.error = ValueError
            return made

        y = self._input("y", (labels,), kind, label)
        out = self._out("dx", (n, c), [x, y])
        self.call = lambda: r.softmax_loss(x.array, y.array, out=out)

        def check(result: Any) -> None:
            loss, dx = result
            if type(loss) is not self.dtype.type:
                raise Failed(f"the loss is a {type(loss).__name__}")
            if n == 0:
                if not np.isnan(loss):
                    raise Failed(f"the loss of nothing is {loss}")
                return self._same("dx", dx, out, np.zeros((0, c)))
            e = np.exp(x.values - x.values.max(axis=1, keepdims=True))
            p = e / e.sum(axis=1, keepdims=True)
            rows, picked = np.arange(n), y.values.astype(np.int64)
            losses = -np.log(p[rows, picked])
            eps = 2 * (c + 16) * float(np.finfo(self.dtype).eps)
            bound = eps * p / n
            p[rows, picked] -= 1
            bound[rows, picked] = eps / n
            wrong = ~(np.abs(dx - p / n) <= bound)
            if wrong.any():
                raise Failed(f"dx has {wrong.sum()} wrong elements of {dx.size}, the first at {tuple(map(int, np.argwhere(wrong)[0]))}")
            if not abs(float(loss) - losses.mean()) <= (eps + n * float(np.finfo(self.dtype).eps)) * (losses.mean() + 1):
                raise Failed(f"the loss is {loss}, not {losses.mean()}")
            return self._same("dx", dx, out, dx)

        self.check = check

    # ------------------------------------------------------------ SGD

    def _written(self, name: str, shape: tuple[int, ...]) -> Operand:
        """An operand of T that the call is to write to, full of small whole numbers."""
        operand = self.layouts.place(name, shape, self.dtype, self.layouts.strides(shape, self.dtype.itemsize, written=True))
        operand.hold(self.layouts.values(math.prod(shape)).reshape(shape).astype(self.dtype), shape)
        operand.result = True
        self.operands.append(operand)
        return operand

    def _sgd_step(self) -> None:
        """Rates are powers of two, so that every move is exact."""
        rng = self.random
        lr, momentum, decay = 0.5, rng.choice((0.0, 0.5)), rng.choice((0.0, 0.25))
        layers = [ReLU() for _ in range(rng.choice((1, 1, 2, 3)))]
        optimizer = SGD(Sequential(layers), lr, momentum, decay)
        moves: list[tuple[str, Operand, Operand, Operand | None]] = []
        for place, layer in enumerate(layers):
            for name in ("w", "b") if rng.random() < 0.7 else ("w",):
                shape = self._relu_shape()
                dw_shape = shape
                if self.spoil == "shape" and self.error is None:
                    dw_shape, self.error = (*shape, 2), r.ShapeError
                dw = self._input(f"d{name}", dw_shape, rng.choice(MIXED) if self.mixed else self.dtype)
                w, v = self._written(name, shape), self._written("v", shape) if momentum else None
                layer.params[name], layer.grads[name] = w.array, dw.array
                if v is not None:
                    optimizer.velocity[f"{place}.{name}"] = v.array
                moves.append((f"{place}.{name}", w, dw, v))
        if self.spoil == "read-only":
            # The first: later, what was worked out would be freed while the error is raised, and the allocator is Python's.
            moves[0][1].array.setflags(write=False)
            self.error = ValueError
        # Warnings are errors here, so that nothing is moved before all is worked out, unless overflows are ignored.
        told = rng.choice(({}, {"over": "ignore", "invalid": "ignore"}, {"over": "ignore", "invalid": "ignore"}))
        self.notes.append(f"momentum {momentum} decay {decay} told {told or 'nothing'}")

        def call() -> None:
            with np.errstate(**told):
                optimizer.step()

        def check(_: Any) -> None:
            for key, w, dw, v in moves:
                move = -lr * (dw.values + (decay * w.values if key.endswith("w") else 0)) + (0 if v is None else momentum * v.values)
                for name, operand, values in (("w", w, w.values + move), ("v", v, move)):
                    if operand is not None and not np.array_equal(operand.array, values):
                        wrong = int((operand.array != values).sum())
                        raise Failed(f"{name} of {key} has {wrong} wrong elements of {operand.array.size}")

        self.call, self.check = call, check
