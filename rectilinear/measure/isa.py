"""The instruction set that a run holds its subjects to: by which variables, and what each library then says it runs on.

``"host"`` leaves every library its own choice. ``"avx2"`` lets an x86 host with AVX-512 stand for the many that have none; the caches
stay the host's. Nothing is set in this process: `variables` are for the processes of the subjects and of the ceilings.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from rectilinear.measure.machine import describe, thread_pools, vendor

PROC = Path("/proc")
NAMES = ("host", "avx2")
"""What a run can be held to."""
FEATURES = "+avx2,+fma,+bmi2,+f16c"
"""LLVM's words for what these kernels need of a processor with AVX2."""
_WIDE = ("AVX512", "X86_V4")
"""How NumPy's names for groups of AVX-512 features begin."""
_GLIBC = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW"
"""memcpy and its kin use registers of AVX-512 where there are some; held, they do not hide who else does (see `wide_within`)."""
_NO_YNNPACK = "--xla_cpu_experimental_ynn_fusion_type="
"""XLA leaves products to YNNPACK, which takes the processor's widest kernels whatever it is told; without it, to Eigen and oneDNN. With
jaxlib 0.10 the products are as fast either way, within a tenth (Zen 4, two cores)."""

BY = {
    "rectilinear": ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"),
    "NumPy's loops": ("NPY_DISABLE_CPU_FEATURES",),
    "OpenBLAS": ("OPENBLAS_CORETYPE",),
    "PyTorch": ("ATEN_CPU_CAPABILITY",),
    "oneDNN": ("ONEDNN_MAX_CPU_ISA",),
    "MKL": ("MKL_ENABLE_INSTRUCTIONS",),
    "Inductor's C++ compiler": ("TORCHINDUCTOR_CPP_MARCH",),
    "XLA": ("XLA_FLAGS",),
    "thinc's BLIS": ("BLIS_ARCH_TYPE",),
    "the C library": ("GLIBC_TUNABLES",),
}
"""Each library, and the variables that hold it."""
_SAYS_AVX2 = {"AVX2", "X86_V3", "Haswell", "haswell", "Zen", "zen", "zen2", "zen3"}
"""The first word of what a library that is held to AVX2 answers."""


def variables(name: str, user: Mapping[str, str]) -> dict[str, str]:
    """What holds a process to `name`, added to what the `user` has in the variables that hold more than one setting.

    Raises
    ------
    ValueError
        This processor cannot do it.
    """
    if name == "host":
        return {}
    machine = describe()
    if machine["simd"] not in ("avx512f", "avx2") or not machine["fma"]:
        has = machine["simd"] or "no instruction set that can be told"
        raise ValueError(f"--isa avx2 needs an x86 processor with AVX2 and FMA, and this one has {has}: leave --isa out")
    blis = _blis_number("haswell")
    xla = [*own_xla_flags(user), "--xla_cpu_max_isa=AVX2", *([_NO_YNNPACK] if _in_jaxlib(_NO_YNNPACK) else [])]
    return {
        "NUMBA_CPU_NAME": llvm_name(),
        "NUMBA_CPU_FEATURES": FEATURES,
        "NPY_DISABLE_CPU_FEATURES": " ".join(_wide_loops(user)),
        "OPENBLAS_CORETYPE": "Haswell",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "TORCHINDUCTOR_CPP_MARCH": "haswell",
        "XLA_FLAGS": " ".join(xla),
        "BLIS_ARCH_TYPE": "haswell" if blis is None else str(blis),
        "GLIBC_TUNABLES": ":".join([*(t for t in user.get("GLIBC_TUNABLES", "").split(":") if t and ".hwcaps=" not in t), _GLIBC]),
    }


def llvm_name() -> str:
    """The processor that code held to AVX2 is compiled for: one of the same maker that has AVX2 and no AVX-512."""
    return "znver3" if vendor() == "AuthenticAMD" else "haswell"


