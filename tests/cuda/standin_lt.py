"""Tests only: the part of ``nvmath.bindings.cublasLt`` that the backend touches, on NumPy memory.

Enumerations, widths of attributes and the heuristic's result are nvmath's own, which need no driver. It works on raw addresses and
matrices by columns, takes nothing that cuBLASLt refuses, and is as unkind as cuBLASLt may be: a sum is split, its parts are added in
the worst type that the preference allows, and a bias is added after that is rounded; a missing alignment counts as the documented 256
bytes. Beyond that it notices what on a GPU would be a race: one workspace under two streams, one bias pointer under two threads. A green
run says nothing about speed.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from standin import Device, MemoryPointer, _bfloat16, _Interface, _matrices, _tf32, device_work, get_current_stream

_MAGIC = 0xC0B1A5
_SPLIT = 4  # blocks of a long sum
_LONG = 64  # terms

NOT_SUPPORTED, INVALID_VALUE, ARCH_MISMATCH = 15, 7, 8


class StatusError(Exception):
    """`cuBLASLtError`, which asks the library for its words and so cannot be made without a driver."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"{words} ({status})")
        self.status = status


@dataclass
class _Object:
    """A descriptor, a layout or a preference."""

    kind: str
    made_with: tuple[int, ...]
    attributes: dict[int, int] = field(default_factory=dict)
    thread: int = 0  # that set the pointer of the bias


@dataclass(frozen=True)
class _Problem:
    """What an algorithm was chosen for: all that is said of a product but its pointers."""

    descriptor: tuple[Any, ...]
    layouts: tuple[Any, ...]


@dataclass(frozen=True)
class _Algorithm:
    problem: _Problem
    alignments: tuple[int, ...]
    scheme: int
    split: int
    workspace: int


class _Bindings:
    """``nvmath.bindings.cublasLt``, imported when it is used: these files are collected, and left out, where it is not installed too."""

    def __getattr__(self, name: str) -> Any:
        from nvmath.bindings import cublasLt

        return getattr(cublasLt, name)


cublasLt: Any = _Bindings()  # noqa: N816 - its name

_NVMATHS_OWN = (
    "Epilogue",
    "ReductionScheme",
    "MatmulDescAttribute",
    "MatrixLayoutAttribute",
    "MatmulPreferenceAttribute",
    "MatmulAlgoConfigAttribute",
    "MatmulHeuristicResult",
    "get_matmul_desc_attribute_dtype",
    "get_matrix_layout_attribute_dtype",
    "get_matmul_preference_attribute_dtype",
    "get_matmul_algo_config_attribute_dtype",
)


