"""The hot path side by side: a whole affine + ReLU step, forward and backward, under numba, in plain NumPy, and in PyTorch if it is there.

    python examples/hot_path.py    about a minute; ends with a table and out/hot_path.png

Every contestant runs in a process of its own and they take turns, as `python -m rectilinear bench` does it; that command
measures far more, and says what the machine could do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import matplotlib as mpl
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rectilinear.measure.cases import Case
from rectilinear.measure.figures import ratio
from rectilinear.measure.record import Figure, Record
from rectilinear.measure.run import Plan, run
from rectilinear.measure.subjects import PEERS, backend_subjects

SHAPES = ((1, 64, 64), (128, 784, 256), (1024, 1024, 1024), (65536, 64, 64))
OURS = "numba"
NAMES = {"numba": "rectilinear, numba", "cs231n": "plain NumPy", "torch": "PyTorch, autograd", "torch-lean": "PyTorch, leanest"}


def measure(console: Console) -> Record:
    """The step at every shape, float32, for numba and those of the peers that are installed."""
    backends, _ = backend_subjects()
    peers = [peer for peer in PEERS if peer.name == "cs231n" or (peer.name.startswith("torch") and find_spec("torch"))]
    subjects = [subject for subject in (*backends, *peers) if subject.name in NAMES]
    cases = [Case("step", shape, "float32") for shape in SHAPES]
    plan = Plan(cases=cases, subjects=subjects, missing={}, rounds=7, seconds=0.2, ceilings=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(cases))
        return run(plan, watch=lambda what, done: progress.update(task, description=what, completed=done))


def gflops(figure: Figure, name: str) -> float:
    return figure.case.flops / median(figure.seconds[name]) / 1e9


def table(record: Record) -> Table:
    rows = Table(title="A whole step, forward and backward, float32: GFLOP/s", title_justify="left", show_lines=True)
    rows.add_column("N, D, M")
    names = [name for name in NAMES if name in record.subjects]
    for name in names:
        rows.add_column(NAMES[name], justify="right")
    for figure in record.figures:
        cells = []
        for name in names:
            cell = f"{gflops(figure, name):.3g}" if name in figure.seconds else ""
            if name in figure.seconds and name != OURS and OURS in figure.seconds:
                cell += f"\nnumba {ratio(figure, OURS, name).mid:.2f} x"
            cells.append(cell)
        rows.add_row(", ".join(map(str, figure.shape)), *cells)
    settings = record.settings
    rows.caption = f"medians of {settings['rounds']} rounds in turns, threads: {settings['threads']}; ratios taken in each round"
    return rows


def picture(figures: Sequence[Figure], path: Path) -> None:
    """One group of bars a shape: how many times as fast as plain NumPy."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    names = [name for name in NAMES if any(name in figure.seconds for figure in figures)]
    axes = plt.figure(figsize=(10, 4.6), layout="constrained", dpi=120).subplots()
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        spreads = [ratio(figure, name, "cs231n") for figure in figures]
        at = [i + (place - (len(names) - 1) / 2) * width for i in range(len(figures))]
        color = ("#0072B2", "#999999", "#E69F00", "#D55E00")[list(NAMES).index(name)]
        bars = axes.bar(at, [spread.mid for spread in spreads], width * 0.92, label=NAMES[name], color=color)
        axes.bar_label(bars, [f"{gflops(figure, name):.3g}" for figure in figures], fontsize=9, padding=2)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(figures)), ["N, D, M =\n" + ", ".join(map(str, figure.shape)) for figure in figures])
    axes.set(
        ylabel="times as fast as plain NumPy", title="A whole affine + ReLU step, forward and backward, float32 (on the bars: GFLOP/s)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(names))
    axes.margins(y=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path)
    plt.close(axes.figure)


def show(console: Console, path: Path) -> None:
    """Measure, print the table, draw the picture."""
    record = measure(console)
    console.print(table(record))
    picture(record.figures, path)
    console.print(f"picture: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/hot_path.png"))
    show(Console(), parser.parse_args().out)
