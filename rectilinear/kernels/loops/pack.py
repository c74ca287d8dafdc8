"""Packing: panels of B from operands of any layout, and blocks of A that keep their rows."""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.arithmetic import round_up
from rectilinear.kernels.micro.library import lanes, lanes_of_rows, panels, rows, transpose, vectors
from rectilinear.kernels.micro.panels import PanelsOperands
from rectilinear.kernels.micro.rows import PAD, WRITE, RowsOperands
from rectilinear.kernels.micro.transpose import TransposeOperands
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.linking import called_by_name
from rectilinear.kernels.runtime.memory import get, put, room, size_of
from rectilinear.kernels.runtime.operands import Matrix, Rows
from rectilinear.kernels.runtime.records import record

SIDE_BY_SIDE = 4
"""Panels written to at a time. From L3 one took 5 to 30 GB/s, four took 30 to 40, 16 and more 20, where panels lie a power of two bytes
apart and so in the same sets of L1 (Zen 4, AVX2 and AVX-512)."""

TRANSPOSED_ROWS = 64
"""Rows of a vector each that are transposed before they go to their place."""

_TRANSPOSED_WORDS = TRANSPOSED_ROWS * 8  # of a vector of 64 bytes


@record
class Packing:
    """`rows` by `columns` elements of `src`, to `dst`."""

    rows: int = 0
    columns: int = 0
    src: Matrix = Matrix()
    dst: Rows = Rows()


@called_by_name(Packing)
def pack_panel(zero: Any, p: Packing) -> None:
    """A panel of B, padded to whole vectors, from a matrix with any strides."""
    size = size_of(zero)
    src = Rows(p.src.data, p.src.row)
    if p.src.column == size:
        rows(zero, RowsOperands(rows=p.rows, columns=p.columns, src=src, dst=p.dst, flags=WRITE | PAD))
    elif p.src.row == size:
        transpose(zero, TransposeOperands(k=p.rows, columns=p.columns, src=Rows(p.src.data, p.src.column), dst=p.dst))
    else:
        _by_elements(zero, p)
        for i in range(p.rows):
            for j in range(p.columns, round_up(p.columns, lanes_of_rows(zero))):
                put(p.dst.data + i * p.dst.row + j * size, zero)


@jit_inner
def pack_panels(zero: Any, p: Packing, nr: int, panel: int) -> None:
    """Panels of B, nr columns each and `panel` bytes apart.

    Where w lies in rows, whole panels are packed several at a time: one by one, each line would be on another page, and a line that two
    panels share, since it is not aligned, would come from L3 twice.
    """
    size = size_of(zero)
    whole = p.columns // nr if p.src.column == size and nr == vectors(zero) * lanes(zero) else 0
    for j in range(0, whole, SIDE_BY_SIDE):
        src, dst = Rows(p.src.data + j * nr * size, p.src.row), Rows(p.dst.data + j * panel, p.dst.row)
        count = min(SIDE_BY_SIDE, whole - j)
        panels(zero, PanelsOperands(k=p.rows, panels=count, panel=panel, apart=nr * size, src=src, dst=dst))
    for j in range(whole * nr, p.columns, nr):
        rest = Matrix(p.src.data + j * p.src.column, p.src.row, p.src.column)
        to = Rows(p.dst.data + j // nr * panel, p.dst.row)
        pack_panel(zero, Packing(rows=p.rows, columns=min(nr, p.columns - j), src=rest, dst=to))


@called_by_name(Packing)
def copy(zero: Any, p: Packing) -> None:
    """The block as it is, with its elements side by side along rows; what lies beyond its columns stays as it was."""
    if p.src.column == size_of(zero):
        src = Rows(p.src.data, p.src.row)
        rows(zero, RowsOperands(rows=p.rows, columns=p.columns, src=src, dst=p.dst, flags=WRITE))
    elif p.src.row == size_of(zero):
        _copy_transposed(zero, p)
    else:
        _by_elements(zero, p)


@jit_inner
def _copy_transposed(zero: Any, p: Packing) -> None:
    """The block, whose elements lie side by side along columns: a vector's width at a time, which is padded until it goes to its place."""
    size, width = size_of(zero), lanes(zero)
    space = Rows(room(_TRANSPOSED_WORDS), width * size)
    for j in range(0, p.columns, width):
        for i in range(0, p.rows, TRANSPOSED_ROWS):
            count, columns = min(TRANSPOSED_ROWS, p.rows - i), min(width, p.columns - j)
            src = Rows(p.src.data + i * size + j * p.src.column, p.src.column)
            dst = Rows(p.dst.data + i * p.dst.row + j * size, p.dst.row)
            transpose(zero, TransposeOperands(k=count, columns=columns, src=src, dst=space))
            rows(zero, RowsOperands(rows=count, columns=columns, src=space, dst=dst, flags=WRITE))


@jit_inner
def _by_elements(zero: Any, p: Packing) -> None:
    """The slow way, for layouts that nobody is fast on."""
    size, src, dst = size_of(zero), p.src, p.dst
    for i in range(p.rows):
        for j in range(p.columns):
            put(dst.data + i * dst.row + j * size, get(zero, src.data + i * src.row + j * src.column))
