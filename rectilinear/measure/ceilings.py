"""The machine's ceilings: peak FMA rate per dtype, and memory bandwidth at each level of cache, on all cores.

The probes are LLVM IR written out by width, compiled with llvmlite (numba's compiler) for this processor: C and Python decide
nothing about them. Each is tried in every SIMD width and with several numbers of independent chains or streams, and the best of
all tries counts: a ceiling is the most that anybody has seen. One thread per core, started together; the calls leave the GIL.

Without llvmlite there is an estimate from NumPy's own products and copies, and it says so: subjects can beat it.

Run as a process of its own: ``python -m rectilinear.measure.ceilings [threads [isa]]`` prints JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from rectilinear.measure import isa
from rectilinear.measure.cases import ITEMSIZE
from rectilinear.measure.machine import available_cpus, caches, describe
from rectilinear.threads import processors_apart

Kernel = Callable[..., None]

_SECONDS = 0.02
"""Length of one try: long against the start of threads, short against the interruptions of a shared machine."""
_TRIES = 3
_CHAINS = (10, 24)
"""Independent FMA chains per core. Latency 4 times 2 units needs 8 in flight, times 4 units (Apple, Neoverse V) 16; 24 and two
operands fill 32 registers, 10 leave room in 16."""
_STREAMS = (4, 8)
_ASSUMED_CACHES = {"L1": 32 * 2**10, "L2": 2**20, "L3": 32 * 2**20}
_WIDTHS = {"avx512f": (64, 32), "avx2": (32, 16), "avx": (32, 16)}


def measure(threads: int, held_to: str = "host") -> dict[str, Any]:
    """Rates in FLOP/s and bytes/s by the instructions of one of `isa.NAMES`; capacities and footprints in bytes.

    ``{"probe", "flops": {dtype: rate}, "levels": [{"level", "capacity", "footprint", "read", "copy", "copy_by"}], "threads", "assumed"}``
    """
    sizes = {**_ASSUMED_CACHES, **caches()}
    try:
        probe: Any = _LLVM(held_to)
    except Exception as error:  # absent, or a version whose IR or targets differ
        probe = _NumPy(f"estimate by NumPy (llvmlite: {type(error).__name__}: {error}); subjects may beat it")
    flops = {dtype: probe.flops(dtype, threads) for dtype in ITEMSIZE}
    levels = [_level(probe, name, capacity, footprint, threads) for name, capacity, footprint in _levels(sizes, threads)]
    return {"probe": probe.name, "flops": flops, "levels": levels, "threads": threads, "assumed": sorted(set(sizes) - set(caches()))}


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of several runs of the probes, before and after the subjects: the machine's clock and neighbours change."""
    best: dict[str, Any] = json.loads(json.dumps(runs[0]))
    for run in runs[1:]:
        best["flops"] = {dtype: max(rate, run["flops"][dtype]) for dtype, rate in best["flops"].items()}
        for level, other in zip(best["levels"], run["levels"], strict=True):
            level["read"] = max(level["read"], other["read"])
            if other["copy"] > level["copy"]:
                level["copy"], level["copy_by"] = other["copy"], other["copy_by"]
    return best


def keep(found: dict[str, Any]) -> None:
    """Keep the ceilings of this machine for `kept`, beside the compiled kernels; where that cannot be, nothing is kept."""
    with contextlib.suppress(ImportError, OSError):  # no numba, nothing writable
        from rectilinear.kernels.runtime import cache

        place, key = _place(cache.directory())
        if found["threads"] == available_cpus():
            cache.write(place, key, json.dumps(found).encode())


