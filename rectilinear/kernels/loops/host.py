"""The machine as a plan sees it: vector unit, register tiles, caches, cores. One `Host` for each dtype, published to jitted code."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

import rectilinear
from rectilinear.kernels.loops import tuned
from rectilinear.kernels.loops.tuned import Choices
from rectilinear.kernels.micro.library import host_simd, host_target
from rectilinear.kernels.micro.simd import Simd
from rectilinear.kernels.runtime.fingerprint import digest
from rectilinear.kernels.runtime.linking import publish, record_of
from rectilinear.kernels.runtime.records import record, words_of

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Cache:
    """A data cache: bytes, ways of each set, bytes of a line."""

    size: int
    ways: int
    line: int = 64

    @property
    def sets(self) -> int:
        return max(1, self.size // (self.ways * self.line))


@dataclass(frozen=True)
class Caches:
    """Data caches by level, per core for l1 and l2; where the system says nothing, what hardly any machine falls short of."""

    l1: Cache = Cache(32 << 10, 8)
    l2: Cache = Cache(512 << 10, 8)
    l3: Cache = Cache(8 << 20, 16)


def _size(text: str) -> int:
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text)


@cache
def host_caches() -> Caches:
    """What the system says of its caches."""
    found: dict[str, Cache] = {}
    names = ("type", "level", "size", "ways_of_associativity", "coherency_line_size")
    for index in sorted(_CACHES.glob("index*")):
        try:
            kind, level, *numbers = ((index / name).read_text().strip() for name in names)
            size, ways, line = (_size(number) for number in numbers)
        except (OSError, ValueError, IndexError):
            continue
        if kind in ("Data", "Unified") and size > 0:
            # Fully associative caches say 0 ways.
            found[f"l{level}"] = Cache(size, ways or size // (line or 64), line or 64)
    return replace(Caches(), **{level: found[level] for level in ("l1", "l2", "l3") if level in found})


@record
class Host:
    """What decides a plan besides shapes and strides. Sizes are in bytes."""

    itemsize: int = 0
    lanes: int = 0
    vectors: int = 0
    """Vectors along a row of the full register tile."""
    rows: int = 0
    """mr: of the tallest tiles of so many vectors."""
    rows_of_wide: int = 0
    """mr of the tallest tiles of twice as many vectors."""
    line: int = 0
    l1_sets: int = 0
    l1_ways: int = 0
    l2: int = 0
    past: int = 0
    """Half of the last cache: a longer result could not stay in the caches."""
    page: int = 0
    cores: int = 0
    """Of the machine, whichever of them this process may use."""
    kc: int = 0
    mc: int = 0
    w_uses: int = 0
    """How often a line of w must be read for packing it to pay, where its lines push one another out of L1. It decides kc, too."""
    choices: Choices = Choices()


LONGEST_CHAIN = 1024
"""The most multiply-adds in one chain, whose sum is then added to that of the chains before.

One chain all along K would lose digits with its length, where a BLAS, which adds up blocks, does not: of uniform float32 data the forward
had relative errors of 2e-5 at K = 150,528 and of 1e-2 at 10**7, against 3e-7 and 6e-6 of OpenBLAS.
"""

PAGE = 4096

X_USES = 4
"""(256, 512, 10), one panel, ran dw at 92 GFLOP/s with x copied and at 132 without (Zen 5)."""

TURNS = 8
"""With 4, 512^3 ran at 84 % of the peak and not 97 % (Zen 5)."""

W_SHARE = 4
"""A quarter of the last cache: float64 2048^3 went from 165 to 204 GFLOP/s, where w alone is as large as L3 (Zen 5)."""


def k_block(nr: int, itemsize: int, caches: Caches) -> int:
    """kc: a panel of B, kc by nr, takes an eighth of L2.

    Longer than what L1 holds: panels stream from L2 at a fraction of what it delivers, and every further block of K is one more pass
    over C (512 against 256: 1024^3 and up 3 % faster, 512^3 5 %, Zen 5; 1024 against 512: 1024^3 1 to 4 %, 2048^3 2 to 4 %, Zen 4).
    """
    return min(LONGEST_CHAIN, max(64, caches.l2.size // 8 // (nr * itemsize) // 8 * 8))


def row_block(kc: int, itemsize: int, caches: Caches) -> int:
    """mc: a block of A, mc by kc, takes seven sixteenths of L2, so that the panels of B stream past it."""
    return max(16, caches.l2.size * 7 // 16 // (kc * itemsize))


def host_of(unit: Simd, itemsize: int, caches: Caches, cores: int) -> Host:
    """What a plan has to know of a machine, from its vector unit, its caches and the number of its cores."""
    nv = unit.tile(itemsize)[1]
    kc = k_block(unit.lanes(itemsize) * nv, itemsize, caches)
    w_uses = _uses_of_w(unit.rows(nv), nv)
    return Host(
        itemsize=itemsize,
        lanes=unit.lanes(itemsize),
        vectors=nv,
        rows=unit.rows(nv),
        rows_of_wide=unit.rows(2 * nv),
        line=caches.l1.line,
        l1_sets=caches.l1.sets,
        l1_ways=caches.l1.ways,
        l2=caches.l2.size,
        past=caches.l3.size // 2,
        page=PAGE,
        cores=cores,
        kc=kc,
        mc=row_block(kc, itemsize, caches),
        w_uses=w_uses,
        choices=Choices(w_uses=w_uses, x_uses=X_USES, turns=TURNS, w_share=W_SHARE),
    )


def _uses_of_w(mr: int, nv: int) -> int:
    """How often packed lines of a w of up to twice L2 must be read for packing them to pay.

    The fewer multiply-adds a tile has for each line, the less of the wait for it they hide. Measured on Zen 4: with 12 multiply-adds a k
    (AVX2, two threads, forward) packed (32, 1024, 1024) ran 1.6 times as fast, (24, 512, 512), 4 uses, alike, (256, 500, 300) 1.4 times,
    (16, 2048, 1000) 0.8; with 28 (AVX-512) (256, 500, 300), 18 uses, 0.94, (512, 512, 512), 36 uses, 1.0 to 1.1. In between a square is a
    guess.
    """
    return (mr * nv) ** 2 // 28


def model_of_host(itemsize: int) -> Host:
    """This machine as the model sees it, whatever was measured on it."""
    return host_of(host_simd(), itemsize, host_caches(), os.cpu_count() or 1)


def this_host(itemsize: int) -> Host:
    """This machine, with the choices that were measured on it, if they were."""
    described = model_of_host(itemsize)
    described.choices = (tuned.load(host_key()) or {}).get(itemsize, described.choices)
    return described


def host_key() -> str:
    """What measured choices are good for: this processor as kernels are compiled for it, this version, and what the model says here."""
    return digest((host_target(), rectilinear.__version__, [words_of(model_of_host(itemsize)) for itemsize in tuned.ITEMSIZES]))


host = record_of("rectilinear_host", Host)
"""A jittable function of zero: the published `Host`."""


def publish_host(itemsize: int, **overrides: int | Choices) -> None:
    """Publish the host, or change what is published: `tune` tries out choices so, and tests meet block boundaries at small extents. Not
    while kernels run."""
    described = this_host(itemsize)
    if isinstance(kc := overrides.get("kc"), int):
        described.mc = row_block(kc, itemsize, host_caches())
    for name, value in overrides.items():
        setattr(described, name, value)
    words = np.array(words_of(described), np.int64)
    publish(f"rectilinear_host_f{8 * itemsize}", words.ctypes.data, words)[:] = words
