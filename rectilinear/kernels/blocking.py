"""Block sizes of the products, from the caches and the vector unit of the host.

Nothing here depends on the number of threads: the blocks decide the order of summation, and with it the bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Caches:
    """Bytes of data cache by level, per core for l1 and l2."""

    l1: int = 32 << 10
    l2: int = 512 << 10
    l3: int = 8 << 20


def _size(text: str) -> int:
    text = text.strip()
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text)


@cache
def host_caches() -> Caches:
    """What the system says of its caches; where it says nothing, sizes that hardly any machine falls short of."""
    found: dict[str, int] = {}
    for index in sorted(_CACHES.glob("index*")):
        try:
            kind, level = ((index / name).read_text().strip() for name in ("type", "level"))
            if kind in ("Data", "Unified"):
                found[f"l{level}"] = _size((index / "size").read_text())
        except (OSError, ValueError, IndexError):
            continue
    return Caches(**{level: size for level, size in found.items() if level in ("l1", "l2", "l3") and size > 0})


FAR_APART = 4096
"""Bytes between rows of w from which on it is packed into panels if it is used often: each row is on a page of its own."""

MEETING = 2048
"""Rows a multiple of so many bytes apart meet in two sets of L1, where a tile's 14 rows have no room. Such an x is copied a block at a
time before use: 1024^3 went from 83 to 92 % of the peak by it (Zen 5), (100, 3072, 100) took 0.74 times as long (Zen 4), and copying an x
whose rows are as long but do not meet costs more than it gives ((128, 784, 256) in float64: 0.87 times as fast)."""


LONGEST_CHAIN = 1024
"""The most multiply-adds in one chain, whose sum is then added to that of the chains before.

One chain all along K would lose digits with its length, where a BLAS, which adds up blocks, does not: of uniform float32 data the forward
had relative errors of 2e-5 at K = 150,528 and of 1e-2 at 10**7, against 3e-7 and 6e-6 of OpenBLAS.
"""


def k_block(nr: int, itemsize: int, caches: Caches) -> int:
    """kc: a panel of B, kc by nr, takes an eighth of L2.

    Longer than what L1 holds: panels stream from L2 at a fraction of what it delivers, and every further block of K is one more pass
    over C (512 against 256: 1024^3 and up 3 % faster, 512^3 5 %, Zen 5; 1024 against 512: 1024^3 1 to 4 %, 2048^3 2 to 4 %, Zen 4).
    """
    return min(LONGEST_CHAIN, max(64, caches.l2 // 8 // (nr * itemsize) // 8 * 8))


def row_block(kc: int, itemsize: int, caches: Caches) -> int:
    """mc: a block of A, mc by kc, takes seven sixteenths of L2, so that the panels of B stream past it."""
    return max(16, caches.l2 * 7 // 16 // (kc * itemsize))
