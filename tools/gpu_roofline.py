"""Calculates, without measuring anything, what bounds an affine + ReLU step on an H100-class GPU, and what the own kernels save.

``python tools/gpu_roofline.py`` prints the tables; with ``--write`` they go into docs/gpu.md. Every figure is a model's: bytes and
FLOPs are counted, rates are a data sheet's times an assumed efficiency.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
MARKS = ("<!-- roofline -->\n", "<!-- end of roofline -->\n")


@dataclass(frozen=True)
class Gpu:
    """Rates of an H100 SXM5 (NVIDIA's data sheet, dense, without sparsity), and how much of them is assumed to be reached."""

    memory: float = 3.35e12 * 0.9  # bytes/s; streaming kernels reach about nine tenths
    launch: float = 2e-6  # s, the shortest that a kernel takes
    host_product: float = 12e-6  # s of host time for one cupy.matmul: a guess, tools/gpu_check.py measures it
    host_kernel: float = 6e-6  # s for one RawKernel launch: a guess too


# Elements' bytes, and FLOP/s of a large product: the data sheet's 67 (float32), 494 (TF32), 989 (bfloat16) TFLOP/s, three quarters of it.
TYPES = {"float32": (4, 67e12 * 0.75), "float32 as TF32": (4, 494e12 * 0.75), "bfloat16": (2, 989e12 * 0.75)}

SHAPES = [(256, 256), (256, 1024), (4096, 256), (4096, 1024), (4096, 4096), (65536, 256), (65536, 1024), (65536, 4096)]


@dataclass(frozen=True)
class Pass:
    """What one kernel around the products moves for each element of (n, m): elements, sums (of at least 4 bytes), bytes of masks."""

    name: str
    elements: float
    sums: float = 0
    masks: float = 0

    def bytes(self, size: int) -> float:
        return self.elements * size + self.sums * max(size, 4) + self.masks


# A mask has a bit an element. The bias, the sums over rows and their second stage are smaller by a factor of n or of the block length.
OWN = (
    Pass("bias + ReLU + mask", elements=1, sums=1, masks=1 / 8),
    Pass("select by mask + column sums", elements=2, masks=1 / 8),
)
ROUNDING = Pass("rounding of dx, dw (16-bit types)", elements=1, sums=1)
# One CuPy call each; y > 0 is a byte an element.
PLAIN = (
    Pass("z + b", 2),
    Pass("maximum", 2),
    Pass("y > 0", 1, masks=1),
    Pass("dout * mask", 2, masks=1),
    Pass("sum(axis=0)", 1),
)


def product_seconds(gpu: Gpu, n: int, d: int, m: int, size: int, rate: float) -> float:
    """A product (n, d) (d, m), written as sums: the longer of its arithmetic and its least traffic."""
    moved = (n * d + d * m) * size + n * m * max(size, 4)
    return max(2 * n * d * m / rate, moved / gpu.memory, gpu.launch)


def around_seconds(gpu: Gpu, passes: tuple[Pass, ...], elements: float, size: int) -> float:
    return sum(max(each.bytes(size) * elements / gpu.memory, gpu.launch) for each in passes)


@dataclass(frozen=True)
class Step:
    """Forward and backward of one layer (n, d = m): microseconds, and what bounds it."""

    products: float
    own: float
    plain: float
    host: float

    @property
    def total(self) -> float:
        return self.products + self.own

    @property
    def saved(self) -> float:
        """Of the step with plain CuPy calls."""
        return (self.plain - self.own) / (self.products + self.plain)

    @property
    def left(self) -> float:
        """What an epilogue without any cost could still save."""
        return self.own / self.total

    @property
    def bound(self) -> str:
        if self.host > self.total:
            return "host"
        return "products" if self.products > self.own else "memory"


def step(gpu: Gpu, n: int, m: int, dtype: str) -> Step:
    size, rate = TYPES[dtype]
    products = sum(product_seconds(gpu, *shape, size, rate) for shape in ((n, m, m), (n, m, m), (m, n, m)))
    own, plain = (around_seconds(gpu, passes, n * m, size) for passes in (OWN, PLAIN))
    kernels = len(OWN)
    if size < 4:
        own += around_seconds(gpu, (ROUNDING,), n * m, size) + around_seconds(gpu, (ROUNDING,), m * m, size)
        kernels += 2
    host = 3 * gpu.host_product + kernels * gpu.host_kernel
    return Step(*(1e6 * seconds for seconds in (products, own, plain, host)))


def markdown(gpu: Gpu) -> str:
    lines = ["| kernel or call | bytes an element, float32 | bfloat16 |", "|---|---|---|"]
    for title, passes in (("own", (*OWN, ROUNDING)), ("plain CuPy", PLAIN)):
        for each in passes:
            lines.append(f"| {title}: {each.name} | {0 if each is ROUNDING else each.bytes(4):g} | {each.bytes(2):g} |")
    lines += ["", "| N, D = M | type | products µs | own kernels µs | host µs | bound by | saved of plain CuPy | at most left to save |"]
    lines += ["|---" * 8 + "|"]
    for n, m in SHAPES:
        for dtype in TYPES:
            s = step(gpu, n, m, dtype)
            times = f"{s.products:.0f} | {s.own:.0f} | {s.host:.0f}"
            lines.append(f"| {n}, {m} | {dtype} | {times} | {s.bound} | {100 * s.saved:.0f} % | {100 * s.left:.0f} % |")
    return "\n".join(lines) + "\n"


def document(text: str) -> str:
    """The text of docs/gpu.md with the tables in it."""
    before, _, rest = text.partition(MARKS[0])
    return before + MARKS[0] + markdown(Gpu()) + MARKS[1] + rest.partition(MARKS[1])[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/gpu.md")
    if parser.parse_args().write:
        DOCS.write_text(document(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(markdown(Gpu()))


if __name__ == "__main__":
    main()
