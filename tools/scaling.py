"""What training over a Dask cluster costs beside the kernels: measured here, and worked out for clusters that are not here.

    python tools/scaling.py            measure on this host (3 minutes), into docs/scaling.json, and do the rest
    python tools/scaling.py --draw     the picture docs/figures/scaling.svg and the tables in docs/scaling.md, from docs/scaling.json

The workers are processes on one host that talk over the loopback device, so times of the network itself are calculated, not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import rectilinear as r
from rectilinear import nn
from rectilinear.backends import registry
from rectilinear.threads import available_cores

DOCS = Path(__file__).resolve().parent.parent / "docs"
NETS = {"784-512-256-10": (784, 512, 256, 10), "4096-4096-4096-10": (4096, 4096, 4096, 10)}
ROWS = 4096
"""Rows of a worker in a step, where the batch grows with the workers."""
BATCH = 65536
"""Rows of a step, where it does not."""
NETWORKS = {"10 Gbit/s": 10e9 / 8, "100 Gbit/s": 100e9 / 8}
WORKERS = [2**i for i in range(1, 11)]
TURNS = 5
SIZE = 1
"""--quick divides what is measured by more, for a host that is busy."""


def net_of(widths: tuple[int, ...]) -> nn.Sequential:
    rng = np.random.default_rng(0)
    hidden = [nn.AffineReLU(a, b, rng=rng) for a, b in pairwise(widths[:-1])]
    return nn.Sequential(*hidden, nn.Affine(*widths[-2:], rng=rng))


def best(function: Callable[[], object], turns: int = TURNS) -> float:
    """The least of some times, in seconds: what else the host does only adds to them."""
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


# ---------------------------------------------------------------- measured


def measure() -> dict[str, Any]:
    from dask.distributed import Client, LocalCluster

    cores = available_cores()
    found: dict[str, Any] = {
        "simd": next(row.simd for row in r.list_backends() if row.name == "numba"),
        "cores": cores,
        "python": platform.python_version(),
        "dask": __import__("dask").__version__,
        "load": os.getloadavg()[0],
        "kernels": kernels(),
    }
    with LocalCluster(n_workers=cores, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster, Client(cluster) as client:
        for name, part in (("task_s", task), ("steps", step), ("moved", moved), ("passes", passes)):
            found[name] = part(client)
            print(name, found[name], flush=True)
    return found


def kernels() -> dict[str, dict[str, float]]:
    """Of one thread: seconds a row for forward, loss and backward; and seconds to add up gradients of eight chunks."""
    from rectilinear.dask import _total

    found = {}
    with r.num_threads(1):
        for name, widths in NETS.items():
            net, loss, rows = net_of(widths), nn.SoftmaxCrossEntropy(), (ROWS if widths[0] < 1000 else 512) // SIZE
            x, y = np.ones((rows, widths[0]), np.float32), np.zeros(rows, int)

            def once(net: Any = net, loss: Any = loss, x: Any = x, y: Any = y) -> None:
                loss.forward(net.forward(x), y)
                net.backward(loss.backward())

            once()
            grads = 0.0, net.grads
            found[name] = {
                "row_s": best(once) / rows,
                "sum_of_8_s": best(lambda grads=grads: _total([grads] * 8)),
                "bytes": sum(w.nbytes for w in net.params.values()),
            }
    return found


def task(client: Any) -> float:
    """Of one task that does nothing, among many: scheduler, worker and messages."""
    count = 1000 // SIZE

    def run() -> None:
        stamp = time.time_ns()
        client.get({f"nothing-{stamp}-{i}": (len, ()) for i in range(count)}, [f"nothing-{stamp}-{i}" for i in range(count)])

    run()
    return best(run) / count


def step(client: Any) -> dict[str, float]:
    """Of a step of `fit` on a net that computes next to nothing: what it takes once, and what each chunk adds."""
    import dask.array as da

    from rectilinear.dask import fit

    net = net_of((8, 8, 8))
    optimizer = nn.SGD(net, lr=1e-3)
    times = {}
    for chunks in (2, 32):
        x = da.ones((8 * chunks, 8), chunks=(8, 8), dtype=np.float32).persist()
        at: list[float] = []
        how = {"loss": nn.SoftmaxCrossEntropy(), "optimizer": optimizer, "epochs": 40 // SIZE, "batch_size": 8 * chunks}
        fit(net, x, np.zeros(8 * chunks, int), **how, client=client, progress=lambda _, at=at: at.append(time.perf_counter()))
        steps = np.diff(at[5:])
        times[chunks] = float(np.quantile(steps, 0.1))
    each = (times[32] - times[2]) / 30
    return {"chunk_s": each, "step_s": times[2] - 2 * each}


def moved(client: Any) -> list[dict[str, Any]]:
    """Bytes between workers in a step, against the least that any tree moves: parameters to all but one, and as many gradients back."""
    import dask.array as da
    from dask.distributed import wait

    from rectilinear.dask import fit

    def received(dask_worker: Any) -> int:
        return sum(entry["total"] for entry in dask_worker.transfer_incoming_log)

    found = []
    workers, rows = len(client.nthreads()), 2048
    for chunks in (workers, 4 * workers, 16 * workers):
        net = net_of((256, 512, 10))
        size = sum(w.nbytes for w in net.params.values())
        x = da.random.default_rng(0).standard_normal((rows * chunks, 256), dtype=np.float32, chunks=(rows, -1)).persist()
        y = da.zeros(rows * chunks, dtype=int, chunks=rows).persist()
        wait([x, y])
        how = {"loss": nn.SoftmaxCrossEntropy(), "optimizer": nn.SGD(net, lr=1e-3), "batch_size": rows * chunks, "client": client}
        fit(net, x, y, **how, epochs=2, progress=False)
        before = sum(client.run(received).values())
        steps = 10 // SIZE
        fit(net, x, y, **how, epochs=steps, progress=False)
        between = (sum(client.run(received).values()) - before) / steps
        found.append({"chunks": chunks, "parameters": size, "between": between, "least": 2 * (workers - 1) * size})
    return found


def passes(client: Any) -> list[dict[str, Any]]:
    """The layer functions on dask arrays: one task a chunk, against the generic backend's operations, and against one process."""
    import dask
    import dask.array as da
    from dask.base import collections_to_expr

    rows, widths = 32768 // SIZE, NETS["784-512-256-10"]
    params = [(layer.params["w"], layer.params["b"]) for layer in net_of(widths)]

    def run(x: Any, y: Any, params: Any) -> list[Any]:
        caches, grads = [], []
        for w, b in params[:-1]:
            x, cache = r.affine_relu_forward(x, w, b)
            caches.append(cache)
        scores, last = r.affine_forward(x, *params[-1])
        loss, dx = r.softmax_loss(scores, y)
        dx, *pair = r.affine_backward(dx, last)
        grads += pair
        for i, cache in reversed(list(enumerate(caches))):
            dx, *pair = r.affine_relu_backward(dx, cache, needs=(i > 0, True, True))
            grads += pair
        return [loss, *grads]

    found = []
    here = np.random.default_rng(0).standard_normal((rows, widths[0]), dtype=np.float32), np.zeros(rows, int)
    lazy = [tuple(da.from_array(a, chunks=-1) for a in pair) for pair in params]
    for chunks in (8, 64):
        x = da.random.default_rng(0).standard_normal(here[0].shape, dtype=np.float32, chunks=(rows // chunks, -1)).persist()
        y = da.zeros(rows, dtype=int, chunks=rows // chunks).persist()
        row: dict[str, Any] = {"chunks": chunks, "rows": rows}
        times: dict[str, list[float]] = {"generic": [], "dask": []}
        for _ in range(TURNS):
            for way, seconds in times.items():
                with served_by(way):
                    start = time.perf_counter()
                    results = run(x, y, lazy)
                    dask.compute(*results)
                    seconds.append(time.perf_counter() - start)
                    row[f"{way}_tasks"] = len(list(collections_to_expr(results).optimize().__dask_graph__()))
        row |= {f"{way}_s": min(seconds) for way, seconds in times.items()}
        row["dask_against_generic"] = statistics.median(a / b for a, b in zip(times["generic"], times["dask"], strict=True))
        row["one_process_s"] = best(lambda: run(*here, params))
        found.append(row)
    return found


class served_by:
    """Who serves dask arrays within the block."""

    def __init__(self, way: str) -> None:
        self._way = way

    def __enter__(self) -> None:
        registry._plug_ins().servers["dask"] = self._way
        self._kept = registry._SERVERS.pop("dask")

    def __exit__(self, *_: object) -> None:
        registry._SERVERS["dask"] = self._kept


# ---------------------------------------------------------------- calculated


def seconds_of_a_step(found: dict[str, Any], net: str, workers: int, rows: int, bandwidth: float) -> dict[str, float]:
    """Where the time of a step goes, one chunk a worker and `rows` rows in each.

    Parameters reach the first worker from the caller through the scheduler, and from there everyone by doubling; the tree takes seven of
    eight gradients over the network at each level, and the last sum goes to the caller the way that the parameters came.
    """
    from rectilinear.backends.dask_backend import FAN_IN

    kernel = found["kernels"][net]
    hop = kernel["bytes"] / bandwidth
    levels = math.ceil(math.log(workers, FAN_IN)) if workers > 1 else 0
    return {
        "kernels": rows * kernel["row_s"],
        "scheduling": found["steps"]["step_s"] + workers * found["steps"]["chunk_s"],
        "parameters": (2 + math.ceil(math.log2(workers))) * hop,
        "gradients": levels * ((FAN_IN - 1) * hop + kernel["sum_of_8_s"]) + 2 * hop,
    }


def rate(found: dict[str, Any], net: str, workers: int, bandwidth: float, *, grows: bool) -> tuple[float, float]:
    """Rows a second, and the share of it that the kernels have."""
    rows = ROWS if grows else BATCH / workers
    parts = seconds_of_a_step(found, net, workers, rows, bandwidth)
    total = sum(parts.values())
    return rows * workers / total, parts["kernels"] / total


def measured(found: dict[str, Any]) -> str:
    """The tables of what was measured, as Markdown."""
    steps, kernels = found["steps"], found["kernels"]
    lines = [
        f"On a host of {found['cores']} cores, {found['simd']}, as many worker processes of one thread, dask {found['dask']}; "
        f"load of the host when it began: {found['load']:.1f}.",
        "",
        "| | |",
        "| --- | ---: |",
        f"| a task that does nothing, among many | {found['task_s'] * 1e3:.2f} ms |",
        f"| a step of `fit`, whatever its size | {steps['step_s'] * 1e3:.1f} ms |",
        f"| each chunk of a step, kernels aside | {steps['chunk_s'] * 1e3:.2f} ms |",
    ]
    for net, kernel in kernels.items():
        lines += [
            f"| {net}, one thread: forward, loss, backward | {1 / kernel['row_s']:,.0f} rows a second |",
            f"| {net}: adding up eight gradients of {kernel['bytes'] / 2**20:.1f} MiB | {kernel['sum_of_8_s'] * 1e3:.1f} ms |",
        ]
    lines += [
        "",
        "| chunks in a step | bytes between the workers | the least | ratio |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for row in found["moved"]:
        between, least = row["between"], row["least"]
        lines.append(f"| {row['chunks']} | {between / 2**20:.2f} MiB | {least / 2**20:.2f} MiB | {between / least:.1f} |")
    lines += [
        "",
        "A training step of 784-512-256-10 by the layer functions, one task a chunk, against the generic backend's operations one by "
        "one on the same dask arrays (in turns; the ratio is the median of theirs), and against one process on NumPy arrays, all cores:",
        "",
        "| rows | chunks | tasks | generic: tasks | seconds | generic: seconds | ratio | one process: seconds |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found["passes"]:
        lines.append(
            f"| {row['rows']:,} | {row['chunks']} | {row['dask_tasks']} | {row['generic_tasks']} "
            f"| {row['dask_s']:.2f} | {row['generic_s']:.2f} | {row['dask_against_generic']:.2f} | {row['one_process_s']:.2f} |"
        )
    return "\n".join(lines)


def calculated(found: dict[str, Any]) -> str:
    """The tables of what was calculated: speeds, and up to where the kernels have half of the time."""
    lines = ["| net | batch | network | kernels have half of the time up to | most rows a second |", "| --- | --- | --- | ---: | ---: |"]
    for net in NETS:
        for grows in (True, False):
            for name, bandwidth in NETWORKS.items():
                rates = {workers: rate(found, net, workers, bandwidth, grows=grows) for workers in WORKERS}
                half = max((workers for workers, (_, share) in rates.items() if share >= 0.5), default=1)
                top = max(rates, key=lambda workers, rates=rates: rates[workers][0])
                batch = f"{ROWS:,} rows a worker" if grows else f"{BATCH:,} rows"
                lines.append(f"| {net} | {batch} | {name} | {half} workers | {rates[top][0]:,.0f}, with {top} workers |")
    for grows in (True, False):
        heads = [f"{net}, {name}" for net in NETS for name in NETWORKS]
        lines += ["", f"Rows a second (share of the kernels), {f'{ROWS:,} rows a worker' if grows else f'{BATCH:,} rows in all'}:", ""]
        lines += ["| workers | " + " | ".join(heads) + " |", "| ---: |" + " ---: |" * len(heads)]
        for workers in WORKERS:
            cells = [rate(found, net, workers, bandwidth, grows=grows) for net in NETS for bandwidth in NETWORKS.values()]
            lines.append(f"| {workers} | " + " | ".join(f"{rows:,.0f} ({share:.0%})" for rows, share in cells) + " |")
    return "\n".join(lines)


def fill(page: Path, tables: dict[str, str]) -> None:
    """Put the tables between the marks of their names."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        head, mark, rest = text.partition(f"<!-- {name}: tools/scaling.py writes what is between these lines -->\n")
        text = head + mark + "\n" + table + "\n\n" + rest[rest.index("<!-- end -->") :]
    page.write_text(text, encoding="utf-8")


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "rectilinear", "svg.fonttype": "none"}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, net in zip(axes, NETS, strict=True):
        one = 1 / found["kernels"][net]["row_s"]
        axis.plot(WORKERS, WORKERS, color="0.75", lw=1)
        axis.annotate("all of each worker", (2.2, 2.9), color="0.45", rotation=34, fontsize=9)
        for (name, bandwidth), colour in zip(NETWORKS.items(), ("#c2410c", "#1f3552"), strict=True):
            for grows, style in ((True, "-"), (False, "--")):
                speed = [rate(found, net, workers, bandwidth, grows=grows)[0] / one for workers in WORKERS]
                label = f"{name}, {ROWS:,} rows a worker" if grows else f"{name}, {BATCH:,} rows in all"
                axis.plot(WORKERS, speed, style, color=colour, marker="o", ms=3, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(WORKERS, [str(workers) for workers in WORKERS])
        ticks = [2.0**i for i in range(-2, 11, 2)]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ylim(0.25, 1500)
        axis.set_title(net, fontsize=11)
        axis.set_xlabel("workers of one thread")
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("speed, in workers without a network")
    axes[0].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.0, 0.9))
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure less")
    parser.add_argument("--draw", action="store_true", help="only the picture and the tables, from what was measured before")
    options = parser.parse_args()
    if options.quick:
        globals().update(TURNS=2, SIZE=4)
    record = DOCS / "scaling.json"
    if not options.draw:
        record.write_text(json.dumps(measure(), indent=2) + "\n", encoding="utf-8")
    found = json.loads(record.read_text(encoding="utf-8"))
    draw(found, DOCS / "figures" / "scaling.svg")
    fill(DOCS / "scaling.md", {"measured": measured(found), "calculated": calculated(found)})
    print(f"written: {record}, figures/scaling.svg, and the tables of scaling.md")


if __name__ == "__main__":
    main()
