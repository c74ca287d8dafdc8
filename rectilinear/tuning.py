"""``python -m rectilinear tune``: measure the few choices that the kernels' model of the machine is least sure of, and keep them.

It is never needed. Each choice changes the time of a call and none of its bits: see `rectilinear.kernels.loops.tuned.Choices`. Values are
tried one against the other in this process, in turns, at shapes for which they make different plans.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

import rectilinear
from rectilinear.backends.numba_backend import NumbaBackend
from rectilinear.extras import lacks
from rectilinear.threads import call_threads

ROUNDS, MORE_ROUNDS = 9, 15
"""Turns of each value at each shape; of one that has won, when it is tried once more."""

TURN_S = 0.02
"""A turn: at least one call, and then more for so long. The shortest counts."""

WIN = 1.02
"""How many times as fast a value must be, in three of four rounds, to be taken."""

BUSY = 1.1
"""Third over first quartile, of half of the cases or more: so far apart they lie where other programs run."""

_EPILOG = """Exit status: 0; 1 where the numba backend does not work or nothing can be kept; 2 for wrong usage;
130 after Ctrl-C, which keeps nothing."""


@dataclass(frozen=True)
class Case:
    """A pass at a shape (n, d, m): ``"forward"`` or ``"backward"``."""

    op: str
    shape: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Trial:
    """A choice, the values to try besides the model's, and where they could make a difference."""

    choice: str
    label: str
    values: tuple[int, ...]
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Row:
    """What came of a trial for a dtype: `tried` is the best of the other values (None: none plans anything else here), and `times` what a
    call takes with it, of the time that it takes with the model's value: first quartile, median and third for each case."""

    dtype: str
    label: str
    model: int
    tuned: int
    tried: int | None = None
    times: dict[Case, tuple[float, float, float]] = field(default_factory=dict)


Measure = Callable[[Case, int, Sequence[Any], int], "np.ndarray"]
"""Of a case, an itemsize, several `Choices` and a number of rounds: seconds of a call, (choices, rounds)."""

Watch = Callable[[str, int], None]
"""Told what is measured now, and how many cases it begins."""


