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


def k_block(nr: int, itemsize: int, caches: Caches) -> int:
    """kc: a panel of B, kc by nr, takes two thirds of L1; the rest is for rows of A and C. A multiple of 8."""
    return max(64, caches.l1 * 2 // 3 // (nr * itemsize) // 8 * 8)


def row_block(kc: int, itemsize: int, caches: Caches) -> int:
    """mc: a block of A, mc by kc, takes a quarter of L2, so that the panels of B stream past it."""
    return max(32, caches.l2 // 4 // (kc * itemsize))
