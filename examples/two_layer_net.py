"""A two-layer net on handwritten digits: affine - ReLU - affine - softmax, as in CS231n, assignment 1.

    python examples/two_layer_net.py                              train and test for seeds 0 to 4
    RECTILINEAR_BACKEND=numpy python examples/two_layer_net.py    the same on a backend of your choice
    python examples/two_layer_net.py --xp array_api_strict        the same on the arrays of another library
    python examples/two_layer_net.py --capture                    the same with each training step recorded as a CUDA graph, on a GPU
    python examples/two_layer_net.py --choose                     how WIDTH and EPOCHS were chosen

The data are the 1,797 digits of 8 x 8 pixels that come with scikit-learn. Each seed sets aside a quarter of them for
the test, at random and with every digit in proportion; it also draws the weights and the order of the batches.

How WIDTH and EPOCHS were chosen, without a look at any test set: `--choose` holds back a fifth of each seed's training
part, trains on the rest, and prints the accuracy on what was held back, averaged over the seeds, for every pair out of
TRIED_WIDTHS and TRIED_EPOCHS; the best pair was taken. Nothing else was searched: learning rate, momentum, decay and
batch size are usual values for a net of this size. One caveat: a seed's test images are in other seeds' training parts.
So `--choose` ends with the test accuracy that results when every seed uses the pair which did best on its own held-back
images, where no test image can have had a say.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rectilinear
from rectilinear.nn import SGD, Affine, AffineReLU, Sequential, SoftmaxCrossEntropy

SEEDS = (0, 1, 2, 3, 4)
WIDTH, EPOCHS = 256, 60
TRIED_WIDTHS, TRIED_EPOCHS = (32, 64, 128, 256), (10, 20, 30, 40, 60)
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, BATCH = 0.1, 0.9, 1e-4, 32
PIXELS, CLASSES = 64, 10

Build = Callable[[int, np.random.Generator], Sequential]
"""Width and generator to an untrained net."""


class Data(NamedTuple):
    """Images (N, 64), from 0 to 1, and labels (N,)."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Run:
    """One training and its test."""

    seed: int
    seconds: float
    losses: list[float]  # one a batch
    final_loss: float  # mean over the last epoch
    accuracy: float
    predicted: list[int]  # of the test images


# ---------------------------------------------------------------- data


def digits(seed: int) -> tuple[Data, Data]:
    """The training part and the test part."""
    images = load_digits()
    return split(Data(images.data / 16, images.target), 0.25, seed)


