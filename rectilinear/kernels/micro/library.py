"""The micro-kernels of one dtype, compiled for the host and published under the names that jitted code calls."""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target

from rectilinear.kernels.micro import simd
from rectilinear.kernels.micro.dots import dots_rows, emit_dots
from rectilinear.kernels.micro.panels import emit_panels, emit_panels_of_a
from rectilinear.kernels.micro.relu import emit_relu
from rectilinear.kernels.micro.rows import emit_rows, row_lanes
from rectilinear.kernels.micro.sgd import emit_sgd
from rectilinear.kernels.micro.softmax import emit_softmax
from rectilinear.kernels.micro.strip import STRIP_ROWS, emit_strip, strip_step, strip_tiles
from rectilinear.kernels.micro.tile import Tile, emit_tile
from rectilinear.kernels.micro.transpose import emit_transpose
from rectilinear.kernels.runtime.cache import jit, jit_inner, jit_too
from rectilinear.kernels.runtime.linking import Once, by_name, constant_of, from_table, publish
from rectilinear.kernels.runtime.native import intrinsic

tile = from_table("rectilinear_tiles")
"""By `index_of_tile`."""

strip = from_table("rectilinear_strips")
"""By the number of rows."""

ROW_KERNELS = {
    "rows": emit_rows,
    "panels": emit_panels,
    "panels_of_a": emit_panels_of_a,
    "transpose": emit_transpose,
    "dots": emit_dots,
    "relu": emit_relu,
    "softmax": emit_softmax,
    "sgd": emit_sgd,
}
rows, panels, panels_of_a, transpose, dots, relu, softmax, sgd = (by_name(f"rectilinear_{name}") for name in ROW_KERNELS)


@cache
def host_simd() -> simd.Simd:
    """The instruction set that numba compiles for, which NUMBA_CPU_NAME and NUMBA_CPU_FEATURES may have changed."""
    codegen = cpu_target.target_context.codegen()
    return simd.of_target(llvm.get_process_triple(), codegen._tm_features)


@cache
def tiles(unit: simd.Simd, itemsize: int) -> tuple[Tile, ...]:
    """Every register tile that the products use: full width, half of it for narrow outputs, twice for few rows."""
    _, full = unit.tile(itemsize)
    widths = [nv for nv in (full // 2, full, 2 * full) if nv >= 1 and nv * unit.lanes(itemsize) % 8 == 0]
    return tuple(Tile(unit, itemsize, mr, nv) for nv in widths for mr in range(1, unit.rows(nv) + 1))


lanes = constant_of(lambda itemsize: host_simd().lanes(itemsize))
vectors = constant_of(lambda itemsize: host_simd().tile(itemsize)[1])
least_vectors = constant_of(lambda itemsize: min(tile.nv for tile in tiles(host_simd(), itemsize)))
rows_of_dots = constant_of(lambda itemsize: dots_rows(host_simd()))
step_of_strips = constant_of(lambda itemsize: strip_step(host_simd(), itemsize))
lanes_of_rows = constant_of(lambda itemsize: row_lanes(host_simd(), itemsize))


_rows_of_narrow = constant_of(lambda itemsize: host_simd().rows(host_simd().tile(itemsize)[1] // 2))
_rows_of_full = constant_of(lambda itemsize: host_simd().tile(itemsize)[0])
_rows_of_wide = constant_of(lambda itemsize: host_simd().rows(host_simd().tile(itemsize)[1] * 2))


@jit_inner
def most_rows(zero: Any, nv: int) -> int:
    """mr of the tallest tile that is nv vectors wide."""
    if nv == vectors(zero):
        return _rows_of_full(zero)
    return _rows_of_narrow(zero) if nv < vectors(zero) else _rows_of_wide(zero)


@jit_too
def index_of_tile(nv: int, mr: int) -> int:
    return nv * (simd.MAX_ROWS + 1) + mr


def _addresses(itemsize: int) -> Any:
    """A jitted function that returns the addresses of all micro-kernels of a dtype, and so compiles them."""
    unit = host_simd()
    shapes, thin = tiles(unit, itemsize), strip_tiles(unit, itemsize)

    @intrinsic
    def emit(typingctx):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            module = builder.module
            kernels = [emit_tile(module, shape, f"tile.{shape.nv}.{shape.mr}") for shape in shapes]
            kernels += [emit_strip(module, shape, f"strip.{shape.mr}") for shape in thin]
            kernels += [emit_kernel(module, unit, itemsize, name) for name, emit_kernel in ROW_KERNELS.items()]
            for kernel in kernels:
                kernel.linkage = "internal"
            return cgutils.pack_array(builder, [builder.ptrtoint(kernel, ir.IntType(64)) for kernel in kernels])

        return types.UniTuple(types.intp, len(shapes) + len(thin) + len(ROW_KERNELS))(), codegen

    @jit()
    def addresses() -> Any:
        return emit()

    return addresses


@Once
def load(itemsize: int) -> None:
    """Compile the micro-kernels of a dtype and publish them. Before the first use of a kernel that calls them: ``load[itemsize]``."""
    addresses = _addresses(itemsize)
    found = iter(addresses())
    by_shape = np.zeros(index_of_tile(2 * host_simd().tile(itemsize)[1] + 1, 0), np.int64)
    for shape in tiles(host_simd(), itemsize):
        by_shape[index_of_tile(shape.nv, shape.mr)] = next(found)
    by_rows = np.zeros(STRIP_ROWS + 1, np.int64)
    done = 0
    for shape in strip_tiles(host_simd(), itemsize):
        by_rows[done:] = next(found)
        done = shape.mr + 1
    bits = 8 * itemsize
    publish(f"rectilinear_tiles_f{bits}", by_shape.ctypes.data, (by_shape, addresses))
    publish(f"rectilinear_strips_f{bits}", by_rows.ctypes.data, (by_rows, addresses))
    for name, address in zip(ROW_KERNELS, found, strict=True):
        publish(f"rectilinear_{name}_f{bits}", address, addresses)


def host_target() -> tuple[str, ...]:
    """Triple, processor and features that kernels are compiled for."""
    return tuple(cpu_target.target_context.codegen().magic_tuple())


def describe_host() -> str:
    """The instruction set and the processor that kernels are compiled for."""
    codegen = cpu_target.target_context.codegen()
    return f"{host_simd().name} ({codegen._get_host_cpu_name()})"
