"""A whole run: ceilings, turns over the cases, ceilings again; saved after every case."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rectilinear.measure import ceilings
from rectilinear.measure.cases import Case
from rectilinear.measure.machine import available_cpus, busy_seconds, describe
from rectilinear.measure.record import Figure, Record
from rectilinear.measure.subjects import Subject
from rectilinear.measure.turns import environment, started, take_turns


@dataclass(frozen=True)
class Plan:
    """What to measure and how long: `seconds` per turn, `budget` seconds for all (None: no limit)."""

    cases: Sequence[Case]
    subjects: Sequence[Subject]
    missing: dict[str, str]
    rounds: int
    seconds: float
    budget: float | None = None
    threads: int = 0
    ceilings: bool = True
    grid: str = "named"
    isa: str = "host"
    hold: Mapping[str, str] = field(default_factory=dict)
    """The variables that hold the subjects and the ceilings to `isa`."""


Watch = Callable[[str, float], None]
"""Told what runs now, and how many cases' worth of work are done."""


def run(plan: Plan, save: Callable[[Record], None] = lambda record: None, watch: Watch = lambda what, done: None) -> Record:
    """Measure, calling `save` whenever there is more to keep. Ctrl-C ends it early: the record then has ``complete == False``."""
    begun = time.perf_counter()
    threads = plan.threads or available_cpus()
    settings = {"grid": plan.grid, "rounds": plan.rounds, "seconds per turn": plan.seconds, "threads": threads, "isa": plan.isa}
    record = Record(
        datetime.now(UTC).isoformat(timespec="seconds"), settings, describe(), missing=dict(plan.missing), held_by=dict(plan.hold)
    )
    busy, own = busy_seconds(), _own_seconds()
    with contextlib.suppress(KeyboardInterrupt):
        _measure(plan, threads, record, begun, save, watch)
        record.complete = True
    record.seconds = time.perf_counter() - begun
    if busy is not None:
        record.others = max(0.0, (busy_seconds() or busy) - busy - (_own_seconds() - own)) / record.seconds
    save(record)
    return record


def _own_seconds() -> float:
    """Processor time of this process and of the children that have ended."""
    return sum(os.times()[:4])


def _measure(plan: Plan, threads: int, record: Record, begun: float, save: Callable[[Record], None], watch: Watch) -> None:
    with _probed(plan, threads, record, watch), started(list(plan.subjects), threads, plan.hold) as (children, greetings, missing):
        record.missing |= missing
        known = {subject.name: subject for subject in plan.subjects}
        for name, greeting in greetings.items():
            subject = known[name]
            about = {"backend": subject.backend, "about": subject.about, "note": subject.note}
            record.subjects[name] = about | {k: greeting[k] for k in ("versions", "threads", "runs_on")}
        idlers = dict(children)
        longest = 0.0
        for done, case in enumerate(plan.cases):
            before = time.perf_counter()
            if plan.budget is not None and before - begun + longest > plan.budget:
                record.left_out.append(
                    {"case": case.name, "subject": "all", "reason": f"no time left of the {plan.budget:.0f} s for this run"}
                )
                continue
            _case(plan, case, children, record, lambda name, c=case, d=done: watch(f"{c.name}: {name}", float(d)))  # type: ignore[misc]
            for name, child in idlers.items():
                record.subjects[name]["idle_cpu"] = child.idle_cpu_seconds / max(child.idle_seconds, 1e-9)
                record.subjects[name]["wide"] = {
                    "turns": len(child.wide),
                    "seen": None if None in child.wide else sum(map(bool, child.wide)),
                }
            longest = max(longest, time.perf_counter() - before)
            record.seconds = time.perf_counter() - begun
            save(record)
    watch("done", float(len(plan.cases)))


def _case(plan: Plan, case: Case, children: dict[str, Any], record: Record, on_turn: Callable[[str], None]) -> None:
    seconds, refused, left_out, gpu = take_turns(case, children, plan.rounds, plan.seconds, on_turn)
    record.figures.append(Figure(case.kind, case.shape, case.dtype, seconds, gpu))
    record.refused += [{"case": case.name, "subject": name, "reason": reason} for name, reason in refused.items()]
    record.left_out += [{"case": case.name, "subject": name, "reason": reason} for name, reason in left_out.items()]


@contextlib.contextmanager
def _probed(plan: Plan, threads: int, record: Record, watch: Watch) -> Iterator[None]:
    """Measure the ceilings before and after; the subjects have not started then, or have ended."""
    if plan.ceilings:
        watch("the machine's ceilings", 0.0)
        record.ceilings = _probe(plan, threads, record)
    watch("starting the subjects", 0.0)
    yield
    if record.ceilings:
        watch("the machine's ceilings, again", float(len(plan.cases)))
        again = _probe(plan, threads, record)
        record.ceilings = ceilings.merged([record.ceilings, again]) if again else {}


def _probe(plan: Plan, threads: int, record: Record) -> dict[str, Any]:
    """In a process of its own, for the same reasons as the subjects. Empty if it failed, and then it is named among the missing."""
    nobody = Subject("ceilings", "")
    command = [sys.executable, "-m", "rectilinear.measure.ceilings", str(threads), plan.isa]
    done = subprocess.run(command, env=environment(nobody, threads, plan.hold), capture_output=True, text=True, check=False)
    if done.returncode:
        if done.returncode < 0 and not done.stderr:
            raise KeyboardInterrupt  # the terminal's Ctrl-C ended it, as it does this process
        record.missing["ceilings"] = " ".join(done.stderr.strip().splitlines()[-1:]) or f"the probe ended with status {done.returncode}"
        return {}
    return dict(json.loads(done.stdout))
