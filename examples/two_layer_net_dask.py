"""The two-layer net on the workers of a Dask cluster: real digits first, then more data than the workers have memory for.

    python examples/two_layer_net_dask.py              both, with a worker killed on the way through the second
    python examples/two_layer_net_dask.py --workers 4  default: one for each core, of one thread
    python examples/two_layer_net_dask.py --rows 40000 a smaller generated set
    python examples/two_layer_net_dask.py --no-kill    let all workers live

The cluster is a `dask.distributed.LocalCluster` of processes. The digits are those that come with scikit-learn. The generated set is
drawn by the workers, chunk by chunk, and labelled by a net of fixed weights through the layer functions, which take dask arrays as any
other: it is never there as a whole, and has to be learned back.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from typing import Any

import dask.array as da
import numpy as np
from dask.distributed import Client, LocalCluster
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rectilinear
from rectilinear.dask import Progress, fit
from rectilinear.nn import SGD, Affine, AffineReLU, Sequential, SoftmaxCrossEntropy
from rectilinear.threads import available_cores

FEATURES, CLASSES = 1024, 10
CHUNK, BATCH = 2048, 8192
MEMORY = 600 * 2**20
"""Of each worker, in bytes; a worker that has done nothing yet has 150 to 250 MiB."""


def two_layer_net(features: int, width: int, dtype: str) -> Sequential:
    rng = np.random.default_rng(0)
    return Sequential(AffineReLU(features, width, rng=rng, dtype=dtype), Affine(width, CLASSES, rng=rng, dtype=dtype))


def accuracy(net: Sequential, x: Any, y: Any) -> Any:
    """Of NumPy arrays, or of dask arrays: then it is lazy too, and comes here as one number."""
    (w1, b1), (w2, b2) = ((layer.params["w"], layer.params["b"]) for layer in net)
    hidden, _ = rectilinear.affine_relu_forward(x, w1, b1)
    scores, _ = rectilinear.affine_forward(hidden, w2, b2)
    return (scores.argmax(axis=1) == y).mean()


def digits(client: Client, console: Console) -> None:
    images = load_digits()
    x, x_test, y, y_test = train_test_split(images.data / 16, images.target, stratify=images.target, random_state=0)
    net = two_layer_net(64, 256, "float64")
    optimizer = SGD(net, lr=0.3, momentum=0.9, weight_decay=1e-4)
    start = time.perf_counter()
    chunks = da.from_array(x, chunks=(128, 64)).persist()
    losses = fit(net, chunks, y, loss=SoftmaxCrossEntropy(), optimizer=optimizer, epochs=12, batch_size=256, client=client)
    console.print(
        f"digits: {len(x)} rows in {chunks.numblocks[0]} chunks, {len(losses)} steps in {time.perf_counter() - start:.1f} s, "
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}, test accuracy {accuracy(net, x_test, y_test):.2%}"
    )


def generated(rows: int, seed: int) -> tuple[Any, Any]:
    """x (rows, FEATURES) float32 and labels, neither of them anywhere yet."""
    rng = np.random.default_rng(1)
    x = da.random.default_rng(seed).standard_normal((rows, FEATURES), dtype="float32", chunks=(CHUNK, FEATURES))
    hidden, _ = rectilinear.affine_relu_forward(x, rng.standard_normal((FEATURES, 16)).astype("float32"), None)
    scores, _ = rectilinear.affine_forward(hidden, rng.standard_normal((16, CLASSES)).astype("float32"), None)
    return x, scores.argmax(axis=1)


def larger_than_memory(client: Client, rows: int, kill: bool, console: Console) -> None:
    x, y = generated(rows, seed=2)
    net = two_layer_net(FEATURES, 256, "float32")
    optimizer = SGD(net, lr=0.05, momentum=0.9)
    workers = len(client.nthreads())
    console.print(
        f"generated: {rows:,} rows in {x.numblocks[0]} chunks, {x.nbytes / 2**20:,.0f} MiB, "
        f"for {workers} workers of {MEMORY / 2**20:.0f} MiB each: {x.nbytes / (workers * MEMORY):.1f} times their memory"
    )
    peak = 0

    def watch(state: Progress) -> None:
        nonlocal peak
        known = client.scheduler_info()["workers"].values()
        peak = max([peak, *(worker["metrics"].get("memory", 0) for worker in known)])
        if state.step % 4 == 1:
            console.print(f"  step {state.step} of {state.steps}: loss {state.loss:.4f}", highlight=False)
        if kill and state.step == state.steps // 2:
            pid = next(iter(client.run(os.getpid).values()))
            os.kill(pid, signal.SIGKILL)
            console.print(f"  killed worker process {pid} after step {state.step}; training goes on", highlight=False)

    start = time.perf_counter()
    how = {"loss": SoftmaxCrossEntropy(), "optimizer": optimizer, "epochs": 1, "batch_size": BATCH}
    losses = fit(net, x, y, **how, client=client, progress=watch)
    console.print(
        f"generated: {len(losses)} steps in {time.perf_counter() - start:.1f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}, "
        f"most memory seen in a worker {peak / 2**20:.0f} MiB; "
        f"accuracy on other rows {float(accuracy(net, *generated(2 * CHUNK, seed=3))):.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--rows", type=int, default=655_360, help="of the generated set, of 4 KiB each")
    parser.add_argument("--no-kill", action="store_true", help="let all workers live")
    options = parser.parse_args()
    console = Console()
    rectilinear.warmup(["float32", "float64"])  # here: a compiler takes more memory than the workers are given, and they would stop for it
    with (
        LocalCluster(
            n_workers=options.workers, threads_per_worker=1, processes=True, memory_limit=MEMORY, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        threads = sum(client.nthreads().values())
        console.print(f"{options.workers} worker processes of one thread each: {threads} threads on {available_cores()} cores")
        digits(client, console)
        larger_than_memory(client, options.rows, not options.no_kill, console)


if __name__ == "__main__":  # worker processes import this file
    main()
