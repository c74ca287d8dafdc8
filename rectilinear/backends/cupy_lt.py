"""The products of the cupy backend by cuBLASLt, called through nvmath-python's bindings: plans made once and kept.

A plan is all that a product needs beside its pointers: descriptor, layouts, and the algorithm that cuBLASLt's heuristic chose. It is
made once for shapes, strides, dtype, transposes, bias and device, so that a product costs a look-up and one call. What a plan is made
for holds at every address: operands that do not lie on 16 bytes are copied, so that no address has an algorithm of its own, and equal
calls give equal bits.

- Sums are float32 (float64 for float64). Results of 16-bit types are rounded once, after the bias, which the epilogue adds.
- cuBLASLt may split a sum over blocks only where it adds the parts in that type and in a fixed order (COMPUTE_TYPE): else 16-bit
  results would be sums of rounded parts. What it splits it rounds before it adds a bias (seen on an H100, cuBLASLt 13.1, bfloat16):
  such products are to be had in float32, and the bias from elsewhere (`adds`). Not split they are up to ten times as slow.
- ReLU and its mask are not taken from an epilogue: in 16 bits its mask drops NaN, which the layers keep (measured on an H100).
- A descriptor that holds the pointer of a bias is its thread's own. Workspaces are a stream's own, or a graph's: `cupy_scratch`.

Like `cupy_backend`, this file imports neither CuPy nor nvmath: `cupy_loader` hands them in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rectilinear.backends.contract import Array
from rectilinear.backends.cupy_gemm import (
    BFLOAT16_SINCE,
    ONE,
    ZERO,
    Gemm,
    Operation,
    aligned,
    check_extents,
    column_major_strides,
    cuda_type,
    dotted,
)
from rectilinear.backends.cupy_scratch import Scratches, refuse_while_recording

_MOST_PLANS = 1024  # kept; some hundred bytes of host memory each. A net has three a layer and batch size.
_ALIGNMENT = 16  # bytes; the widest access of a thread
_MOST_WORKSPACE = 32 << 20  # bytes; what the cuBLAS manual recommends for a Hopper GPU, the largest of its figures

# cublasComputeType_t, held against nvmath's own by a test: the module that has it brings another library.
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77


class _Owned:
    """An opaque object of cuBLASLt's, destroyed with the last that refers to it."""

    __slots__ = ("_destroy", "at")

    def __init__(self, at: int, destroy: Callable[[int], None]) -> None:
        self.at, self._destroy = at, destroy

    def __del__(self) -> None:
        self._destroy(self.at)


class _Matrix(NamedTuple):
    """A matrix by columns, as cuBLASLt counts; where it is stacked, the groups lie `step` elements apart."""

    rows: int
    cols: int
    lead: int
    groups: int
    step: int


class _Recipe(NamedTuple):
    """What a descriptor says. With a bias, those of two groups lie `bias_step` elements apart."""

    compute: int
    scale: int
    transposed_a: bool
    transposed_b: bool
    bias_step: int | None


class _Biased(threading.local):
    """This thread's own descriptor of a product with a bias, and the pointer that it holds."""

    descriptor: _Owned | None = None
    pointer = 0


class _Plan:
    """A product without its pointers. Immutable once made, but for what is a thread's own."""

    __slots__ = (
        "a",
        "algorithm",
        "b",
        "biased",
        "chosen",
        "descriptor",
        "handle",
        "one",
        "out",
        "owned",
        "recipe",
        "splits",
        "workspace",
        "zero",
    )

    def __init__(self, handle: int, recipe: _Recipe, scale: np.dtype[Any], layouts: tuple[_Owned, _Owned, _Owned]) -> None:
        self.handle = handle
        self.recipe = recipe
        self.one, self.zero = ONE[scale].ctypes.data, ZERO[scale].ctypes.data
        self.a, self.b, self.out = (layout.at for layout in layouts)
        self.owned: list[_Owned] = list(layouts)
        self.biased = _Biased()
        self.descriptor = 0  # of a product without a bias
        self.chosen: Any = None  # the heuristic's answer, which holds the algorithm
        self.algorithm = 0
        self.splits = False  # its sum over blocks
        self.workspace = 0  # bytes


