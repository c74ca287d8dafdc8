"""The products of the cupy backend by cuBLAS as CuPy calls it: what there is without nvmath-python (with it: `cupy_lt`).

`cupy.matmul` rounds the product of 16-bit operands to 16 bits, before the bias could be added, and copies the transposed operands
of a stacked product. cuBLAS's strided batched gemm does neither. Like `cupy_backend`, this file is handed its array module.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np

from rectilinear.backends.contract import Array
from rectilinear.backends.cupy_scratch import Scratches

LARGEST = 2**31 - 1  # extents and leading dimensions are 32 bits wide in CuPy's calls of cuBLAS
BFLOAT16_SINCE = 80  # compute capability times ten

Operation = Literal["NN", "NT", "TN"]
"""Which operand is transposed: ``x w``, ``dz w^T``, ``x^T dz``."""

# alpha and beta, which cuBLAS reads from host memory; kept here, since only their address is handed over.
ONE = {np.dtype(dtype): np.ones((), dtype) for dtype in (np.float32, np.float64)}
ZERO = {dtype: np.zeros((), dtype) for dtype in ONE}


class Products(Protocol):
    """What the backend multiplies with."""

    @property
    def about(self) -> str:
        """Its name and version, for the table of backends."""

    def rounds(self, x: Array) -> bool:
        """Whether products of operands like x, which have 16 bits, can be written in 16 bits, rounded once."""

    def adds(self, a: Array, b: Array, bias: Array) -> bool:
        """Whether a product that can be rounded can have a bias added before it is."""

    def product(self, operation: Operation, a: Array, b: Array, out: Array, bias: Array | None = None) -> None:
        """out = a b, as `operation` says, + bias, where it can be added.

        a and b of one dtype and of any strides, two-dimensional or stacked; out C-contiguous, on 16 bytes, and in the dtype of the sums
        or, where it can be rounded, of the operands; bias (m,), or stacked (groups, m). No extent is 0. Works on the current device and
        stream.
        """


class Gemm:
    """`Products` by ``cupy.matmul``, and by cuBLAS where that has no good answer; `why` says why not by cuBLASLt."""

    def __init__(self, cp: Any, scratches: Scratches, tf32: bool = False, why: str = "") -> None:
        self._cp = cp
        self._tf32 = tf32
        self._why = why

    @property
    def about(self) -> str:
        version = self._cp.cuda.cublas.getVersion(self._cp.cuda.device.get_cublas_handle())
        return f"cuBLAS {dotted(version)}" + (f" ({self._why})" if self._why else "")

    def rounds(self, x: Array) -> bool:
        return False

    def adds(self, a: Array, b: Array, bias: Array) -> bool:
        return False

    def product(self, operation: Operation, a: Array, b: Array, out: Array, bias: Array | None = None) -> None:
        cp = self._cp
        check_extents(a, b)
        a = aligned(a.swapaxes(-1, -2) if operation == "TN" else a, cp)
        b = aligned(b.swapaxes(-1, -2) if operation == "NT" else b, cp)
        if a.dtype.name == "bfloat16" and int(cp.cuda.Device().compute_capability) < BFLOAT16_SINCE:
            a, b = a.astype(out.dtype), b.astype(out.dtype)
        if a.dtype == out.dtype and out.ndim == 2:
            cp.matmul(a, b, out=out)
        else:
            self._strided(a, b, out)

    def _strided(self, a: Array, b: Array, out: Array) -> None:
        """out = a b, summed in out's dtype, which is float32 or float64."""
        cp, cublas = self._cp, self._cp.cuda.cublas
        groups = out.shape[0] if out.ndim == 3 else 1
        n, m = out.shape[-2:]
        a, transposed_a, lead_a, step_a = column_major(a)
        b, transposed_b, lead_b, step_b = column_major(b)
        compute = cublas.CUBLAS_COMPUTE_32F if out.dtype == np.float32 else cublas.CUBLAS_COMPUTE_64F
        if self._tf32 and a.dtype == np.float32:
            compute = cublas.CUBLAS_COMPUTE_32F_FAST_TF32
        flags = cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T
        # cuBLAS counts in column-major order, in which these arrays are their own transposes: out^T = b^T a^T.
        cublas.gemmStridedBatchedEx(
            cp.cuda.device.get_cublas_handle(),
            *(flags[transposed_b], flags[transposed_a], m, n, a.shape[-1], ONE[out.dtype].ctypes.data),
            *(b.data.ptr, cuda_type(cp, b.dtype), lead_b, step_b),
            *(a.data.ptr, cuda_type(cp, a.dtype), lead_a, step_a),
            ZERO[out.dtype].ctypes.data,
            *(out.data.ptr, cuda_type(cp, out.dtype), m, n * m),
            *(groups, compute, cublas.CUBLAS_GEMM_DEFAULT),
        )


def check_extents(a: Array, b: Array) -> None:
    if max(*a.shape, *b.shape) > LARGEST:
        raise ValueError(f"cuBLAS takes extents up to {LARGEST}, not a product of {a.shape} and {b.shape}; split the samples")


def column_major(x: Array) -> tuple[Array, bool, int, int]:
    """x, or a copy where cuBLAS cannot take its strides; seen as a matrix by columns, which x is the transpose of (or not: True):
    leading dimension, and distance of the groups in elements."""
    strides = column_major_strides(x)
    if strides is None:
        rows, cols = x.shape[-2:]
        return x.copy(), False, cols, rows * cols
    return x, *strides


def column_major_strides(x: Array) -> tuple[bool, int, int] | None:
    """As `column_major`; None where cuBLAS cannot take these strides."""
    rows, cols = x.shape[-2:]
    if any(stride % x.itemsize for stride in x.strides):
        return None
    group, row, col = (stride // x.itemsize for stride in (0, *x.strides)[-3:])
    if x.ndim == 3 and x.shape[0] == 1:
        group = 0
    if group >= 0:
        lead = row if rows > 1 else cols
        if (cols == 1 or col == 1) and cols <= lead <= LARGEST:
            return False, lead, group
        lead = col if cols > 1 else rows
        if (rows == 1 or row == 1) and rows <= lead <= LARGEST:
            return True, lead, group
    return None


def aligned(x: Array, cp: Any) -> Array:
    """x, or a copy where its elements lie across their natural boundaries, which no GPU instruction can read."""
    size = x.itemsize
    if x.data.ptr % size == 0 and (x._c_contiguous or x._f_contiguous or all(stride % size == 0 for stride in x.strides)):
        return x
    as_bytes = cp.ndarray((*x.shape, x.itemsize), np.uint8, x.data, (*x.strides, 1))
    return as_bytes.copy().view(x.dtype).reshape(x.shape)


def cuda_type(cp: Any, dtype: Any) -> int:
    runtime = cp.cuda.runtime
    types = {"float16": runtime.CUDA_R_16F, "bfloat16": runtime.CUDA_R_16BF, "float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F}
    return int(types[dtype.name])


def dotted(version: int) -> str:
    """130100 -> 13.1.0, as cuBLAS counts."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
