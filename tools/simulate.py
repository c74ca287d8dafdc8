"""Says, without running anything, how well the plans of the affine passes would use a machine of many cores.

``python tools/simulate.py`` prints, for each pass and shape, the share of what peak and memory bandwidth allow (the roofline) that so many
threads would reach. Every figure is a model's. A task takes as long as its multiply-adds at a core's peak and its copies within the caches;
what it moves to and from memory meanwhile it shares with the tasks beside it. Threads claim runs of tasks in their order, as in
`rectilinear.kernels.runtime.threads`, and a phase (packing, tasks, adding up) ends when all of them are done.

Helpers are taken to be awake. What stays in a cache: packed w or dz that is not longer than half of the last one, and operands that
another task reads again, likewise.
Results are counted twice, since a plain store first reads the line that it overwrites. The last cache is taken to be one for all cores.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rectilinear.kernels.loops.arithmetic import block_count, block_start, rows_start
from rectilinear.kernels.loops.host import Cache, Caches, Host, host_of
from rectilinear.kernels.loops.plan import BLOCK_ROWS, IN_PLACE, Backward, Matmul, plan
from rectilinear.kernels.micro.simd import AVX2, AVX512, NEON
from rectilinear.kernels.runtime.threads import TINY_WORK

Shape = tuple[int, int, int]

SHAPES: list[Shape] = [
    (1, 64, 64), (16, 128, 128), (100, 3072, 100), (128, 784, 256), (512, 512, 512), (256, 512, 10), (16384, 256, 256), (1024, 1024, 1024),
    (65536, 64, 64), (32768, 32, 128), (333, 777, 111), (256, 784, 512), (2048, 2048, 2048), (8, 1024, 1024), (4096, 4096, 1024),
]  # fmt: skip

THREADS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Machine:
    """Rates in one second. The defaults are round numbers of a server of 2023."""

    peak: float = 100e9
    """Floating-point operations of a core in float32; half as many in float64."""
    memory: float = 400e9
    """Bytes that all cores together move to and from memory."""
    core: float = 25e9
    """Of which one core alone moves so many."""
    copy: float = 50e9
    """Bytes that a core reads or writes while it copies within its caches."""
    claim: float = 100e-9
    """Seconds until a thread has its next run of tasks."""
    start: float = 2e-6
    """Seconds until all threads are at work on a phase, and noticed to be done."""


class Task(NamedTuple):
    operations: float = 0
    copied: float = 0
    """Bytes read and written by copying within the caches."""
    memory: float = 0
    """Bytes to and from memory."""


class Phase(NamedTuple):
    """Tasks that may all run at once, `run` of them claimed together; `repeats` times one after the other."""

    tasks: list[Task]
    run: int = 1
    repeats: int = 1


# What the passes do.


def blocks(extent: int, count: int) -> list[int]:
    return [block_start(extent, count, i + 1) - block_start(extent, count, i) for i in range(count)]


def blocks_of_rows(host: Host, rows: int, count: int) -> list[int]:
    return [rows_start(rows, host.rows, count, i + 1) - rows_start(rows, host.rows, count, i) for i in range(count)]


def padded(host: Host, columns: int, width: int) -> int:
    """Columns that tiles compute: the last panel is as narrow as it may be."""
    nr = width * host.lanes
    last = columns % nr
    while last and width > max(1, host.vectors // 2) and last * 2 <= width * host.lanes:
        width //= 2
    return columns // nr * nr + (width * host.lanes if last else 0)


def again(host: Host, size: int, times: int) -> float:
    """The share of one reading of so many bytes that comes from memory, where they are read so many times."""
    return 1 / times if size <= host.past else 1


def forward_phases(job: Matmul, host: Host) -> Iterator[Phase]:
    chosen, tasks, size = job.plan, job.tasks, host.itemsize
    nr = chosen.width * host.lanes
    panels = block_count(job.m, nr)
    packed = panels * nr * job.k * size
    stays = tasks.parts > 0 and packed <= host.past
    prepared = [Task(copied=2 * part, memory=part * (1 if stays else 3)) for part in blocks(packed, tasks.parts)]
    prepared += [Task(copied=2 * rows * job.k * size, memory=rows * job.k * size) for rows in blocks(job.n, tasks.copies)]
    if prepared:
        yield Phase(prepared * job.groups)
    made = []
    for panels_of_task in blocks(panels, tasks.columns):
        columns = min(panels_of_task * nr, job.m)
        for rows in blocks_of_rows(host, job.n, tasks.rows):
            x, w, out = rows * job.k * size, columns * job.k * size, rows * columns * size
            copied = 2 * x * (chosen.a != IN_PLACE and tasks.copies == 0) + 2 * w * tasks.packs
            # Tasks of the same columns come one after the other.
            memory = x * again(host, job.n * job.k * size, tasks.columns) + (0 if stays else w * again(host, w, tasks.rows)) + 2 * out
            made.append(Task(2 * rows * job.k * padded(host, columns, chosen.width), copied, memory))
    yield Phase(made * job.groups, tasks.run)


def backward_phases(job: Backward, host: Host) -> Iterator[Phase]:
    yield from slab_phases(job, host) if job.plan.by_slabs else block_phases(job, host)


def slab_phases(job: Backward, host: Host) -> Iterator[Phase]:
    chosen, size, d, m = job.plan, host.itemsize, job.d, job.m
    made = []
    for rows in blocks(job.n, chosen.slabs):
        operations = 2 * rows * (m * padded(host, d, host.vectors) + d * padded(host, m, host.vectors))
        of_x = job.to_dw.plan.b if chosen.dw_by_columns else job.to_dw.plan.a
        copied = 2 * (rows * m + rows * d * (of_x != IN_PLACE) + d * m) * size
        made.append(Task(operations, copied, (rows * m + 3 * rows * d) * size))
    yield Phase(made * job.groups, job.tasks.run)
    if chosen.slabs > 1:
        down, across = (m, d) if chosen.dw_by_columns else (d, m)
        yield Phase([Task(copied=(chosen.slabs + 1) * rows * across * size) for rows in blocks(down, job.tasks.adders)] * job.groups)


def block_phases(job: Backward, host: Host) -> Iterator[Phase]:
    """Stretches are taken to be of equal length."""
    chosen, tasks, size, d, m = job.plan, job.tasks, host.itemsize, job.d, job.m
    dx, dw, nr = job.to_dx, job.to_dw, host.vectors * host.lanes
    stretches = block_count(job.n, chosen.stretch)
    count = -(-job.n // stretches)
    repeats = job.groups * stretches
    pieces = -(-count // BLOCK_ROWS)
    # Where every thread packs all of dz they do so at the same time.
    parts_of_dz = [rows * part for rows in blocks(count, pieces) for part in blocks(m, tasks.z_parts)] if tasks.z_parts else [count * m]
    parts_of_x = [rows * columns for rows in blocks(count, pieces) for columns in blocks(d, tasks.x_parts)] if tasks.x_parts else []
    dz_twice = dw.plan.b != IN_PLACE and not chosen.dw_by_columns  # in rows, and in panels
    packing = [Task(copied=(4 if dz_twice else 2) * part * size, memory=part * size) for part in parts_of_dz]
    packing += [Task(copied=2 * part * size, memory=part * size) for part in parts_of_x]
    panel = m * nr * size
    if dx.tasks.parts:
        panels_of_w = blocks(block_count(d, nr), dx.tasks.parts)
        yield Phase([Task(copied=2 * part * panel, memory=part * panel) for part in panels_of_w] + packing)
        yield Phase(packing, repeats=repeats - 1)
    else:
        yield Phase(packing, repeats=repeats)
    yield Phase([Task(copied=pieces * m * 16)], repeats=repeats)  # the sums of db, by the caller alone
    made = []
    panels = block_count(d, nr)
    for panels_of_task in blocks(panels, dx.tasks.columns):
        columns = min(panels_of_task * nr, d)
        for rows in blocks_of_rows(host, count, dx.tasks.rows):
            packs = 2 * columns * m * size * dx.tasks.packs
            w = columns * m * size * (1 if dx.tasks.parts == 0 else again(host, d * m * size, dx.tasks.rows) if stretches > 1 else 0)
            made.append(Task(2 * rows * m * padded(host, columns, host.vectors), packs, w + 2 * rows * columns * size))
    down, across = (m, d) if chosen.dw_by_columns else (d, m)
    dw_share = 1 if d * m * size > host.past else 1 / stretches
    for rows in blocks_of_rows(host, down, dw.tasks.rows):
        for panels_of_task in blocks(block_count(across, dw.plan.width * host.lanes), dw.tasks.columns):
            columns = min(panels_of_task * dw.plan.width * host.lanes, across)
            x, a = count * (columns if chosen.dw_by_columns else rows) * size, count * rows * size
            times = dw.tasks.rows if chosen.dw_by_columns else dw.tasks.columns
            memory = x * again(host, count * d * size, times) + 2 * rows * columns * size * dw_share
            made.append(Task(2 * rows * count * padded(host, columns, host.vectors), 2 * a * (dw.plan.a != IN_PLACE), memory))
    yield Phase(made, repeats=repeats)


# Threads.


def seconds_of(phase: Phase, threads: int, machine: Machine) -> float:
    """From the start of a phase to its end, once."""
    runs = [phase.tasks[i : i + phase.run] for i in range(0, len(phase.tasks), phase.run)]
    waiting = iter([_alone(run, machine) for run in runs])
    active: list[list[float]] = []  # what is left of a run, as a share of it; its seconds alone; its bytes a second then
    now = 0.0
    while True:
        while len(active) < threads and (run := next(waiting, None)):
            active.append([1.0, *run])
        if not active:
            return now + (machine.start if threads > 1 else 0)
        level = _level(sorted(run[2] for run in active), machine.memory)
        # A run that wants more than its share of the memory's bandwidth goes as slow as that makes it.
        rates = [(1 if rate <= level else level / rate) / alone for _, alone, rate in active]
        step = min(run[0] / rate for run, rate in zip(active, rates, strict=True))
        now += step
        for run, rate in zip(active, rates, strict=True):
            run[0] -= rate * step
        active = [run for run in active if run[0] > 1e-9]


def _alone(run: list[Task], machine: Machine) -> tuple[float, float]:
    """Seconds of a run on an idle machine, and the bytes that it moves in each."""
    memory = sum(task.memory for task in run)
    work = sum(task.operations / machine.peak + task.copied / machine.copy for task in run)
    seconds = machine.claim + max(work, memory / machine.core)
    return seconds, memory / seconds


def _level(rates: list[float], whole: float) -> float:
    """What each may have at most, where all want these (in ascending order) and there is `whole` to share."""
    for i, rate in enumerate(rates):
        if rate * (len(rates) - i) > whole:
            return whole / (len(rates) - i)
        whole -= rate
    return rates[-1]


def seconds(op: str, shape: Shape, host: Host, threads: int, machine: Machine) -> float:
    """Of a pass, on one thread where two would take longer."""
    threads = threads if math.prod(shape) > TINY_WORK else 1
    job = plan(op, shape, host, threads=threads)
    phases = forward_phases(job, host) if isinstance(job, Matmul) else backward_phases(job, host)
    return sum(phase.repeats * seconds_of(phase, threads, machine) for phase in phases if phase.repeats)


def bound(op: str, shape: Shape, host: Host, threads: int, machine: Machine) -> float:
    """Seconds that peak and bandwidth leave a pass at best: everything is read once, results are counted twice."""
    n, d, m = shape
    operations = 2 * n * d * m * (1 if op == "forward" else 2)
    elements = n * d + d * m + 2 * n * m if op == "forward" else n * m + n * d + d * m + 2 * (n * d + d * m)
    bandwidth = min(machine.memory, threads * machine.core)
    return max(operations / (threads * machine.peak), elements * host.itemsize / bandwidth)


def efficiency(op: str, shape: Shape, host: Host, threads: int, machine: Machine) -> float:
    return bound(op, shape, host, threads, machine) / seconds(op, shape, host, threads, machine)


def main() -> None:
    units = {unit.name: unit for unit in (AVX512, AVX2, NEON)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--isa", choices=units, default=AVX512.name)
    parser.add_argument("--cores", type=int, default=64, help="of the machine (default: %(default)s)")
    parser.add_argument("--l2", type=int, default=1024, help="KiB of each core (default: %(default)s)")
    parser.add_argument("--l3", type=int, default=32, help="MiB of the last cache, as the system says (default: %(default)s)")
    for name, unit in (("peak", "GFLOP/s of a core in float32"), ("memory", "GB/s of all cores"), ("core", "GB/s of one core")):
        given = getattr(Machine, name) / 1e9
        parser.add_argument(f"--{name}", type=float, default=given, help=f"{unit} (default: %(default)g)")
    asked = parser.parse_args()
    size = 4 if asked.dtype == "float32" else 8
    machine = Machine(asked.peak * 1e9 * 4 / size, asked.memory * 1e9, asked.core * 1e9)
    caches = Caches(Cache(32 << 10, 8), Cache(asked.l2 << 10, 8), Cache(asked.l3 << 20, 16))
    host = host_of(units[asked.isa], size, caches, asked.cores)
    for op in ("forward", "backward"):
        print(f"{op}, {asked.dtype}, % of the roofline{'':<6}" + "".join(f"{threads:>6}" for threads in THREADS))
        for shape in SHAPES:
            shares = [efficiency(op, shape, host, threads, machine) for threads in THREADS]
            print(f"{' x '.join(map(str, shape)):<38}" + "".join(f"{100 * share:>6.0f}" for share in shares))


if __name__ == "__main__":
    main()