class CublasLt:
    """What `from nvmath.bindings import cublasLt` would give. `counts` has products, heuristics and attributes."""

    def __init__(self, counts: Counter[str]) -> None:
        for name in _NVMATHS_OWN:
            setattr(self, name, getattr(cublasLt, name))
        self.counts = counts
        self.alive: dict[int, _Object] = {}
        self.workspaces: dict[tuple[int, int], tuple[int, int]] = {}  # (device, stream) -> where its latest lies
        self.calls: list[tuple[Any, ...]] = []  # (descriptor, algorithm, stream) of each product
        self._handles: dict[int, int] = {}
        self._algorithms: list[_Algorithm] = []
        self._numbers = itertools.count(0x1000)
        self._lock = threading.Lock()

    # handle

    def create(self) -> int:
        handle = next(self._numbers)
        self._handles[handle] = Device().id
        return handle

    def get_version(self) -> int:
        return 130100

    # opaque objects

    def matmul_desc_create(self, compute_type: int, scale_type: int) -> int:
        return self._new("matmul_desc", compute_type, scale_type)

    def matrix_layout_create(self, type: int, rows: int, cols: int, ld: int) -> int:
        return self._new("matrix_layout", type, rows, cols, ld)

    def matmul_preference_create(self) -> int:
        return self._new("matmul_preference")

    def matmul_desc_destroy(self, matmul_desc: int) -> None:
        del self.alive[matmul_desc]

    def matrix_layout_destroy(self, mat_layout: int) -> None:
        del self.alive[mat_layout]

    def matmul_preference_destroy(self, pref: int) -> None:
        del self.alive[pref]

    def matmul_desc_set_attribute(self, matmul_desc: int, attr: int, buf: int, size_in_bytes: int) -> None:
        self._set("matmul_desc", matmul_desc, attr, buf, size_in_bytes)

    def matrix_layout_set_attribute(self, mat_layout: int, attr: int, buf: int, size_in_bytes: int) -> None:
        self._set("matrix_layout", mat_layout, attr, buf, size_in_bytes)

    def matmul_preference_set_attribute(self, pref: int, attr: int, buf: int, size_in_bytes: int) -> None:
        self._set("matmul_preference", pref, attr, buf, size_in_bytes)

    def _new(self, kind: str, *made_with: int) -> int:
        at = next(self._numbers)
        self.alive[at] = _Object(kind, made_with)
        return at

    def _get(self, at: int, kind: str) -> _Object:
        found = self.alive.get(at)
        if found is None or found.kind != kind:
            raise StatusError(INVALID_VALUE, f"no {kind} at {at}")
        return found

    def _set(self, kind: str, at: int, attr: int, buf: int, size: int) -> None:
        dtype = np.dtype(getattr(cublasLt, f"get_{kind}_attribute_dtype")(attr))
        if size != dtype.itemsize:  # cuBLASLt compares widths
            raise StatusError(INVALID_VALUE, f"attribute {attr} of a {kind} has {dtype.itemsize} bytes, not {size}")
        found = self._get(at, kind)
        found.attributes[int(attr)] = int(np.frombuffer(ctypes.string_at(buf, size), dtype)[0])
        if kind == "matmul_desc" and attr == cublasLt.MatmulDescAttribute.BIAS_POINTER:
            found.thread = threading.get_ident()
            self.counts["pointers"] += 1

    # the heuristic

    def _problem(self, descriptor: _Object, layouts: list[_Object]) -> _Problem:
        """Checked as cuBLASLt checks it."""
        what, how = cublasLt.MatmulDescAttribute, descriptor.attributes
        said = {key: value for key, value in how.items() if key != what.BIAS_POINTER}
        problem = _Problem(
            (descriptor.made_with, tuple(sorted(said.items()))),
            tuple((each.made_with, tuple(sorted(each.attributes.items()))) for each in layouts),
        )
        compute, scale = descriptor.made_with
        types = [each.made_with[0] for each in layouts]
        allowed = {(68, 0): {0, 2, 14}, (77, 0): {0}, (70, 1): {1}}.get((compute, scale), set())
        if types[0] != types[1] or types[2] != types[3] or not set(types) <= allowed or (types[2] != types[0] and types[2] != 0):
            raise StatusError(NOT_SUPPORTED, f"types {types} with compute type {compute}")
        if how.get(what.EPILOGUE, 1) not in (cublasLt.Epilogue.DEFAULT, cublasLt.Epilogue.BIAS):
            raise StatusError(NOT_SUPPORTED, "an epilogue that the stand-in does not know")
        (k, m), (n, also_k) = (
            each.made_with[1:3] if transposed else each.made_with[2:0:-1]
            for each, transposed in zip(layouts, (how.get(what.TRANSA, 0), how.get(what.TRANSB, 0)), strict=False)
        )
        if k != also_k or layouts[3].made_with[1:3] != (m, n) or layouts[2].made_with != layouts[3].made_with:
            raise StatusError(INVALID_VALUE, f"({m}, {k}) times ({also_k}, {n}) into {layouts[3].made_with[1:3]}")
        if any(lead < rows or min(rows, cols) < 1 for _, rows, cols, lead in (each.made_with for each in layouts)):
            raise StatusError(INVALID_VALUE, "a leading dimension below the rows, or no elements")
        if len({each.attributes.get(cublasLt.MatrixLayoutAttribute.BATCH_COUNT, 1) for each in layouts}) != 1:
            raise StatusError(INVALID_VALUE, "batches of different counts")
        return problem

    def matmul_algo_get_heuristic(
        self, light_handle: int, operation_desc: int, adesc: int, bdesc: int, cdesc: int, ddesc: int, preference: int,
        requested_algo_count: int, heuristic_results_array: int, return_algo_count: int,
    ) -> None:  # fmt: skip
        if get_current_stream().is_capturing():
            raise StatusError(NOT_SUPPORTED, "the heuristic is refused while a stream captures")
        self._check_handle(light_handle)
        layouts = [self._get(each, "matrix_layout") for each in (adesc, bdesc, cdesc, ddesc)]
        descriptor = self._get(operation_desc, "matmul_desc")
        problem = self._problem(descriptor, layouts)
        wish, name = self._get(preference, "matmul_preference").attributes, cublasLt.MatmulPreferenceAttribute
        alignments = tuple(wish.get(name[f"MIN_ALIGNMENT_{matrix}_BYTES"], 256) for matrix in "ABCD")
        allowed = wish.get(name.REDUCTION_SCHEME_MASK, cublasLt.ReductionScheme.MASK)
        _, m, n, _ = layouts[3].made_with
        k = layouts[0].made_with[1 if descriptor.attributes.get(cublasLt.MatmulDescAttribute.TRANSA, 0) else 2]
        groups = layouts[3].attributes.get(cublasLt.MatrixLayoutAttribute.BATCH_COUNT, 1)
        scheme = next((each for each in (4, 1, 2) if allowed & each), 0) if k >= _LONG else 0
        split = _SPLIT if scheme else 1
        workspace = split * m * n * groups * np.dtype(self._sums(descriptor)).itemsize if scheme == 2 else 0
        if workspace > wish.get(name.MAX_WORKSPACE_BYTES, 0):
            scheme, split, workspace = 0, 1, 0
        with self._lock:
            self._algorithms.append(_Algorithm(problem, alignments, scheme, split, workspace))
            number = len(self._algorithms) - 1
        result = np.zeros(1, cublasLt.matmul_heuristic_result_dtype)
        result["algo"]["data_"][0, :2] = _MAGIC, number
        result["workspace_size"] = workspace
        ctypes.memmove(heuristic_results_array, result.ctypes.data, result.nbytes)
        ctypes.memmove(return_algo_count, np.array(1, np.int32).ctypes.data, 4)
        self.counts["heuristics"] += 1

    def matmul_algo_config_get_attribute(self, algo: int, attr: int, buf: int, size_in_bytes: int, size_written: int) -> None:
        dtype = np.dtype(cublasLt.get_matmul_algo_config_attribute_dtype(attr))
        if attr != cublasLt.MatmulAlgoConfigAttribute.SPLITK_NUM or size_in_bytes != dtype.itemsize:
            raise StatusError(INVALID_VALUE, f"attribute {attr} of an algorithm in {size_in_bytes} bytes")
        value = np.array(self._algorithm(algo)[1].split, dtype)
        ctypes.memmove(buf, value.ctypes.data, value.nbytes)
        ctypes.memmove(size_written, np.array(value.nbytes, np.uint64).ctypes.data, 8)

    def _algorithm(self, at: int) -> tuple[int, _Algorithm]:
        magic, number = np.frombuffer(ctypes.string_at(at, 16), np.uint64)
        if magic != _MAGIC:
            raise StatusError(INVALID_VALUE, "no algorithm")
        return int(number), self._algorithms[int(number)]

    # the product

    def matmul(
        self, light_handle: int, compute_desc: int, alpha: int, a: int, adesc: int, b: int, bdesc: int, beta: int, c: int, cdesc: int,
        d: int, ddesc: int, algo: int, workspace: int, workspace_size_in_bytes: int, stream: int,
    ) -> None:  # fmt: skip
        self._check_handle(light_handle)
        descriptor = self._get(compute_desc, "matmul_desc")
        layouts = [self._get(each, "matrix_layout") for each in (adesc, bdesc, cdesc, ddesc)]
        number, algorithm = self._algorithm(algo)
        if algorithm.problem != self._problem(descriptor, layouts):
            raise StatusError(NOT_SUPPORTED, "an algorithm that was chosen for another product")
        for pointer, alignment in zip((a, b, c, d), algorithm.alignments, strict=True):
            if pointer % alignment:
                raise StatusError(INVALID_VALUE, f"an operand that does not lie on {alignment} bytes")
        self._check_workspace(algorithm, workspace, workspace_size_in_bytes, stream)
        bias = descriptor.attributes.get(cublasLt.MatmulDescAttribute.BIAS_POINTER, 0)
        if descriptor.attributes.get(cublasLt.MatmulDescAttribute.EPILOGUE, 1) == cublasLt.Epilogue.BIAS:
            if not bias or bias % 16:
                raise StatusError(INVALID_VALUE, "no bias, or not on 16 bytes")
            if descriptor.thread != threading.get_ident():
                raise RuntimeError("a race: the bias pointer of this descriptor was set by another thread")
        else:
            bias = 0
        with self._lock:
            self.calls.append((compute_desc, number, stream))
        self.counts["products"] += 1
        # As a kernel is launched: what the descriptors say now goes with it, and they may be destroyed or changed behind it.
        said = replace(descriptor, attributes=dict(descriptor.attributes))
        device_work(lambda: self._multiply(said, layouts, algorithm, (alpha, a, b, beta, c, d, bias, workspace)))

    def _multiply(self, descriptor: _Object, layouts: list[_Object], algorithm: _Algorithm, pointers: tuple[int, ...]) -> None:
        alpha, a, b, beta, _, d, bias, workspace = pointers
        sums = self._sums(descriptor)
        how, what = descriptor.attributes, cublasLt.MatmulDescAttribute
        factor, keep = (_matrices(at, sums, 1, 1, 1, 0, 1)[0, 0, 0] for at in (alpha, beta))
        if factor != 1 or keep != 0:
            raise StatusError(NOT_SUPPORTED, "the backend multiplies by 1 and adds nothing")
        left, right, out = (self._at(at, layout) for at, layout in zip((a, b, d), (layouts[0], layouts[1], layouts[3]), strict=True))
        left = left.swapaxes(1, 2) if how.get(what.TRANSA, 0) else left
        right = right.swapaxes(1, 2) if how.get(what.TRANSB, 0) else right
        left, right = (_tf32(x) if descriptor.made_with[0] == 77 else x.astype(sums) for x in (left, right))
        with np.errstate(over="ignore", invalid="ignore"):
            total = _sum_of_parts(left, right, algorithm, workspace, out.dtype)
            if bias and algorithm.split > 1:  # as cuBLASLt 13.1 has it on an H100
                total = total.astype(out.dtype).astype(sums)
            if bias:
                groups, rows = out.shape[:2]
                step = how.get(what.BIAS_BATCH_STRIDE, 0)
                total = total + _matrices(bias, out.dtype, rows, 1, rows, step, groups).astype(sums)
            out[...] = total.astype(out.dtype)

    def _at(self, address: int, layout: _Object) -> np.ndarray:
        type_of, rows, cols, lead = layout.made_with
        what = cublasLt.MatrixLayoutAttribute
        groups, step = layout.attributes.get(what.BATCH_COUNT, 1), layout.attributes.get(what.STRIDED_BATCH_OFFSET, 0)
        dtype = {0: np.dtype("f4"), 1: np.dtype("f8"), 2: np.dtype("f2"), 14: _bfloat16()}[type_of]
        return _matrices(address, dtype, rows, cols, lead, step, groups)

    def _sums(self, descriptor: _Object) -> np.dtype:
        return np.dtype("f8" if descriptor.made_with[1] == 1 else "f4")

    def _check_handle(self, handle: int) -> None:
        if self._handles.get(handle) != Device().id:
            raise StatusError(ARCH_MISMATCH, "a handle of another device, or none")

    def _check_workspace(self, algorithm: _Algorithm, at: int, size: int, stream: int) -> None:
        if algorithm.workspace > size or (size and not at):
            raise StatusError(INVALID_VALUE, f"the algorithm needs {algorithm.workspace} bytes of workspace, not {size}")
        if size:
            where, mine = (at, at + size), (Device().id, stream)
            with self._lock:
                for other, (start, end) in self.workspaces.items():
                    if other != mine and start < where[1] and where[0] < end:
                        raise RuntimeError("a race: two streams write to one workspace")
                self.workspaces[mine] = where


def _sum_of_parts(left: np.ndarray, right: np.ndarray, algorithm: _Algorithm, workspace: int, result: np.dtype) -> np.ndarray:
    """The product of stacks of matrices, by slices of the sum, whose parts are added where and as the reduction scheme says."""
    cuts = np.linspace(0, left.shape[-1], algorithm.split + 1, dtype=int)
    parts = [np.matmul(left[..., i:j], right[:, i:j]) for i, j in itertools.pairwise(cuts)]
    if algorithm.scheme in (0, 2):
        if algorithm.scheme:
            shape = (len(parts), *parts[0].shape)
            kept = np.asarray(_Interface(MemoryPointer(workspace, None), shape, parts[0].dtype, None)).view(parts[0].dtype)
            kept[...] = parts
            parts = list(kept)
        return sum(parts[1:], parts[0])
    total = parts[0].astype(result)
    for part in parts[1:]:
        total = (total.astype(part.dtype) + part.astype(result).astype(part.dtype)).astype(result)
    return total.astype(parts[0].dtype)
