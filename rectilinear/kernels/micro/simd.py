"""What the vector unit of a target can do, as far as the kernel generators need to know.

One `Simd` describes one instruction set: lanes come from its register width, the register tile from how many
registers it has. The generators take it as a parameter, so that a further
instruction set is a further row in `_LEVELS` and never a second copy of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

BITS_PER_BYTE = 8

LINE_BYTES = 64
"""Of a cache line, on every machine meant."""

MAX_ROWS = 15
"""Of a register tile."""


@dataclass(frozen=True)
class Simd:
    """An instruction set: `width` bytes per vector register, `registers` of them, `spare` kept out of the tile; `stores_by_mask` where a
    store of some lanes takes no longer than one of all.

    `spare` holds the broadcast of A and what LLVM needs to move in: found by looking for spills in the inner loop's assembly, which
    tests/test_kernels_simd.py keeps doing.
    """

    name: str
    width: int
    registers: int
    spare: int
    stores_by_mask: bool = False

    def lanes(self, itemsize: int) -> int:
        return self.width // itemsize

    def tile(self, itemsize: int) -> tuple[int, int]:
        """(mr, nv): rows and vectors per row of the full register tile.

        nv is the least count, from two up, whose columns fill whole bytes of keep-mask.
        """
        nv = max(2, BITS_PER_BYTE // self.lanes(itemsize))
        return self.rows(nv), nv

    def rows(self, nv: int) -> int:
        """mr for nv vectors per row: what the registers leave beside nv vectors of B."""
        return max(1, min(MAX_ROWS, (self.registers - nv - self.spare) // nv))


AVX512 = Simd("AVX-512", 64, 32, 2, stores_by_mask=True)
AVX2 = Simd("AVX2", 32, 16, 1)
SSE2 = Simd("SSE2", 16, 16, 2)
NEON = Simd("NEON", 16, 32, 5)

_LEVELS = (
    (AVX512, ("avx512f", "avx512dq", "avx512bw", "avx512vl")),
    (AVX2, ("avx2", "fma")),
)


def of_target(triple: str, features: str) -> Simd:
    """The instruction set of an LLVM target, from its triple and feature string (``"+avx2,-avx512f,..."``).

    Examples
    --------
    >>> of_target("x86_64-unknown-linux-gnu", "+sse2,+avx2,+fma,-avx512f").name
    'AVX2'
    """
    if triple.startswith(("aarch64", "arm64")):
        return NEON
    enabled = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    for simd, needed in _LEVELS:
        if enabled.issuperset(needed):
            return simd
    return SSE2
