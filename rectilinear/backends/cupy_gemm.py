"""The products that `cupy.matmul` has no good answer for, by cuBLAS's strided batched gemm.

`cupy.matmul` rounds the product of 16-bit operands to 16 bits, before the bias could be added, and copies the transposed operands
of a stacked product. cuBLAS does neither. Like `cupy_backend`, this file is handed its array module.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rectilinear.backends.contract import Array

LARGEST = 2**31 - 1  # extents and leading dimensions are 32 bits wide in CuPy's calls of cuBLAS

# alpha and beta, which cuBLAS reads from host memory; kept here, since only their address is handed over.
_ONE = {np.dtype(dtype): np.ones((), dtype) for dtype in (np.float32, np.float64)}
_ZERO = {dtype: np.zeros((), dtype) for dtype in _ONE}


def strided_gemm(cp: Any, a: Array, b: Array, out: Array) -> None:
    """out = a b, summed in out's dtype.

    a (n, k), b (k, m) of one dtype, of any strides, out (n, m) C-contiguous in float32 or float64, no extent 0; or stacked, all with
    one more leading axis.
    """
    cublas = cp.cuda.cublas
    groups = out.shape[0] if out.ndim == 3 else 1
    n, m = out.shape[-2:]
    a, op_a, lead_a, step_a = _column_major(cp, a)
    b, op_b, lead_b, step_b = _column_major(cp, b)
    compute = cublas.CUBLAS_COMPUTE_32F if out.dtype == np.float32 else cublas.CUBLAS_COMPUTE_64F
    # cuBLAS counts in column-major order, in which these arrays are their own transposes: out^T = b^T a^T.
    cublas.gemmStridedBatchedEx(
        cp.cuda.device.get_cublas_handle(),
        *(op_b, op_a, m, n, a.shape[-1], _ONE[out.dtype].ctypes.data),
        *(b.data.ptr, _type(cp, b), lead_b, step_b),
        *(a.data.ptr, _type(cp, a), lead_a, step_a),
        _ZERO[out.dtype].ctypes.data,
        *(out.data.ptr, _type(cp, out), m, n * m),
        *(groups, compute, cublas.CUBLAS_GEMM_DEFAULT),
    )


def _column_major(cp: Any, x: Array) -> tuple[Array, int, int, int]:
    """x, or a copy where cuBLAS cannot take its strides; operation, leading dimension, and distance of the groups in elements."""
    rows, cols = x.shape[-2:]
    group, row, col = (stride // x.itemsize for stride in (0, *x.strides)[-3:])
    if x.ndim == 3 and x.shape[0] == 1:
        group = 0
    if group >= 0:
        lead = row if rows > 1 else cols
        if (cols == 1 or col == 1) and cols <= lead <= LARGEST:
            return x, cp.cuda.cublas.CUBLAS_OP_N, lead, group
        lead = col if cols > 1 else rows
        if (rows == 1 or row == 1) and rows <= lead <= LARGEST:
            return x, cp.cuda.cublas.CUBLAS_OP_T, lead, group
    return x.copy(), cp.cuda.cublas.CUBLAS_OP_N, cols, rows * cols


def _type(cp: Any, x: Array) -> int:
    runtime = cp.cuda.runtime
    types = {"float16": runtime.CUDA_R_16F, "bfloat16": runtime.CUDA_R_16BF, "float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F}
    return int(types[x.dtype.name])
