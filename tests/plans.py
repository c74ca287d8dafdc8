"""The plans of six machines at the shapes of the benchmark, as text: `plans.txt`, where a change of the model shows what it changes.

``python -m tests.plans`` writes it anew.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rectilinear.kernels.loops.host import Cache, Caches, Host, host_of
from rectilinear.kernels.loops.plan import COPIED, IN_PLACE, PACKED, plan
from rectilinear.kernels.micro.simd import AVX2, AVX512, NEON, Simd

PATH = Path(__file__).with_suffix(".txt")

KIB, MIB = 1 << 10, 1 << 20

MACHINES: dict[str, tuple[Simd, Caches, int]] = {
    "Zen 3": (AVX2, Caches(Cache(32 * KIB, 8), Cache(512 * KIB, 8), Cache(32 * MIB, 16)), 8),
    "Zen 4": (AVX512, Caches(Cache(32 * KIB, 8), Cache(MIB, 8), Cache(32 * MIB, 16)), 8),
    "Zen 5": (AVX512, Caches(Cache(48 * KIB, 12), Cache(MIB, 16), Cache(32 * MIB, 16)), 8),
    "Emerald Rapids": (AVX512, Caches(Cache(48 * KIB, 12), Cache(2 * MIB, 16), Cache(260 * MIB, 20)), 16),
    "Raptor Lake": (AVX2, Caches(Cache(48 * KIB, 12), Cache(2 * MIB, 16), Cache(30 * MIB, 12)), 8),
    "Neoverse N1": (NEON, Caches(Cache(64 * KIB, 4), Cache(MIB, 8), Cache(32 * MIB, 16)), 64),
}
"""Vector unit, caches, cores."""

DTYPES = {"float32": 4, "float64": 8}

SHAPES = [
    (1, 64, 64),
    (16, 128, 128),
    (100, 3072, 100),
    (128, 784, 256),
    (512, 512, 512),
    (256, 512, 10),
    (16384, 256, 256),
    (1024, 1024, 1024),
    (65536, 64, 64),
    (32768, 32, 128),
    (333, 777, 111),
    (256, 784, 512),
    (2048, 2048, 2048),
    (8, 1024, 1024),
    (4096, 4096, 1024),
]
"""n, d, m."""

B = {IN_PLACE: "in-place", PACKED: "packed"}
A = {IN_PLACE: "in-place", COPIED: "copied", PACKED: "packed"}


def host(machine: str, dtype: str) -> Host:
    unit, caches, cores = MACHINES[machine]
    return host_of(unit, DTYPES[dtype], caches, cores)


def text() -> str:
    """A paragraph for each machine and dtype: the host, then a line for each shape. Tasks are those of as many threads as it has cores."""
    return "\n".join(_paragraph(machine, dtype) for machine in MACHINES for dtype in DTYPES)


def _paragraph(machine: str, dtype: str) -> str:
    seen = host(machine, dtype)
    lines = [f"# {machine}, {dtype}: {_fields(seen)}"]
    for shape in SHAPES:
        jobs = [plan(op, shape, seen, threads=seen.cores) for op in ("forward", "backward")]
        forward, backward = jobs
        records = {"forward": forward, "backward": backward, "dx": backward.to_dx, "dw": backward.to_dw}
        name = " x ".join(map(str, shape))
        lines.append(f"{name:<18}  " + "   ".join(f"{which}: {_fields(job.plan)} / {_fields(job.tasks)}" for which, job in records.items()))
    return "\n".join(lines) + "\n"


DERIVED = {"lead", "part_row", "count"}
"""What follows from the other fields and the shape."""


def _fields(record: Any) -> str:
    """Those that are not 0."""
    values = {name: value for name, value in dataclasses.asdict(record).items() if value and name not in DERIVED}
    for name, words in (("a", A), ("b", B)):
        if hasattr(record, name):
            values[name] = words[getattr(record, name)]
    return " ".join(f"{name}={value}" for name, value in values.items())


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