def own_xla_flags(user: Mapping[str, str]) -> list[str]:
    """The user's flags for XLA but the one that chooses an instruction set."""
    return [flag for flag in user.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_cpu_max_isa")]


def _in_jaxlib(flag: str) -> bool:
    """Whether JAX's compiler knows a flag; it ends the process at one that it does not know."""
    spec = importlib.util.find_spec("jaxlib")
    for file in (file for folder in (spec and spec.submodule_search_locations) or () for file in Path(folder).glob("*.so")):
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(flag.strip("-=").encode()) >= 0:
                return True
    return False


def _wide_loops(user: Mapping[str, str]) -> list[str]:
    """The groups of AVX-512 features for which this NumPy has loops and this processor the instructions: NumPy warns of any other name."""
    numpy = _numpy_features()
    disabled = user.get("NPY_DISABLE_CPU_FEATURES", "").replace(",", " ").split()
    # What the user has disabled shows as lacking in this process.
    return [name for name in numpy["dispatch"] if name.startswith(_WIDE) and (name in numpy["enabled"] or name in disabled)]


def _numpy_features() -> dict[str, list[str]]:
    """NumPy has no public way to these; `numpy.show_runtime` prints them."""
    umath: Any = import_module("numpy._core._multiarray_umath")
    enabled = [name for name, on in umath.__cpu_features__.items() if on]
    return {"baseline": list(umath.__cpu_baseline__), "dispatch": list(umath.__cpu_dispatch__), "enabled": enabled}


# ---------------------------------------------------------------- what the libraries of a process say


def said() -> list[dict[str, str | None]]:
    """What each library that this process has loaded says it runs on; None: it cannot be asked, or does not say."""
    answers = [(name, ask()) for name, module, ask in _ASKED if module in sys.modules]
    names = {"openblas": "OpenBLAS"}
    answers += [(names.get(p["internal_api"], p["internal_api"]), p["architecture"]) for p in thread_pools() if "architecture" in p]
    # A process may have loaded one library twice: NumPy's OpenBLAS and SciPy's.
    return [{"library": name, "says": says} for name, says in dict.fromkeys(answers) if says != ""]


def held(says: str | None) -> bool | None:
    """Whether an answer means AVX2 or less; None where there is none."""
    return None if says is None else says.split(" ")[0] in _SAYS_AVX2


def _numpys_loops() -> str:
    """The widest group of features for which loops are chosen, x86 only."""
    numpy = _numpy_features()
    chosen = [name for name in (*numpy["baseline"], *numpy["dispatch"]) if name in numpy["enabled"]]
    return chosen[-1] if chosen else "baseline"


def _rectilinear() -> str:
    from rectilinear.backends import registry

    backend = registry.active()
    return backend.probe().simd or "" if backend.name == "numba" else ""


def _torch() -> str:
    return str(sys.modules["torch"].backends.cpu.get_cpu_capability())


def _blis() -> str | None:
    library = ctypes.CDLL(sys.modules["blis.cy"].__file__)
    try:
        library.bli_arch_string.restype = ctypes.c_char_p
        return str(library.bli_arch_string(library.bli_arch_query_id()).decode())
    except AttributeError:  # a build that hides its symbols
        return None


def _silent() -> None:
    return None


_ASKED: tuple[tuple[str, str, Callable[[], str | None]], ...] = (
    ("rectilinear", "rectilinear.measure.ours", _rectilinear),
    ("NumPy's loops", "numpy", _numpys_loops),
    ("PyTorch", "torch", _torch),
    ("oneDNN", "torch", _silent),
    ("MKL", "torch", _silent),
    ("Inductor's C++ compiler", "rectilinear.measure.peers.torch_compile", _silent),
    ("XLA", "jax", _silent),
    ("oneDNN", "jax", _silent),
    ("thinc's BLIS", "blis.cy", _blis),
    ("the C library", "os", _silent),
)
"""Library, the module whose presence means that it is here, and how it is asked."""


def _blis_number(name: str) -> int | None:
    """The number that BLIS_ARCH_TYPE takes for a processor: older BLIS reads no names, takes them for 0, and that is AVX-512."""
    spec = importlib.util.find_spec("blis")
    for file in (file for folder in (spec and spec.submodule_search_locations) or () for file in Path(folder).glob("cy.*")):
        if file.suffix in (".so", ".pyd"):
            try:
                text = ctypes.CDLL(str(file)).bli_arch_string
            except (OSError, AttributeError):
                continue
            text.restype = ctypes.c_char_p
            return next((number for number in range(_FIRST_NUMBERS) if text(number) == name.encode()), None)
    return None


_FIRST_NUMBERS = 8
"""Intel's come first in every version; BLIS does not say how many there are, and reads past the end when asked for more."""


# ---------------------------------------------------------------- what the system has seen


def wide_within(pid: int, seconds: float) -> bool | None:
    """Whether Linux found registers of AVX-512 in use, within the last `seconds`, when it put a thread of a process aside.

    None where the system does not tell. A kernel that zeroes the registers at its end is found only if it was interrupted, so that "no"
    proves nothing by itself.
    """
    ages = [age for task in (PROC / str(pid) / "task").glob("*/arch_status") if (age := _age(task)) is not None]
    return any(0 <= age < seconds * 1000 for age in ages) if ages else None


def _age(status: Path) -> int | None:
    """Milliseconds since then, -1 for never."""
    try:
        name, _, value = status.read_text().partition(":")
    except OSError:
        return None
    return int(value) if name == "AVX512_elapsed_ms" else None