def trials(host: Any) -> list[Trial]:
    """What to try on `host` (a `rectilinear.kernels.loops.host.Host`), at shapes around the model's own thresholds."""
    nr, model = host.vectors * host.lanes, host.choices
    side = min(4096, int((2 * host.past / host.itemsize) ** 0.5) // 256 * 256)  # of a w as large as the last cache
    rows = [host.rows * model.w_uses * part // 8 for part in (3, 6, 12, 24)]
    return [
        Trial("turns", "tasks per thread", (4, 16), (*_both(512, 512, 512), Case("forward", (128, 784, 256)), *_both(1024, 1024, 1024))),
        Trial(
            "x_uses",
            "panels that use a copied or packed A",
            (2, 8, 16),
            tuple(case for panels in (3, 6, 12) for case in _both(512, 1024, panels * nr)),
        ),
        Trial(
            "w_uses",
            "uses of a packed line of w",
            tuple(max(2, model.w_uses * part // 4) for part in (1, 2, 8, 16)),
            tuple(Case("forward", (n, width, width)) for n in rows for width in (512, 1024)),
        ),
        Trial("w_share", "sixteenths of the last cache for w", (1, 16), _both(1024, side, side)),
    ]


def _both(n: int, d: int, m: int) -> tuple[Case, Case]:
    return Case("forward", (n, d, m)), Case("backward", (n, d, m))


def plans_alike(case: Case, host: Any, one: Any, other: Any, threads: int) -> bool:
    """Whether two `Choices` make the same plan of a case."""
    from rectilinear.kernels.loops.plan import plan

    ours, theirs = (plan(case.op, case.shape, replace(host, choices=choices), threads=threads) for choices in (one, other))
    return ours == theirs


def measure(case: Case, itemsize: int, choices: Sequence[Any], rounds: int) -> np.ndarray:
    """Seconds of a call with each of the choices in turn; RuntimeError where results are not the same to the bit."""
    from rectilinear.kernels.loops.host import publish_host

    call, results = _call(case, np.dtype(f"f{itemsize}"))
    seconds = np.empty((len(choices), rounds))
    want = None
    for chosen in choices:
        publish_host(itemsize, choices=chosen)
        call()
        bits = [result.tobytes() for result in results]
        if want is not None and bits != want:
            raise RuntimeError(f"{case} in float{8 * itemsize} has other bits with {chosen} than with {choices[0]}; please report it")
        want = bits
    for i in range(rounds):
        for turn in range(len(choices)):
            index = (turn + i) % len(choices)  # nobody is always the first
            publish_host(itemsize, choices=choices[index])
            seconds[index, i] = _turn(call)
    return seconds


def _turn(call: Callable[[], object]) -> float:
    best, end = float("inf"), time.perf_counter() + TURN_S
    start = 0.0
    while start < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _call(case: Case, dtype: np.dtype[Any]) -> tuple[Callable[[], object], list[np.ndarray]]:
    """A call of the case, and the arrays that it fills."""
    (n, d, m), rng, backend = case.shape, np.random.default_rng(0), NumbaBackend()
    x, w, b, dout = (rng.uniform(-1, 1, shape).astype(dtype) for shape in ((n, d), (d, m), (m,), (n, m)))
    if case.op == "forward":
        out = np.empty_like(dout)
        return lambda: backend.affine_forward(x, w, b, out), [out]
    results = np.empty_like(x), np.empty_like(w), np.empty_like(b)
    return lambda: backend.affine_backward(dout, x, w, None, (True, True, True), results), list(results)


def tune(itemsize: int, watch: Watch, measure: Measure) -> tuple[Any, list[Row]]:
    """The `Choices` for a dtype, and how they were found. What is taken stays for the trials that follow."""
    from rectilinear.kernels.loops.host import model_of_host

    host, rows = model_of_host(itemsize), []
    chosen = host.choices
    for trial in trials(host):
        model = getattr(chosen, trial.choice)
        others = [replace(chosen, **{trial.choice: value}) for value in trial.values if value != model]
        tried = _tried(trial, host, [chosen, *others], measure, ROUNDS, watch)
        best = min(others, key=lambda other: _middle(tried[getattr(other, trial.choice)]), default=chosen)
        value = getattr(best, trial.choice)
        times = tried.get(value, {})
        if wins(times):  # the best of several is often so by luck
            times = _tried(trial, host, [chosen, best], measure, MORE_ROUNDS, lambda label, cases: watch(f"{label}, again", 0))[value]
            chosen = best if wins(times) else chosen
        quartiles = {case: _quartiles(ratios) for case, ratios in times.items()}
        rows.append(Row(f"float{8 * itemsize}", trial.label, model, getattr(chosen, trial.choice), value if times else None, quartiles))
    return chosen, rows


def _tried(
    trial: Trial, host: Any, choices: Sequence[Any], measure: Measure, rounds: int, watch: Watch
) -> dict[int, dict[Case, np.ndarray]]:
    """For the value of each of the choices but the first: its time over that of the first, by case and round, where their plans differ."""
    base, *others = choices
    found: dict[int, dict[Case, np.ndarray]] = {getattr(other, trial.choice): {} for other in others}
    for case in trial.cases:
        watch(f"float{8 * host.itemsize}, {trial.label}, {case}", 1)
        unlike = [other for other in others if not plans_alike(case, host, base, other, call_threads())]
        if unlike:
            first, *times = measure(case, host.itemsize, [base, *unlike], rounds)
            for other, seconds in zip(unlike, times, strict=True):
                found[getattr(other, trial.choice)][case] = seconds / first
    return found


def wins(times: dict[Case, np.ndarray]) -> bool:
    """Whether a value is faster by more than noise over its cases, and slower by more than that in none."""
    faster = bool(times) and bool(np.percentile(_over_cases(times), 75) * WIN < 1)
    return faster and all(np.percentile(ratios, 25) < WIN for ratios in times.values())


def _over_cases(times: dict[Case, np.ndarray]) -> np.ndarray:
    """The geometric mean over cases, by round."""
    return np.asarray(np.exp(np.mean(np.log(list(times.values())), axis=0)))


def _middle(times: dict[Case, np.ndarray]) -> float:
    return float(np.median(_over_cases(times))) if times else float("inf")


def _quartiles(ratios: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return float(low), float(middle), float(high)


# The command.


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rectilinear tune", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="measure and show, and keep nothing")
    what.add_argument("--reset", action="store_true", help="forget what was measured on this machine")
    options = parser.parse_args(argv)
    obstacle = _obstacle()
    if obstacle is not None:
        return _failed(obstacle)
    try:
        return _reset() if options.reset else _tune(keep=not options.dry_run)
    except OSError as error:
        return _failed(f"nothing can be kept ({error}); set RECTILINEAR_CACHE_DIR to a directory of your own")
    except KeyboardInterrupt:
        print("interrupted: nothing was changed", file=sys.stderr)
        return 130


def _failed(why: str) -> int:
    print(f"tune: {why}", file=sys.stderr)
    return 1


def _obstacle() -> str | None:
    """Why there is nothing to tune, if so."""
    probe = NumbaBackend().probe()
    return lacks("rich", "bench") if probe.usable else f"it is the numba backend that is tuned, and {probe.reason}"


def _reset() -> int:
    from rectilinear.kernels.loops import host, tuned

    print("forgotten: the model decides" if tuned.forget(host.host_key()) else "nothing to forget: this machine was not tuned")
    return 0


def _tune(*, keep: bool) -> int:
    from rectilinear.kernels.loops import host, tuned

    if keep:
        tuned.check(host.host_key())
    rectilinear.warmup()
    chosen, rows = {}, []
    try:
        with _progress() as watch:
            for itemsize in tuned.ITEMSIZES:
                chosen[itemsize], found = tune(itemsize, watch, measure)
                rows += found
    finally:
        for itemsize in tuned.ITEMSIZES:
            host.publish_host(itemsize)
    _print_table(rows)
    spreads = [high / low for row in rows for low, _, high in row.times.values()]
    if spreads and np.median(spreads) > BUSY:
        print("other programs kept this machine busy: on a quiet one more could be told apart")
    if not keep:
        print("nothing was kept")
        return 0
    print(f"kept in {tuned.store(host.host_key(), chosen)}; new processes use it, and python -m rectilinear tune --reset forgets it")
    return 0


@contextmanager
def _progress() -> Iterator[Watch]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from rectilinear.kernels.loops import host, tuned

    cases = sum(len(trial.cases) for itemsize in tuned.ITEMSIZES for trial in trials(host.model_of_host(itemsize)))
    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bar:  # redrawing costs processor time
        task = bar.add_task("", total=cases + 1)
        yield lambda label, begun: bar.update(task, description=label, advance=begun)


def _print_table(rows: Sequence[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"Time with another value, of the time with the model's; {call_threads()} threads, first quartile, median and third"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("dtype", "choice", "model", "tuned", "time"):
        table.add_column(column, overflow="fold")
    for row in rows:
        lines = [f"{case}  {low:.2f} {middle:.2f} {high:.2f}" for case, (low, middle, high) in row.times.items()]
        told = "\n".join([f"with {row.tried}:", *lines]) if lines else "no other value plans anything else here"
        table.add_row(row.dtype, row.label, str(row.model), str(row.tuned), told, style="bold" if row.tuned != row.model else None)
    console = Console()
    with console.capture() as captured:  # as in `rectilinear.__main__`: rich does not write
        console.print(table)
    print(captured.get(), end="")


# For `python -m rectilinear info`.


def state() -> dict[str, dict[str, int]] | None:
    """What was measured on this machine that the model does not say, by dtype; None where nothing was measured."""
    from rectilinear.kernels.loops import host, tuned

    found = tuned.load(host.host_key())
    if found is None:
        return None
    models = {itemsize: asdict(host.model_of_host(itemsize).choices) for itemsize in found}
    return {
        f"float{8 * itemsize}": {name: value for name, value in asdict(choices).items() if value != models[itemsize][name]}
        for itemsize, choices in found.items()
    }
