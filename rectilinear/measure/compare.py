"""Two runs against one another: what changed beyond noise, and what got slower by more than is tolerated.

Times of two runs are not comparable as they stand: the clock, the neighbours and the temperature differ. The baseline peer
(CS231n's NumPy) ran beside every subject in both, so what is compared is each subject's time in units of the baseline's in the
same round; bare times serve where a run has no baseline, for the baseline itself, and on a GPU, which has a clock of its own. A
change counts when it is well beyond the spread of the rounds of both runs, and beyond what two runs of the same code differ by.
"""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from rectilinear.measure.record import Figure, Record
from rectilinear.measure.subjects import BASELINE

BETWEEN_RUNS = 0.05
"""Two runs of the same code differ by this: each process has its own addresses, and they decide which lines share a cache set."""

BEYOND_NOISE = 2.0
"""A change counts from this many times the spread of both runs. Simulated with 5 rounds and 1 % noise, a tenth of the rounds
interrupted: one false change in ten thousand, and a slowdown of 20 % is found in five cases of six; without interruptions always."""


def refuse_unlike(old: Record, isa: str) -> None:
    """Raise where a run held to `isa` says nothing against the old one.

    Raises
    ------
    ValueError
        The old run was held to another instruction set.
    """
    if old.isa != isa:
        raise ValueError(f"the old run was measured with --isa {old.isa}, this one with --isa {isa}: compare runs of one instruction set")


class Change(NamedTuple):
    """A subject in a case: how much longer it takes now (1.2: a fifth longer), against what, and whether that is a regression."""

    case: str
    subject: str
    factor: float
    unit: str
    regression: bool


def changes(old: Record, new: Record, tolerance: float) -> list[Change]:
    """What changed beyond noise, the worst first. `tolerance` is in percent; a backend slower by more is a regression."""
    before = {figure.case: figure for figure in old.figures}
    found = []
    for figure in new.figures:
        earlier = before.get(figure.case)
        if earlier is None:
            continue
        for subject in figure.seconds:
            if subject in earlier.seconds:
                change = _change(earlier, figure, subject, tolerance, subject in new.backends)
                if change:
                    found.append(change)
    return sorted(found, key=lambda change: -change.factor)


def _change(earlier: Figure, figure: Figure, subject: str, tolerance: float, ours: bool) -> Change | None:
    paired = subject != BASELINE and subject not in figure.gpu and all(BASELINE in f.seconds for f in (earlier, figure))
    was, now = (_relative(f, subject) if paired else f.seconds[subject] for f in (earlier, figure))
    factor = median(now) / median(was)
    if max(factor, 1 / factor) < 1 + max(BETWEEN_RUNS, BEYOND_NOISE * (_width(was) + _width(now))):
        return None
    return Change(figure.case.name, subject, factor, f"against {BASELINE}" if paired else "time", ours and factor > 1 + tolerance / 100)


def _width(rounds: list[float]) -> float:
    """How far the rounds lie apart, relative to one another, without the lowest and the highest: one interruption is not noise."""
    middle = sorted(rounds)[1:-1] if len(rounds) > 3 else rounds
    return max(middle) / min(middle) - 1


def _relative(figure: Figure, subject: str) -> list[float]:
    return [s / b for s, b in zip(figure.seconds[subject], figure.seconds[BASELINE], strict=True)]


def gone(old: Record, new: Record) -> list[str]:
    """The backends' figures of the old run that the new one lacks, though it ran the case: crashed, refused or dropped."""
    now = {figure.case: figure for figure in new.figures}
    return [
        f"{figure.case.name}: {subject}"
        for figure in old.figures
        if figure.case in now
        for subject in old.backends
        if subject in figure.seconds and subject in new.subjects and subject not in now[figure.case].seconds
    ]


def baseline_drift(old: Record, new: Record) -> float | None:
    """How much longer the baseline itself takes now, the median over cases; None where the runs share none."""
    before = {f.case: f for f in old.figures if BASELINE in f.seconds}
    factors = [
        median(f.seconds[BASELINE]) / median(before[f.case].seconds[BASELINE])
        for f in new.figures
        if f.case in before and BASELINE in f.seconds
    ]
    return median(factors) if factors else None
