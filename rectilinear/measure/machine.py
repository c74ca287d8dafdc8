"""What the machine is: processor, SIMD, caches, threads, versions. Facts that cannot be read are left out, never guessed."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rectilinear.threads import available_cores, get_num_threads

_SIMD = ("avx512f", "avx2", "avx", "sse4_2", "asimd", "neon")
_LIBRARIES = ("rectilinear", "numpy", "numba", "cupy", "torch", "jax", "jaxlib", "scikit-learn", "thinc", "llvmlite")


def describe() -> dict[str, Any]:
    """The machine as the report shows it, ready for JSON."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "family": " ".join(f"{k} {info[k]}" for k in ("cpu family", "model") if k in info),
        "simd": next((s for s in _SIMD if s in flags), None),
        "fma": "fma" in flags or "asimd" in flags,
        "cores": available_cpus(),
        "caches": caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def vendor() -> str | None:
    """Who made the processor, in cpuid's word; None where the system does not say."""
    return _cpuinfo().get("vendor_id")


def available_cpus() -> int:
    """The processors this process may use, counted as rectilinear's kernels do; a container is often given fewer than there are."""
    return available_cores()


def caches() -> dict[str, int]:
    """Bytes of L1d, L2 and L3 of one processor, from sysfs; empty where there is none."""
    found = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, kind, size = (index.joinpath(name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(size[-1], 1)
    return dict(sorted(found.items()))


def memory_available() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def busy_seconds() -> float | None:
    """Processor time that all programs of the machine have used since it started; None where the system does not say."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / float(os.sysconf("SC_CLK_TCK"))


def library_versions() -> dict[str, str]:
    """Versions of the libraries that this process has loaded."""
    modules = {"scikit-learn": "sklearn"}
    versions = {}
    for name in _LIBRARIES:
        if modules.get(name, name) in sys.modules:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:  # a checkout that is not installed
                versions[name] = getattr(sys.modules[modules.get(name, name)], "__version__", "unknown")
    return versions


def thread_pools() -> list[dict[str, Any]]:
    """BLAS and OpenMP libraries of this process with kernel and threads, as threadpoolctl sees them, and pools that it does not see."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        found = []
    else:
        found = threadpool_info()
    keep = ("internal_api", "version", "num_threads", "architecture")
    pools = [{k: pool[k] for k in keep if pool.get(k) is not None} for pool in found]
    if "rectilinear.measure.ours" in sys.modules:  # not in a peer's process
        pools.append({"internal_api": "rectilinear", "num_threads": get_num_threads()})
    if "torch" in sys.modules:
        pools.append({"internal_api": "torch", "num_threads": sys.modules["torch"].get_num_threads()})
    return pools


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
