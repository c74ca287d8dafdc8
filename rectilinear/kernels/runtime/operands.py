"""What micro-kernels and the loops around them are given: where matrices lie. Addresses and strides are in bytes."""

from __future__ import annotations

from rectilinear.kernels.runtime.records import record


@record
class Word:
    """What is written or read by itself."""

    value: int = 0


@record
class Rows:
    """A matrix whose elements lie side by side along its rows."""

    data: int = 0
    row: int = 0


@record
class Matrix:
    """A matrix of any strides."""

    data: int = 0
    row: int = 0
    column: int = 0


@record
class Stack:
    """Matrices of any strides, `group` bytes apart."""

    data: int = 0
    group: int = 0
    row: int = 0
    column: int = 0