def split(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    x, x_aside, y, y_aside = train_test_split(*data, test_size=share, stratify=data.y, random_state=seed)
    return Data(x, y), Data(x_aside, y_aside)


# ---------------------------------------------------------------- the net


def two_layer_net(width: int, rng: np.random.Generator, **where: object) -> Sequential:
    return Sequential(AffineReLU(PIXELS, width, rng=rng, **where), Affine(width, CLASSES, rng=rng, **where))


def train(
    net: Sequential, data: Data, epochs: int, rng: np.random.Generator, after_epoch: Callable[[int], None], capture: bool = False
) -> list[float]:
    """Stochastic gradient descent on the softmax loss. Returns the loss of every batch."""
    criterion, optimizer = SoftmaxCrossEntropy(), SGD(net, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY)

    def step(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        loss = criterion.forward(net.forward(x), y)
        net.backward(criterion.backward())
        optimizer.step()
        return loss

    if capture:
        step = rectilinear.capture(step, copies=True)  # every loss is to be kept
    losses = []
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(data.x))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            losses.append(step(rectilinear.asarray(data.x[batch]), rectilinear.asarray(data.y[batch])))
        after_epoch(epoch)
    return [float(rectilinear.to_numpy(loss)) for loss in losses]  # at the end, since each waits for a GPU


def predict(net: Sequential, x: np.ndarray) -> np.ndarray:
    return rectilinear.to_numpy(net.forward(x, training=False)).argmax(axis=1)


# ---------------------------------------------------------------- what one seed does


def run(build: Build, seed: int, width: int, epochs: int, tick: Callable[[int], None] = lambda epoch: None, capture: bool = False) -> Run:
    """Train on the whole training part, test on the test part."""
    training, test = digits(seed)
    rng = np.random.default_rng(seed)
    start = time.perf_counter()
    net = build(width, rng)
    losses = train(net, training, epochs, rng, tick, capture)
    seconds = time.perf_counter() - start
    predicted = predict(net, test.x)
    last_epoch = losses[-(len(losses) // epochs) :]
    accuracy = float((predicted == test.y).mean())
    return Run(seed, seconds, losses, statistics.fmean(last_epoch), accuracy, predicted.tolist())


def validate(build: Build, seed: int, width: int, tick: Callable[[int], None] = lambda epoch: None) -> list[float]:
    """The accuracy on a fifth of the training part, held back from training, after each of TRIED_EPOCHS."""
    training, held_back = split(digits(seed)[0], 0.2, seed)
    rng = np.random.default_rng(seed)
    net = build(width, rng)
    scores = []

    def look(epoch: int) -> None:
        if epoch in TRIED_EPOCHS:
            scores.append(float((predict(net, held_back.x) == held_back.y).mean()))
        tick(epoch)

    train(net, training, max(TRIED_EPOCHS), rng, look)
    return scores


# ---------------------------------------------------------------- all seeds, and what is printed


def run_all(build: Build, seeds: Sequence[int], epochs: int, console: Console, capture: bool = False) -> list[Run]:
    table = Table("seed", "seconds", "final loss", "test accuracy")
    runs = []
    with _progress(console) as progress:
        for seed in seeds:
            task = progress.add_task(f"seed {seed}", total=epochs)
            done = run(build, seed, WIDTH, epochs, lambda epoch, task=task: progress.update(task, completed=epoch), capture)
            runs.append(done)
            table.add_row(str(seed), f"{done.seconds:.2f}", f"{done.final_loss:.5f}", f"{done.accuracy:.2%}")
    scores = [done.accuracy for done in runs]
    console.print(table, f"test accuracy: mean {statistics.fmean(scores):.2%}, lowest {min(scores):.2%}", sep="\n")
    return runs


def choose(build: Build, seeds: Sequence[int], console: Console) -> None:
    pairs = [(width, epochs) for width in TRIED_WIDTHS for epochs in TRIED_EPOCHS]
    scores = []  # [seed][pair]
    own = []
    with _progress(console) as progress:
        task = progress.add_task("validation", total=len(seeds) * (len(TRIED_WIDTHS) + 1))
        for seed in seeds:
            scores.append([])
            for width in TRIED_WIDTHS:
                scores[-1] += validate(build, seed, width)
                progress.advance(task)
            width, epochs = pairs[int(np.argmax(scores[-1]))]
            own.append((seed, width, epochs, run(build, seed, width, epochs).accuracy))
            progress.advance(task)
    mean = np.mean(scores, axis=0)
    table = Table("width", *(f"{epochs} epochs" for epochs in TRIED_EPOCHS), title="mean validation accuracy")
    for width, row in zip(TRIED_WIDTHS, mean.reshape(len(TRIED_WIDTHS), -1), strict=True):
        table.add_row(str(width), *(f"{score:.2%}" for score in row))
    console.print(table, "best: width {}, {} epochs".format(*pairs[int(mean.argmax())]), sep="\n")
    for seed, width, epochs, score in own:
        console.print(f"seed {seed} alone would take width {width}, {epochs} epochs: test accuracy {score:.2%}")
    console.print(f"mean {statistics.fmean(score for *_, score in own):.2%}")


def _progress(console: Console) -> Progress:
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--dtype", default="float64", choices=("float32", "float64"))
    parser.add_argument("--xp", metavar="MODULE", help="array API library to keep the parameters in")
    parser.add_argument("--capture", action="store_true", help="record each training step as a CUDA graph (with RECTILINEAR_BACKEND=cupy)")
    parser.add_argument("--json", metavar="FILE", help="write the runs there too")
    parser.add_argument("--choose", action="store_true", help="show how width and epochs were chosen")
    options = parser.parse_args()

    console = Console()
    xp = importlib.import_module(options.xp) if options.xp else None
    build = functools.partial(two_layer_net, dtype=options.dtype, xp=xp)
    home = type(build(1, np.random.default_rng(0)).params["0.w"]).__module__.partition(".")[0]
    console.print(f"{rectilinear.get_backend()} backend, {options.dtype} parameters in {home}", highlight=False)
    if options.choose:
        choose(build, options.seeds, console)
        return
    runs = run_all(build, options.seeds, options.epochs, console, options.capture)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([asdict(done) for done in runs], file)


if __name__ == "__main__":
    main()
