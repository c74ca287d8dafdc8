"""From what was measured to what is said: medians with their spread, ratios round by round, fractions of the roofline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, fsum, log
from statistics import median
from typing import Any, NamedTuple

from rectilinear.measure.cases import Case
from rectilinear.measure.isa import held
from rectilinear.measure.record import Figure, Record

HALF_INSIDE = 2
"""A working set counts as inside a cache of half its size: part of it is still found there on the next call."""


class Spread(NamedTuple):
    """A median over rounds, and the lowest and the highest round."""

    mid: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def ratio(figure: Figure, subject: str, peer: str) -> Spread:
    """How many times as fast as the peer the subject is, taken in each round: above 1, the subject is faster."""
    return spread([p / s for s, p in zip(figure.seconds[subject], figure.seconds[peer], strict=True)])


def geometric_mean(values: Iterable[float]) -> float:
    logs = [log(value) for value in values]
    return exp(fsum(logs) / len(logs))


def best_peer(figure: Figure, peers: Iterable[str]) -> str | None:
    """The fastest of the peers that ran this case."""
    return min((p for p in peers if p in figure.seconds), key=lambda p: median(figure.seconds[p]), default=None)


class Headline(NamedTuple):
    """A subject against a peer over some figures: geometric mean of the ratios with its spread over rounds, and the worst case."""

    peer: str
    cases: int
    mean: Spread
    worst: Spread
    worst_case: Case


def headline(figures: Iterable[Figure], subject: str, peer: str, peers: Sequence[str]) -> Headline | None:
    """`peer` may be ``"best"``: the fastest of `peers` at each shape that ran where the subject did. None where they share no case."""
    pairs = []
    for figure in figures:
        beside = [p for p in peers if on_host(figure, p) == on_host(figure, subject)]
        rival = best_peer(figure, beside) if peer == "best" else peer
        if rival in figure.seconds and subject in figure.seconds:
            pairs.append((figure, rival))
    if not pairs:
        return None
    rounds = min(len(figure.seconds[subject]) for figure, _ in pairs)
    means = [geometric_mean(f.seconds[rival][r] / f.seconds[subject][r] for f, rival in pairs) for r in range(rounds)]
    worst, rival = min(pairs, key=lambda pair: ratio(pair[0], subject, pair[1]).mid)
    return Headline(peer, len(pairs), spread(means), ratio(worst, subject, rival), worst.case)


class Roof(NamedTuple):
    """The least time a case can take here, what it is bound by (``"FMA"`` or a level of memory), and that level's bandwidth."""

    seconds: float
    bound: str
    bandwidth: float


def roof(case: Case, ceilings: dict[str, Any]) -> Roof:
    """``max(FLOPs / peak, bytes / bandwidth)``, which is the roofline min(peak, intensity x bandwidth), told as time.

    The bandwidth is that of the innermost level that could hold what the case touches.
    """
    touched = case.bytes_read + case.bytes_written
    inside = (level for level in ceilings["levels"] if level["capacity"] is None or touched <= HALF_INSIDE * level["capacity"])
    level = next(inside)
    rate = bandwidth(case, level)
    compute, memory = case.flops / ceilings["flops"][case.dtype], touched / rate
    return Roof(max(compute, memory), "FMA" if compute > memory else level["level"], rate)


def bandwidth(case: Case, level: dict[str, Any]) -> float:
    """Between the rate of reading alone and that of reading and writing as much, by the share the case writes."""
    share = min(1.0, 2 * case.bytes_written / (case.bytes_read + case.bytes_written))
    return float(1 / ((1 - share) / level["read"] + share / level["copy"]))


def on_host(figure: Figure, subject: str) -> bool:
    """Whether the ceilings, which are the processor's, apply to a subject: not on a GPU."""
    return subject not in figure.gpu


def broken_ceilings(record: Record) -> list[str]:
    """What is wrong with the probes: every peak or roof that a subject's median beats. An empty list if they are sound."""
    if not record.ceilings:
        return []
    broken = []
    for figure in record.figures:
        limit = roof(figure.case, record.ceilings)
        for subject, seconds in figure.seconds.items():
            share = limit.seconds / median(seconds)
            if on_host(figure, subject) and share > 1:
                broken.append(f"{subject} reaches {share:.0%} of the measured ceiling ({limit.bound}) in {figure.case.name}")
    return broken


def blas_kernels(record: Record) -> dict[str, list[str]]:
    """Which BLAS kernels ran, each with the subjects in whose processes it was loaded."""
    found: dict[str, list[str]] = {}
    for name, about in record.subjects.items():
        kernels = (f"{pool['internal_api']} {pool['architecture']}" for pool in about.get("threads", []) if "architecture" in pool)
        for kernel in dict.fromkeys(kernels):
            found.setdefault(kernel, []).append(name)
    return found


def not_held(record: Record) -> list[str]:
    """Where a run that was held to an instruction set was not: libraries that say so, and processes seen to use AVX-512."""
    if record.isa == "host":
        return []
    lines = []
    for name, about in record.subjects.items():
        answers = about.get("runs_on", [])
        lines += [f"{a['library']} says {a['says']} in {name}'s process" for a in answers if held(a["says"]) is False]
        wide = about.get("wide", {})
        if wide.get("seen"):
            silent = ", ".join(a["library"] for a in answers if a["says"] is None)
            lines.append(
                f"registers of AVX-512 were in use in {wide['seen']} of {wide['turns']} turns of {name}, where {silent} cannot be asked"
            )
    return lines


class Advice(NamedTuple):
    """Which backend to choose for one case: the fastest, how far ahead of the next, and whether that is beyond the spread."""

    case: Case
    best: str
    microseconds: dict[str, float]
    ahead: float
    clear: bool


def choices(record: Record) -> list[str]:
    """The backends that one can choose, as called by default; where only other ways to them were measured, those."""
    called = [name for name in record.backends if not name.endswith("-out")]
    return [name for name in called if record.subjects[name]["backend"] == name] or called


def advice(record: Record) -> list[Advice]:
    """For each case the fastest backend as called by default; smallest cases first."""
    names = choices(record)
    rows = []
    for figure in record.figures:
        ranked = sorted((n for n in names if n in figure.seconds), key=lambda n: median(figure.seconds[n]))
        if not ranked:
            continue
        lead = ratio(figure, ranked[0], ranked[1]) if len(ranked) > 1 else Spread(1.0, 1.0, 1.0)
        micro = {n: median(figure.seconds[n]) * 1e6 for n in ranked}
        rows.append(Advice(figure.case, ranked[0], micro, lead.mid, lead.low > 1))
    return sorted(rows, key=lambda row: (row.case.kind, row.case.dtype, row.case.flops or row.case.elements))
