"""The instruction sets that can be asked of numba on this host, and how."""

from __future__ import annotations

import llvmlite.binding as llvm

from rectilinear.kernels.micro.simd import AVX2, AVX512, NEON, SSE2, Simd

FEATURES = {
    AVX512: "+sse2,+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+avx512f,+avx512dq,+avx512bw,+avx512vl,+avx512cd",
    AVX2: "+sse2,+avx,+avx2,+fma,+bmi,+bmi2,+f16c",
    SSE2: "+sse2",
}


def host_has(unit: Simd) -> bool:
    features = llvm.get_host_cpu_features()
    return all(features.get(name[1:], False) for name in FEATURES[unit].split(","))


def executable() -> dict[Simd, dict[str, str]]:
    """Every instruction set of this host, widest first, and the variables that make numba compile for it.

    The widest needs none: it is what users get.
    """
    if not llvm.get_process_triple().startswith("x86_64"):
        return {NEON: {}}
    units = [unit for unit in FEATURES if host_has(unit)]
    narrower = {unit: {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": FEATURES[unit]} for unit in units[1:]}
    return {units[0]: {}} | narrower