def kept() -> dict[str, Any] | None:
    """What the last benchmark on this machine has kept; None where there was none, or fewer processors may be used now."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        from rectilinear.kernels.runtime import cache

        place, key = _place(cache.directory())
        return dict(json.loads(cache.read(place, key)))
    return None


def _place(folder: Path) -> tuple[Path, bytes]:
    """Where they are kept, by what the machine is."""
    machine = describe()
    del machine["python"]
    key = hashlib.sha256(json.dumps(machine).encode())
    return folder / f"ceilings-{key.hexdigest()[:32]}", key.digest()


def _levels(sizes: dict[str, int], threads: int) -> Iterator[tuple[str, int | None, int]]:
    """(name, bytes that all cores used have of it, bytes each thread works on). L1 and L2 are private, L3 is shared."""
    yield "L1", sizes["L1"] * threads, sizes["L1"] // 2
    yield "L2", sizes["L2"] * threads, sizes["L2"] // 2
    yield "L3", sizes["L3"] + sizes["L2"] * threads, sizes["L3"] // 2 // threads
    yield "memory", None, max(4 * sizes["L3"], 2**28) // threads


def _level(probe: Any, name: str, capacity: int | None, footprint: int, threads: int) -> dict[str, Any]:
    read = probe.read(footprint, threads)
    copy, by = max(probe.copies(footprint, threads))
    return {"level": name, "capacity": capacity, "footprint": footprint * threads, "read": read, "copy": copy, "copy_by": by}


def _rate(work: Callable[[int, int], None], amount: float, threads: int) -> float:
    """The best rate of ``work(thread, repeats)`` on all threads at once, where each repeat of one thread does `amount`."""
    repeats, spent = 1, 0.0
    while spent < _SECONDS / 4:  # the first calls also warm caches and touch pages
        start = perf_counter()
        work(0, repeats)
        spent = perf_counter() - start
        repeats *= 2 if spent < _SECONDS / 4 else 1
    repeats = max(1, round(repeats * _SECONDS / spent))
    return max(amount * repeats * threads / _together(work, repeats, threads) for _ in range(_TRIES))


def _together(work: Callable[[int, int], None], repeats: int, threads: int) -> float:
    """Seconds from the first start to the last end."""
    barrier = threading.Barrier(threads)
    times: list[tuple[float, float]] = []
    cpus = processors_apart()

    def run(thread: int) -> None:
        if cpus:
            os.sched_setaffinity(0, {cpus[thread % len(cpus)]})
        barrier.wait()
        start = perf_counter()
        work(thread, repeats)
        times.append((start, perf_counter()))

    pool = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    return max(end for _, end in times) - min(start for start, _ in times)


def _buffers(nbytes: int, threads: int) -> list[np.ndarray]:
    """One buffer a thread, 64-byte aligned for non-temporal stores, touched."""
    buffers = []
    for _ in range(threads):
        raw = np.ones(nbytes + 64, np.uint8)
        buffers.append(raw[-raw.ctypes.data % 64 :][:nbytes])
    return buffers


class _LLVM:
    """Probes compiled from IR."""

    def __init__(self, held_to: str = "host") -> None:
        import llvmlite
        from llvmlite import binding as llvm  # untyped, like all of llvmlite

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target = llvm.Target.from_default_triple()
        self._llvm: Any = llvm
        self._engines: list[Any] = []  # machine code lives as long as its engine
        if held_to == "host":
            cpu, features, simd = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), describe()["simd"]
        else:
            cpu, features, simd = isa.llvm_name(), isa.FEATURES, held_to
        self._machine: Any = partial(target.create_target_machine, cpu=cpu, features=features, opt=3)
        self.name = f"LLVM IR for {cpu}, llvmlite {llvmlite.__version__}"
        self._widths = _WIDTHS.get(simd or "", (16,))
        self._kernel(_copy_ir(16, 4, hint=""), 3)  # raises here if this llvmlite cannot

    def flops(self, dtype: str, threads: int) -> float:
        sinks = _buffers(64, threads)
        return max(self._fma(dtype, width, chains, sinks) for width in self._widths for chains in _CHAINS)

    def _fma(self, dtype: str, width: int, chains: int, sinks: list[np.ndarray]) -> float:
        kernel, inner = self._kernel(_fma_ir(dtype, width, chains), 2), 1000
        amount = 2.0 * inner * chains * width / ITEMSIZE[dtype]
        return _rate(lambda t, repeats: kernel(inner * repeats, sinks[t].ctypes.data), amount, len(sinks))

    def read(self, footprint: int, threads: int) -> float:
        buffers, sinks = _buffers(footprint, threads), _buffers(64, threads)
        return self._sweep(_read_ir, 1, buffers, sinks)

    def copies(self, footprint: int, threads: int) -> Iterator[tuple[float, str]]:
        """Read+write, counting both: copied by plain and by non-temporal stores (which need not fetch the line first), and in place."""
        sources, targets = _buffers(footprint // 2, threads), _buffers(footprint // 2, threads)
        yield self._sweep(partial(_copy_ir, hint=""), 2, sources, targets), "copy"
        yield self._sweep(partial(_copy_ir, hint=", !nontemporal !0"), 2, sources, targets), "non-temporal copy"
        yield self._sweep(partial(_copy_ir, hint=""), 2, sources, sources), "in place"

    def _sweep(self, ir: Callable[[int, int], str], passes: int, sources: list[np.ndarray], targets: list[np.ndarray]) -> float:
        """The best rate of sweeps over the buffers, each byte of which counts `passes` times."""
        return max(
            self._sweep_once(self._kernel(ir(width, streams), 4), width * streams, passes, sources, targets)
            for width in self._widths
            for streams in _STREAMS
        )

    def _sweep_once(self, kernel: Kernel, stride: int, passes: int, sources: list[np.ndarray], targets: list[np.ndarray]) -> float:
        steps = sources[0].nbytes // stride

        def work(t: int, repeats: int) -> None:
            kernel(repeats, steps, sources[t].ctypes.data, targets[t].ctypes.data)

        return _rate(work, passes * steps * stride, len(sources))

    def _kernel(self, ir: str, arguments: int) -> Kernel:
        module = self._llvm.parse_assembly(ir)
        module.verify()
        engine = self._llvm.create_mcjit_compiler(module, self._machine())
        engine.finalize_object()
        self._engines.append(engine)
        return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(engine.get_function_address("probe"))


_ATTRIBUTES = 'attributes #0 = { "min-legal-vector-width"="512" "prefer-vector-width"="512" }\n!0 = !{i32 1}\n'
"""Without the first, LLVM splits 64-byte vectors on processors it tunes for 32."""


def _fma_ir(dtype: str, width: int, chains: int) -> str:
    """``probe(n, sink)``: n times one FMA on each chain, c = c a + b; a and b are loaded, so that nothing is folded away."""
    lanes = width // ITEMSIZE[dtype]
    scalar = {"float32": "float", "float64": "double"}[dtype]
    vec, short = f"<{lanes} x {scalar}>", f"v{lanes}f{ITEMSIZE[dtype] * 8}"
    phi = "\n".join(f"  %c{i} = phi {vec} [ %a, %entry ], [ %d{i}, %loop ]" for i in range(chains))
    fma = "\n".join(f"  %d{i} = call {vec} @llvm.fmuladd.{short}({vec} %c{i}, {vec} %a, {vec} %b)" for i in range(chains))
    total = "\n".join(f"  %s{i} = fadd {vec} %{f's{i - 1}' if i else 'a'}, %d{i}" for i in range(chains))
    return f"""
