"""The demo: one training under every usable backend and on one other library's arrays, compared in tables and two pictures.

    make demo
    python examples/demo.py --trainings 1 --epochs 5    a shorter one

Each contestant trains in a process of its own, the environment variable naming the backend, as a user's script would.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hot_path
import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from two_layer_net import EPOCHS, Data, Run, digits

import rectilinear

SCRIPT = Path(__file__).with_name("two_layer_net.py")
SEED = 0
REFERENCE = "numpy"

# The net's products are too small for a second BLAS thread to help, and where the cores are busy, waiting for it made a
# training 10 to 50 times slower. Who sets these variables has the last word.
ONE_BLAS_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Contestant:
    name: str
    backend: str
    options: tuple[str, ...]
    trainings: int


@dataclass(frozen=True)
class Result:
    name: str
    runs: list[Run]

    @property
    def losses(self) -> np.ndarray:
        return np.array(self.runs[0].losses)


def contestants(trainings: int) -> list[Contestant]:
    """Every usable backend, the reference first; then array-api-strict, once, since it is made to be strict and not fast."""
    names = [
        info.name for info in rectilinear.list_backends() if info.usable and info.name not in ("generic", "dask")
    ]  # which serve their own arrays, and are never chosen
    names.sort(key=lambda name: name != REFERENCE)
    backends = [Contestant(name, name, (), trainings) for name in names]
    return [*backends, Contestant("array-api-strict", REFERENCE, ("--xp", "array_api_strict"), 1)]


# ---------------------------------------------------------------- training


def train(contestant: Contestant, epochs: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "runs.json")
        seeds = [str(SEED)] * contestant.trainings
        command = [sys.executable, SCRIPT, "--json", path, "--epochs", str(epochs), "--seeds", *seeds, *contestant.options]
        environment = ONE_BLAS_THREAD | os.environ | {"RECTILINEAR_BACKEND": contestant.backend}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{contestant.name}: training failed\n{done.stdout}{done.stderr}")
        return Result(contestant.name, [Run(**run) for run in json.loads(path.read_text())])


def train_all(trainings: int, epochs: int, console: Console) -> list[Result]:
    results = []
    columns = (TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        everyone = contestants(trainings)
        task = progress.add_task("", total=len(everyone))
        for contestant in everyone:
            progress.update(task, description=contestant.name)
            results.append(train(contestant, epochs))
            progress.advance(task)
    return results


# ---------------------------------------------------------------- what is shown


def table(results: Sequence[Result], trainings: int) -> Table:
    rows = Table(title="Two-layer net on handwritten digits", title_justify="left")
    rows.add_column("backend")
    for heading in ("seconds", "final loss", "test\naccuracy", f"loss curve: largest\ndifference from {REFERENCE}"):
        rows.add_column(heading, justify="right")
    for result in results:
        run = result.runs[0]
        seconds = statistics.median(run.seconds for run in result.runs)
        difference = "-" if result is results[0] else f"{np.abs(result.losses - results[0].losses).max():.1e}"
        once = " (once)" if len(result.runs) < trainings else ""
        rows.add_row(result.name, f"{seconds:.2f}{once}", f"{run.final_loss:.6f}", f"{run.accuracy:.2%}", difference)
    rows.caption = (
        f"seconds: median of {trainings} trainings; final loss: mean over the last epoch\n"
        "one BLAS thread, unless OPENBLAS_NUM_THREADS or MKL_NUM_THREADS says otherwise"
    )
    return rows


def left_out() -> list[str]:
    return [f"not run: {info.name}: {info.reason}" for info in rectilinear.list_backends() if not info.usable]


def picture(results: Sequence[Result], test: Data, path: Path) -> None:
    """Loss curves and their differences on the left; test digits with the first result's predictions on the right."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 6.2), layout="constrained", dpi=120)
    curves, images = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    draw_curves(curves, results)
    draw_digits(images, test, np.array(results[0].runs[0].predicted))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def draw_curves(figure: mpl.figure.SubFigure, results: Sequence[Result]) -> None:
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(1.4, 1))
    reference = results[0].losses
    for place, result in enumerate(results):
        # They lie on one another: the first is the widest, and the later ones leave gaps.
        style = {"linewidth": 1 + 4 * 0.5**place, "linestyle": ("solid", (0, (4, 2)), (0, (1, 2)))[min(place, 2)], "color": f"C{place}"}
        losses.semilogy(smooth(result.losses), label=result.name, **style)
        if place:
            differences.plot(np.abs(result.losses - reference), color=f"C{place}", linewidth=0.8)
    losses.set(ylabel="loss (mean of 43 batches)", title="Softmax loss while training")
    losses.legend(frameon=False)
    # Linear below 1e-16, since a difference may well be exactly 0; at least up to what float64's rounding explains.
    differences.set_yscale("symlog", linthresh=1e-16)
    differences.set(xlabel="batch", ylabel=f"difference from {REFERENCE}", ylim=(0, max(1e-13, differences.get_ylim()[1])))
    for axes in (losses, differences):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def draw_digits(figure: mpl.figure.SubFigure, test: Data, predicted: np.ndarray, rows: int = 6, columns: int = 8) -> None:
    """All that went wrong, as far as they fit, then the first that went right."""
    wrong = np.flatnonzero(predicted != test.y)
    right = np.flatnonzero(predicted == test.y)
    shown = np.concatenate([wrong, right])[: rows * columns]
    figure.suptitle(f"Test digits as the net reads them, its errors first: {len(right)} of {len(test.y)} right")
    for axes, index in zip(figure.subplots(rows, columns).flat, shown, strict=False):
        correct = predicted[index] == test.y[index]
        axes.imshow(test.x[index].reshape(8, 8), cmap="gray_r")
        axes.set_title(f"{predicted[index]}" if correct else f"{predicted[index]}, not {test.y[index]}", fontsize=10)
        axes.title.set_color("C0" if correct else "C3")
        axes.set_axis_off()


def smooth(losses: np.ndarray, window: int = 43) -> np.ndarray:
    """Running mean over an epoch's number of batches."""
    return np.convolve(losses, np.ones(window) / window, mode="valid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"))
    parser.add_argument("--hot-path", action=argparse.BooleanOptionalAction, default=True, help="then measure the hot path side by side")
    options = parser.parse_args()

    console = Console()
    results = train_all(options.trainings, options.epochs, console)
    picture(results, digits(SEED)[1], options.out)
    console.print(table(results, options.trainings))
    # Not as markup: rich would take the brackets of "pip install rectilinear[cuda13]" for a style.
    console.print(*left_out(), f"picture: {options.out}", sep="\n", markup=False)
    if options.hot_path:
        if not console.is_terminal:
            console.print("measuring the hot path, about a minute")
        hot_path.show(console, options.out.with_name("hot_path.png"))


if __name__ == "__main__":
    main()
