"""The emitted kernels of one dtype, compiled for the host and published under the names that jitted code calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target

from rectilinear.kernels import blocking, forks, simd
from rectilinear.kernels.cache import jit
from rectilinear.kernels.dots import PARAMETERS as DOTS_PARAMETERS
from rectilinear.kernels.dots import dots_rows, emit_dots
from rectilinear.kernels.memory import emitted, emitted_table
from rectilinear.kernels.native import intrinsic
from rectilinear.kernels.rows import (
    ROWS_PARAMETERS,
    TRANSPOSE_PARAMETERS,
    emit_rows,
    emit_transpose,
)
from rectilinear.kernels.stream import RELU_PARAMETERS, SOFTMAX_PARAMETERS, emit_relu, emit_softmax
from rectilinear.kernels.strip import PARAMETERS as STRIP_PARAMETERS
from rectilinear.kernels.strip import STRIP_ROWS, emit_strip, strip_tiles
from rectilinear.kernels.tile import PARAMETERS, Tile, emit_tile

MAX_ROWS = 16
"""Tiles are found in the table by log2(nv) * MAX_ROWS + mr."""

tile = emitted_table("rectilinear_tiles", len(PARAMETERS))
strip = emitted_table("rectilinear_strips", len(STRIP_PARAMETERS))
"""By the number of rows."""

dots = emitted("rectilinear_dots", len(DOTS_PARAMETERS))
relu = emitted("rectilinear_relu", len(RELU_PARAMETERS))
softmax = emitted("rectilinear_softmax", len(SOFTMAX_PARAMETERS))
rows = emitted("rectilinear_rows", len(ROWS_PARAMETERS))
transpose = emitted("rectilinear_transpose", len(TRANSPOSE_PARAMETERS))

_published: dict[str, Any] = {}
"""Keeps alive what published names point to, for as long as the process: linked code holds the addresses."""


class Once(dict[int, Any]):
    """What `make` makes for each key, made when first asked for and then kept: ``Once(make)[key]``.

    Unlike `functools.cache`, which lets every thread that asks meanwhile make its own: then two would publish one name, and code linked
    against the first would be left with an address that is freed when the second replaces it.
    """

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: int) -> Any:
        with forks.loading():
            if key not in self:
                self[key] = self._make(key)
        return self[key]


@cache
def host_simd() -> simd.Simd:
    """The instruction set that numba compiles for, which NUMBA_CPU_NAME and NUMBA_CPU_FEATURES may have changed."""
    codegen = cpu_target.target_context.codegen()
    return simd.of_target(llvm.get_process_triple(), codegen._tm_features)


@cache
def tiles(itemsize: int) -> tuple[Tile, ...]:
    """Every register tile that the products use: full width, half of it for narrow outputs, twice for few rows."""
    unit = host_simd()
    _, full = unit.tile(itemsize)
    widths = [nv for nv in (full // 2, full, 2 * full) if nv >= 1 and nv * unit.lanes(itemsize) % 8 == 0]
    return tuple(Tile(unit, itemsize, mr, nv) for nv in widths for mr in range(1, unit.rows(nv) + 1))


def _constant(value_for_itemsize: Callable[[int], int]) -> Callable[..., int]:
    """A jittable function of zero whose value is known when the kernel is compiled."""

    def typed(typingctx, zero):  # type: ignore[no-untyped-def]
        value = value_for_itemsize(zero.bitwidth // 8)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return ir.Constant(ir.IntType(64), value)

        return types.intp(zero), codegen

    return intrinsic(typed)


lanes = _constant(lambda itemsize: host_simd().lanes(itemsize))
vectors = _constant(lambda itemsize: host_simd().tile(itemsize)[1])
least_vectors = _constant(lambda itemsize: min(tile.nv for tile in tiles(itemsize)))
row_lanes = _constant(lambda itemsize: max(8, host_simd().lanes(itemsize)))
rows_of_strips = _constant(lambda itemsize: strip_tiles(host_simd(), itemsize)[-1].mr)
rows_of_dots = _constant(lambda itemsize: dots_rows(host_simd()))


@intrinsic
def most_rows(typingctx, zero, nv):  # type: ignore[no-untyped-def]
    """mr of the tallest tile that is nv vectors wide."""
    unit = host_simd()
    heights = {tile.nv: unit.rows(tile.nv) for tile in tiles(zero.bitwidth // 8)}

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        result = ir.IntType(64)(1)
        for width, height in heights.items():
            is_width = builder.icmp_signed("==", args[1], ir.IntType(64)(width))
            result = builder.select(is_width, ir.IntType(64)(height), result)
        return result

    return types.intp(zero, types.intp), codegen


def _addresses(itemsize: int) -> Any:
    """A jitted function that returns the addresses of all emitted kernels of a dtype, and so compiles them."""
    unit = host_simd()
    shapes, thin = tiles(itemsize), strip_tiles(unit, itemsize)

    @intrinsic
    def emit(typingctx):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            module = builder.module
            kernels = [emit_tile(module, shape, f"tile.{shape.nv}.{shape.mr}") for shape in shapes]
            kernels += [emit_strip(module, shape, f"strip.{shape.mr}") for shape in thin]
            kernels.append(emit_rows(module, unit, itemsize, "rows"))
            kernels.append(emit_transpose(module, unit, itemsize, "transpose"))
            kernels.append(emit_dots(module, unit, itemsize, "dots"))
            kernels.append(emit_relu(module, unit, itemsize, "relu"))
            kernels.append(emit_softmax(module, unit, itemsize, "softmax"))
            for kernel in kernels:
                kernel.linkage = "internal"
            return cgutils.pack_array(builder, [builder.ptrtoint(kernel, ir.IntType(64)) for kernel in kernels])

        return types.UniTuple(types.intp, len(shapes) + len(thin) + 5)(), codegen

    @jit()
    def addresses() -> Any:
        return emit()

    return addresses


def publish(name: str, address: int, owner: Any) -> None:
    """Let jitted code find `address` by `name`; `owner` is what must stay alive for it. A name is published once and stays as it is."""
    if name not in _published:
        _published[name] = owner
        llvm.add_symbol(name, address)


@Once
def load(itemsize: int) -> None:
    """Compile the emitted kernels of a dtype and publish them. Before the first use of a kernel that calls them: ``load[itemsize]``."""
    addresses = _addresses(itemsize)
    found = addresses()
    table = np.zeros(5 * MAX_ROWS, np.int64)
    for shape, address in zip(tiles(itemsize), found, strict=False):
        table[(shape.nv.bit_length() - 1) * MAX_ROWS + shape.mr] = address
    by_rows = np.zeros(STRIP_ROWS + 1, np.int64)
    thin = strip_tiles(host_simd(), itemsize)
    for shape, address in reversed(list(zip(thin, found[len(tiles(itemsize)) :], strict=False))):
        by_rows[: shape.mr + 1] = address
    bits = 8 * itemsize
    publish(f"rectilinear_strips_f{bits}", by_rows.ctypes.data, (by_rows, addresses))
    publish(f"rectilinear_tiles_f{bits}", table.ctypes.data, (table, addresses))
    for kernel, address in zip(("rows", "transpose", "dots", "relu", "softmax"), found[-5:], strict=True):
        publish(f"rectilinear_{kernel}_f{bits}", address, addresses)
    publish_blocks(itemsize)


BLOCK_WORDS = ("kc", "mc", "l2", "past", "far", "cores")
KC, MC, L2, PAST, FAR, CORES = range(0, 48, 8)
"""Where they lie. Bytes: of L2, of a result too long to be worth keeping in the caches, between rows that lie far apart. Cores of the
host, whichever of them this process may use."""


def publish_blocks(itemsize: int, **overrides: int) -> None:
    """Publish the block sizes; tests override them to meet block boundaries at small extents."""
    caches = blocking.host_caches()
    unit = host_simd()
    nr = unit.lanes(itemsize) * unit.tile(itemsize)[1]
    kc = overrides.get("kc", blocking.k_block(nr, itemsize, caches))
    mc = blocking.row_block(kc, itemsize, caches)
    cores = os.cpu_count() or 1
    values = {"kc": kc, "mc": mc, "l2": caches.l2, "past": caches.l3 // 2, "far": blocking.FAR_APART, "cores": cores} | overrides
    name, words = f"rectilinear_blocks_f{8 * itemsize}", np.array([values[word] for word in BLOCK_WORDS], np.int64)
    publish(name, words.ctypes.data, words)
    _published[name][:] = words


@intrinsic
def blocks(typingctx, zero):  # type: ignore[no-untyped-def]
    """The address of the block sizes, words in the order of BLOCK_WORDS."""
    name = f"rectilinear_blocks_f{zero.bitwidth}"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        symbol = builder.module.globals.get(name)
        if symbol is None:
            symbol = ir.GlobalVariable(builder.module, ir.IntType(64), name=name)
        return builder.ptrtoint(symbol, ir.IntType(64))

    return types.intp(zero), codegen


def describe_host() -> str:
    """The instruction set and the processor that kernels are compiled for."""
    codegen = cpu_target.target_context.codegen()
    return f"{host_simd().name} ({codegen._get_host_cpu_name()})"