class _Device(NamedTuple):
    handle: int
    has_bfloat16: bool


class Plans:
    """`cupy_gemm.Products` by cuBLASLt. `lt` is ``nvmath.bindings.cublasLt``.

    Making one raises what `lt` raises where cuBLASLt cannot work here: no driver, no library.
    """

    def __init__(self, cp: Any, scratches: Scratches, lt: Any, tf32: bool = False) -> None:
        self._cp, self._lt, self._scratches, self._tf32 = cp, lt, scratches, tf32
        self._otherwise = Gemm(cp, scratches, tf32)
        self._plans: dict[Any, _Plan] = {}
        self._devices: dict[int, _Device] = {}
        self._lock = threading.Lock()
        self._current_stream = cp.cuda.get_current_stream
        self._matmul = lt.matmul
        self._device(cp.cuda.Device().id)
        self._about = f"cuBLASLt {dotted(lt.get_version())}"

    @property
    def about(self) -> str:
        return self._about

    def rounds(self, x: Array) -> bool:
        return x.itemsize == 2 and (x.dtype == np.float16 or self._device(x.data.device_id).has_bfloat16)

    def adds(self, a: Array, b: Array, bias: Array) -> bool:
        plan = self._plans.get(_key("NN", a, b, bias, a.dtype, a.data.device_id))
        if plan is None:
            plan = self._made("NN", *self._takeable(a, b, bias), a.dtype)
        return not plan.splits

    def product(self, operation: Operation, a: Array, b: Array, out: Array, bias: Array | None = None) -> None:
        dtype = out.dtype
        if dtype != a.dtype and not self.rounds(a):
            self._otherwise.product(operation, a, b, out)
            return
        to, at_a, at_b, at_bias = out.data, a.data.ptr, b.data.ptr, 0 if bias is None else bias.data.ptr
        plan = None
        if not (at_a | at_b | at_bias) % _ALIGNMENT:
            plan = self._plans.get(_key(operation, a, b, bias, dtype, to.device_id))
        if plan is None:
            a, b, bias = self._takeable(a, b, bias)
            at_a, at_b, at_bias = a.data.ptr, b.data.ptr, 0 if bias is None else bias.data.ptr
            plan = self._made(operation, a, b, bias, dtype)
        stream = self._current_stream().ptr
        work = None
        if plan.workspace:  # held until the launch, since another thread on this stream may ask for a larger one
            work = self._scratches.current(self._cp, to.device_id, stream).workspace(plan.workspace)
        descriptor = plan.descriptor if bias is None else self._biased(plan, at_bias)
        # cuBLAS counts in column-major order, in which these arrays are their own transposes: out^T = b^T a^T.
        self._matmul(
            *(plan.handle, descriptor, plan.one, at_b, plan.a, at_a, plan.b, plan.zero, to.ptr, plan.out, to.ptr, plan.out),
            *(plan.algorithm, 0 if work is None else work.data.ptr, plan.workspace, stream),
        )

    def _takeable(self, a: Array, b: Array, bias: Array | None) -> tuple[Array, Array, Array | None]:
        """The operands, or copies where cuBLASLt cannot take strides or addresses."""
        check_extents(a, b)
        a, b = (self._copy(x) if x.data.ptr % _ALIGNMENT or column_major_strides(x) is None else x for x in (a, b))
        if bias is not None and (bias.data.ptr % _ALIGNMENT or not bias._c_contiguous):
            bias = self._copy(bias)
        return a, b, bias

    def _copy(self, x: Array) -> Array:
        copy = aligned(x, self._cp)
        return x.copy() if copy is x else copy

    def _made(self, operation: Operation, a: Array, b: Array, bias: Array | None, dtype: Any) -> _Plan:
        """The plan for these operands and a result of this dtype, made where there is none."""
        key = _key(operation, a, b, bias, dtype, a.data.device_id)
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                self._refuse_while_capturing(a, b)
                plan = self._plan(operation, a, b, bias, dtype)
                if len(self._plans) >= _MOST_PLANS:
                    del self._plans[next(iter(self._plans))]
                self._plans[key] = plan
        return plan

    def _refuse_while_capturing(self, a: Array, b: Array) -> None:
        """CUDA 13.3 refuses cuBLASLt's heuristic while a stream captures, and then the whole recording is lost."""
        refuse_while_recording(f"a product of shapes {a.shape} and {b.shape} is met for the first time")
        if self._current_stream().is_capturing():
            raise RuntimeError(
                f"a product of shapes {a.shape} and {b.shape} is met for the first time while a stream captures, when cuBLASLt cannot "
                "plan it; call the function once before the capture begins"
            )

    def _plan(self, operation: Operation, a: Array, b: Array, bias: Array | None, result_dtype: Any) -> _Plan:
        lt, cp, dtype = self._lt, self._cp, a.dtype
        # cuBLASLt's first operand is b, its second a.
        transposed_b, first = _matrix(a, operation == "TN")
        transposed_a, second = _matrix(b, operation == "NT")
        n, m = a.shape[-1 if operation == "TN" else -2], b.shape[-2 if operation == "NT" else -1]
        result = _Matrix(m, n, m, first.groups, n * m)
        scale = dtype if dtype == np.float64 else np.dtype(np.float32)
        compute = COMPUTE_64F if dtype == np.float64 else COMPUTE_32F_FAST_TF32 if self._tf32 and dtype == np.float32 else COMPUTE_32F
        recipe = _Recipe(compute, cuda_type(cp, scale), transposed_a, transposed_b, None if bias is None else m if bias.ndim == 2 else 0)
        layouts = self._layout(second, dtype), self._layout(first, dtype), self._layout(result, result_dtype)
        plan = _Plan(self._device(a.data.device_id).handle, recipe, scale, layouts)
        if bias is None:
            descriptor = self._descriptor(recipe)
            plan.owned.append(descriptor)
            plan.descriptor = at = descriptor.at
        else:
            at = self._biased(plan, bias.data.ptr)
        preference = _Owned(lt.matmul_preference_create(), lt.matmul_preference_destroy)
        for name, value in (
            ("MAX_WORKSPACE_BYTES", _MOST_WORKSPACE),
            ("REDUCTION_SCHEME_MASK", lt.ReductionScheme.COMPUTE_TYPE),
            *((f"MIN_ALIGNMENT_{matrix}_BYTES", _ALIGNMENT) for matrix in "ABCD"),
        ):
            self._set("matmul_preference", preference.at, lt.MatmulPreferenceAttribute[name], value)
        chosen, count = lt.MatmulHeuristicResult(), np.zeros((), np.int32)
        lt.matmul_algo_get_heuristic(
            *(plan.handle, at, plan.a, plan.b, plan.out, plan.out, preference.at, 1, chosen.ptr, count.ctypes.data)
        )
        if count < 1 or chosen.state != 0:
            raise RuntimeError(
                f"cuBLASLt has no algorithm for a product of {a.dtype} of shapes {a.shape} and {b.shape} ({operation}); "
                "without nvmath-python, the cupy backend multiplies by cupy.matmul"
            )
        plan.chosen, plan.algorithm, plan.workspace = chosen, chosen.ptr, int(chosen.workspace_size)
        plan.splits = self._blocks_of_sum(plan.algorithm) > 1
        return plan

    def _biased(self, plan: _Plan, pointer: int) -> int:
        """This thread's descriptor, with the bias at `pointer`. Setting it costs 8 us, and in a loop it is mostly the one before."""
        own = plan.biased
        if own.descriptor is None:
            own.descriptor = self._descriptor(plan.recipe)
        if own.pointer != pointer:
            self._set("matmul_desc", own.descriptor.at, self._lt.MatmulDescAttribute.BIAS_POINTER, pointer)
            own.pointer = pointer
        return own.descriptor.at

    def _blocks_of_sum(self, algorithm: int) -> int:
        lt, attribute = self._lt, self._lt.MatmulAlgoConfigAttribute.SPLITK_NUM
        held, written = np.zeros((), lt.get_matmul_algo_config_attribute_dtype(attribute)), np.zeros((), np.uint64)
        lt.matmul_algo_config_get_attribute(algorithm, attribute, held.ctypes.data, held.itemsize, written.ctypes.data)
        return int(held)

    def _descriptor(self, recipe: _Recipe) -> _Owned:
        lt = self._lt
        descriptor = _Owned(lt.matmul_desc_create(recipe.compute, recipe.scale), lt.matmul_desc_destroy)
        attribute = lt.MatmulDescAttribute
        # CUBLAS_OP_N is 0, CUBLAS_OP_T 1.
        values = [(attribute.TRANSA, int(recipe.transposed_a)), (attribute.TRANSB, int(recipe.transposed_b))]
        if recipe.bias_step is not None:
            values += [(attribute.EPILOGUE, lt.Epilogue.BIAS), (attribute.BIAS_BATCH_STRIDE, recipe.bias_step)]
        for name, value in values:
            self._set("matmul_desc", descriptor.at, name, value)
        return descriptor

    def _layout(self, matrix: _Matrix, dtype: np.dtype[Any]) -> _Owned:
        lt, attribute = self._lt, self._lt.MatrixLayoutAttribute
        at = lt.matrix_layout_create(cuda_type(self._cp, dtype), matrix.rows, matrix.cols, matrix.lead)
        layout = _Owned(at, lt.matrix_layout_destroy)
        if matrix.groups > 1:
            self._set("matrix_layout", at, attribute.BATCH_COUNT, matrix.groups)
            self._set("matrix_layout", at, attribute.STRIDED_BATCH_OFFSET, matrix.step)
        return layout

    def _set(self, kind: str, of: int, attribute: int, value: int) -> None:
        """Set an attribute, in the width that nvmath says it has."""
        dtype = getattr(self._lt, f"get_{kind}_attribute_dtype")(attribute)
        held = np.array(value, dtype)
        getattr(self._lt, f"{kind}_set_attribute")(of, attribute, held.ctypes.data, held.itemsize)

    def _device(self, device: int) -> _Device:
        """What belongs to a device, which is the current one when it is met first."""
        found = self._devices.get(device)
        if found is None:
            capability = int(self._cp.cuda.Device(device).compute_capability)
            found = self._devices.setdefault(device, _Device(self._lt.create(), capability >= BFLOAT16_SINCE))
        return found


def _key(operation: Operation, a: Array, b: Array, bias: Array | None, dtype: Any, device: int) -> Any:
    """What a plan is made for. Every product asks, so that contiguous arrays, which are most, do not name their strides."""
    lies_a, lies_b = a._c_contiguous or a.strides, b._c_contiguous or b.strides
    return operation, a.shape, lies_a, b.shape, lies_b, a.dtype, None if bias is None else bias._c_contiguous, dtype, device


def _matrix(x: Array, transposed: bool) -> tuple[bool, _Matrix]:
    """An operand whose strides cuBLASLt takes: whether it multiplies transposed, and how it lies."""
    strides = column_major_strides(x)
    assert strides is not None
    turned, lead, step = strides
    rows, cols = x.shape[-2:]
    by_columns = (rows, cols) if turned else (cols, rows)
    return turned != transposed, _Matrix(*by_columns, lead, x.shape[0] if x.ndim == 3 else 1, step)