declare {vec} @llvm.fmuladd.{short}({vec}, {vec}, {vec})
define void @probe(i64 %n, i64 %sink) #0 {{
entry:
  %p = inttoptr i64 %sink to ptr
  %a = load volatile {vec}, ptr %p, align 1
  %b = load volatile {vec}, ptr %p, align 1
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
{phi}
{fma}
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %n
  br i1 %more, label %loop, label %done
done:
{total}
  store {vec} %s{chains - 1}, ptr %p, align 1
  ret void
}}
{_ATTRIBUTES}"""


def _sweep_ir(phis: str, body: str, swept: str, stride: int) -> str:
    """``probe(repeats, n, from, to)``: `repeats` sweeps over n blocks of `stride` bytes from %p, and %q beside it."""
    return f"""
define void @probe(i64 %repeats, i64 %n, i64 %from, i64 %to) #0 {{
entry:
  %p = inttoptr i64 %from to ptr
  %q = inttoptr i64 %to to ptr
  br label %sweep
sweep:
  %r = phi i64 [ 0, %entry ], [ %rnext, %swept ]
  br label %loop
loop:
  %i = phi i64 [ 0, %sweep ], [ %next, %loop ]
{phis}
  %at = mul i64 %i, {stride}
{body}
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %n
  br i1 %more, label %loop, label %swept
