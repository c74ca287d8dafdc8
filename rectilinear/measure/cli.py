"""``python -m rectilinear bench``: measure the backends here, with peers if asked for, and write the report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from rectilinear.extras import lacks
from rectilinear.measure import ceilings, compare, isa, report
from rectilinear.measure.cases import PASSES, Case, full_grid, named, net_grid, quick_grid
from rectilinear.measure.figures import advice, blas_kernels, broken_ceilings, headline, not_held
from rectilinear.measure.record import Record, load
from rectilinear.measure.run import Plan, Watch, run
from rectilinear.measure.subjects import BASELINE, IN_FRAMEWORKS, PEERS, Subject, backend_subjects

GRIDS = {"quick": (quick_grid, 5, 0.02, 165.0), "full": (full_grid, 5, 0.05, 1740.0), "nets": (net_grid, 5, 0.2, 0.0)}
"""Cases, rounds, seconds per turn, and the budget in seconds, less the second look at the ceilings."""

SCREENFUL = 40
"""Rows beyond which the table at the end keeps to whole steps."""

_EPILOG = f"""Cases are named PASS-SHAPE-DTYPE; passes: {", ".join(PASSES)}.
Exit status: 0; 1 after a regression (--compare) or when a backend was refused for wrong results; 2 for wrong usage;
130 after Ctrl-C, which keeps what was measured."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    missing = lacks("rich", "bench") or lacks("threadpoolctl", "bench")
    if missing:
        parser.error(missing)
    try:
        old = load(options.compare) if options.compare else None
        record = load(options.source) if options.source else None
        if old:
            compare.refuse_unlike(old, record.isa if record else options.isa)
        if record is None:
            plan = _plan(options)
            if options.list:
                print("\n".join(case.name for case in plan.cases))
                return 0
            with _progress(plan) as watch:
                record = run(plan, save=lambda r: r.save(_json_path(options)), watch=watch)
            if record.ceilings and record.isa == "host":
                ceilings.keep(record.ceilings)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    _write(record, options)
    status = _conclude(record)
    if old is not None and _print_changes(old, record, options.tolerance):
        status = 1
    return status if record.complete or options.source else 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rectilinear bench", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "grid",
        nargs="?",
        choices=GRIDS,
        default="quick",
        help="quick: under 3 minutes (default); full: the whole grid, under 30 minutes; nets: inference and training of two nets",
    )
    add(
        "--peers",
        action="store_true",
        help=f"compare with other libraries too, as far as installed (without: only with {BASELINE}, plain NumPy)",
    )
    add(
        "--subjects",
        metavar="A,B",
        help="only these: backends (numpy, numpy-out, ...) and peers (" + ", ".join(p.name for p in PEERS) + ")",
    )
    add(
        "--only",
        metavar="PATTERN",
        action="append",
        default=[],
        help="only cases so named, e.g. 'step-*-float32'; of the whole grid and the nets; repeatable",
    )
    add("--rounds", type=_positive, help="rounds of turns")
    add("--seconds", type=float, help="seconds per turn")
    add(
        "--budget", type=float, help="seconds for the run: no case is begun that may not end within them; 0: no limit, which --only implies"
    )
    add("--threads", type=_positive, default=0, help="threads for every subject (default: all processors this process may use)")
    add(
        "--isa",
        choices=isa.NAMES,
        default="host",
        help="hold every subject to an instruction set: the host's own (default), or avx2 where the processor has more",
    )
    add("--no-ceilings", action="store_true", help="do not measure the machine's ceilings; leaves the rooflines out")
    add("--out", type=Path, default=Path("rectilinear-bench"), help="folder for report.html, report.md and run.json (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="save the figures here instead of in the folder")
    add("--from", dest="source", type=Path, metavar="FILE", help="measure nothing: report (and compare) what was saved in FILE")
    add("--compare", type=Path, metavar="OLD", help="print what changed against a saved run beyond noise; exit with 1 after a regression")
    add("--tolerance", type=float, default=10.0, metavar="PERCENT", help="how much slower is a regression (default: %(default)s)")
    add("--list", action="store_true", help="print the names of the cases and stop")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _plan(options: argparse.Namespace) -> Plan:
    grid, rounds, seconds, budget = GRIDS[options.grid]
    cases: list[Case] = named(dict.fromkeys([*full_grid(), *net_grid()]), options.only) if options.only else grid()
    chosen, missing = _subjects(options)
    if options.budget is not None:
        budget = options.budget
    elif options.only:
        budget = 0.0  # what is asked for by name is measured, however long it takes
    return Plan(
        cases=[case for case in cases if any(subject.covers(case) for subject in chosen)],
        subjects=chosen,
        missing=missing,
        rounds=options.rounds or rounds,
        seconds=options.seconds or seconds,
        budget=budget or None,
        threads=options.threads,
        ceilings=not options.no_ceilings,
        grid=" ".join(options.only) or options.grid,
        isa=options.isa,
        hold=isa.variables(options.isa, os.environ),
    )


def _subjects(options: argparse.Namespace) -> tuple[list[Subject], dict[str, str]]:
    backends, missing = backend_subjects()
    everyone = {subject.name: subject for subject in (*backends, *PEERS, *IN_FRAMEWORKS)}
    if options.subjects:
        names = [name.strip() for name in options.subjects.split(",")]
        unknown = [name for name in names if name not in everyone]
        if unknown:
            reasons = "".join(f"; {name} is not usable: {missing[name]}" for name in unknown if name in missing)
            raise ValueError(f"no subject is named {', '.join(unknown)}; there are {', '.join(everyone)}{reasons}")
        return [everyone[name] for name in names], {}
    return [s for s in everyone.values() if s.backend or options.peers or s.name == BASELINE], missing


@contextmanager
def _progress(plan: Plan) -> Iterator[Watch]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    so_far = [0.0, *accumulate(_cost(case, plan) for case in plan.cases)]
    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bar:  # redrawing costs the subjects processor time
        task = bar.add_task("", total=so_far[-1])
        yield lambda what, done: bar.update(
            task, description=f"{min(int(done) + 1, len(plan.cases))}/{len(plan.cases)} {what}", completed=so_far[int(done)]
        )


def _cost(case: Case, plan: Plan) -> float:
    """Roughly how many seconds a case takes, so that the time left is told by work and not by the number of cases."""
    call = case.flops / 1e11 + (case.bytes_read + case.bytes_written) / 1e10
    subjects = [subject for subject in plan.subjects if subject.covers(case)]
    compiles = 6.0 * sum(subject.name.endswith("-compile") for subject in subjects)
    return compiles + len(subjects) * (0.2 + 10 * call + plan.rounds * max(plan.seconds, call))


def _json_path(options: argparse.Namespace) -> Path:
    return Path(options.json or options.out / "run.json")


def _write(record: Record, options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.html").write_text(report.html(record), encoding="utf-8")
    (options.out / "report.md").write_text(report.markdown(record), encoding="utf-8")
    if options.source and options.json:
        record.save(options.json)
    saved = options.source or _json_path(options)
    print(f"{options.out / 'report.html'}, {options.out / 'report.md'}; figures in {saved}", file=sys.stderr)


def _conclude(record: Record) -> int:
    """Print what went wrong, the headline, and which backend to choose; returns 1 if a backend was refused."""
    if (record.others or 0.0) > report.BUSY:
        print(f"other programs kept {record.others:.1f} processors busy: measure again on a quiet machine")
    for line in broken_ceilings(record):
        print(f"THE PROBE IS WRONG: {line}")
    for line in not_held(record):
        print(f"NOT HELD TO {record.isa.upper()}: {line}")
    for kernel, names in blas_kernels(record).items():
        print(f"BLAS kernel: {kernel} for {', '.join(names)}")
    for entry in record.refused:
        print(f"REFUSED: {entry['subject']} in {entry['case']}: {entry['reason']}")
    for name, reason in record.missing.items():
        print(f"missing: {name}: {reason}")
    for subject in record.backends:
        for peer in (*record.peers, "best"):
            found = headline(record.figures, subject, peer, record.peers)
            if found:
                name = "the best peer" if peer == "best" else peer
                worst = f"{found.worst.mid:.2f} at worst ({found.worst_case.name})"
                print(f"{subject} is {found.mean.mid:.2f} times as fast as {name} over {found.cases} cases, {worst}")
    _print_choice(record)
    return int(any(entry["subject"] in record.backends for entry in record.refused))


def _print_choice(record: Record) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = advice(record)
    if len(rows) > SCREENFUL:  # the report has them all
        rows = [row for row in rows if row.case.kind in ("step", "train")] or rows
    names = list(dict.fromkeys(name for row in rows for name in row.microseconds))
    on_gpu = "; on a GPU, arrays that are there already" if any(figure.gpu for figure in record.figures) else ""
    table = Table(title="Which backend to choose here, by size" + on_gpu)
    for column in ("case", *(f"{name}, µs" for name in names), "choose"):
        table.add_column(column, overflow="fold")
    for row in rows:
        times = [f"{row.microseconds[name]:.4g}" if name in row.microseconds else "" for name in names]
        table.add_row(row.case.name, *times, row.best if row.clear or len(names) == 1 else f"either ({row.best} by {row.ahead - 1:.0%})")
    if rows:
        Console().print(table)


def _print_changes(old: Record, new: Record, tolerance: float) -> bool:
    """Print how two runs differ; returns whether there is a regression."""
    found = compare.changes(old, new, tolerance)
    drift = compare.baseline_drift(old, new)
    if drift is not None:
        print(f"{BASELINE} itself takes {drift:.2f} times as long as then; changes are in units of it")
    for key in sorted({*old.machine, *new.machine}):
        if old.machine.get(key) != new.machine.get(key):
            print(f"the machine differs: {key} was {old.machine.get(key)}, is {new.machine.get(key)}")
    for change in found:
        word = "REGRESSION" if change.regression else "slower" if change.factor > 1 else "faster"
        print(f"{word}: {change.subject} in {change.case} takes {change.factor:.2f} times as long ({change.unit})")
    lost = compare.gone(old, new)
    for line in lost:
        print(f"REGRESSION: no longer measured: {line}")
    if not found and not lost:
        print("nothing changed beyond noise")
    return bool(lost) or any(change.regression for change in found)