swept:
{swept}
  %rnext = add i64 %r, 1
  %again = icmp slt i64 %rnext, %repeats
  br i1 %again, label %sweep, label %done
done:
  ret void
}}
{_ATTRIBUTES}"""


def _read_ir(width: int, streams: int) -> str:
    """Each load is added to a sum of its own, and the sums are stored after each sweep, so that none can be left out."""
    vec = f"<{width // 8} x i64>"
    phis = "\n".join(f"  %c{i} = phi {vec} [ zeroinitializer, %sweep ], [ %d{i}, %loop ]" for i in range(streams))
    body = "\n".join(
        f"  %o{i} = add i64 %at, {i * width}\n  %g{i} = getelementptr i8, ptr %p, i64 %o{i}\n"
        f"  %v{i} = load {vec}, ptr %g{i}, align {width}\n  %d{i} = add {vec} %c{i}, %v{i}"
        for i in range(streams)
    )
    total = f"  %s0 = add {vec} %d0, zeroinitializer\n"
    total += "\n".join(f"  %s{i} = add {vec} %s{i - 1}, %d{i}" for i in range(1, streams))
    return _sweep_ir(phis, body, f"{total}\n  store volatile {vec} %s{streams - 1}, ptr %q, align {width}", width * streams)


def _copy_ir(width: int, streams: int, *, hint: str) -> str:
    vec = f"<{width // 8} x i64>"
    places = range(streams)
    loads = "\n".join(
        f"  %o{i} = add i64 %at, {i * width}\n  %g{i} = getelementptr i8, ptr %p, i64 %o{i}\n  %v{i} = load {vec}, ptr %g{i}, align {width}"
        for i in places
    )
    stores = "\n".join(
        f"  %h{i} = getelementptr i8, ptr %q, i64 %o{i}\n  store {vec} %v{i}, ptr %h{i}, align {width}{hint}" for i in places
    )
    return _sweep_ir("", loads + "\n" + stores, "", width * streams)


class _NumPy:
    """What NumPy itself reaches: an estimate from below."""

    def __init__(self, name: str) -> None:
        self.name = name

    def flops(self, dtype: str, threads: int) -> float:
        a = np.ones((2048, 2048), dtype)
        out = np.empty_like(a)
        # BLAS brings its own threads.
        return _rate(_repeated(lambda thread: np.matmul(a, a, out=out)), 2.0 * 2048**3, 1)

    def read(self, footprint: int, threads: int) -> float:
        arrays = [np.ones(footprint // 4, np.float32) for _ in range(threads)]
        return _rate(_repeated(lambda thread: arrays[thread].max()), footprint, threads)

    def copies(self, footprint: int, threads: int) -> Iterator[tuple[float, str]]:
        pairs = [(np.ones(footprint // 8, np.float32), np.ones(footprint // 8, np.float32)) for _ in range(threads)]
        yield _rate(_repeated(lambda thread: np.copyto(*pairs[thread])), footprint, threads), "np.copyto"


def _repeated(once: Callable[[int], Any]) -> Callable[[int, int], None]:
    def work(thread: int, repeats: int) -> None:
        for _ in range(repeats):
            once(thread)

    return work


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else available_cpus(), *sys.argv[2:])))
