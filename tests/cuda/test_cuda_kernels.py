"""(b) Every kernel, executed on the CPU from its CUDA source: numbers, bits, schedules, sizes beyond 32 bits."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_cases
import host_build
import numpy as np
import pytest
from host_backend import Host

from rectilinear.backends.cupy_loader import SOURCE

SCHEDULES = (0, 1, 7, 12345)  # ascending, descending, two shuffled
DIGESTS = Path(__file__).parent / "digests.json"


def dtypes_and_schedules() -> Iterator[Any]:
    """Ascending and shuffled for one dtype; for two others, whose sums are the same text, a shuffled one; the rest is nightly."""
    always = {("float32", 0), ("float32", 12345), ("float64", 12345), ("bfloat16", 12345)}
    for case in itertools.product(gpu_cases.DTYPES, SCHEDULES):
        yield pytest.param(*case, marks=() if case in always else pytest.mark.nightly)


SOME_DTYPES = [pytest.param(dtype, marks=() if dtype in ("float32", "bfloat16") else pytest.mark.nightly) for dtype in gpu_cases.DTYPES]


@pytest.mark.parametrize(("dtype", "schedule"), list(dtypes_and_schedules()))
@pytest.mark.parametrize("kind", gpu_cases.KINDS)
def test_numbers_and_bits(host: Host, kind: str, dtype: str, schedule: int) -> None:
    host.set(schedule=schedule)
    stored = json.loads(DIGESTS.read_text())
    for case in gpu_cases.cases(dtype, (kind,)):
        given = gpu_cases.inputs(case)
        got = gpu_cases.run(host.backend, case, given)
        assert gpu_cases.errors(case, given, got) == []
        # Softmax alone has a math library in it, whose last bit is the platform's. Planted bugs are to be found by the numbers alone.
        if kind != "softmax_loss" and "RECTILINEAR_CUDA_MUTANT" not in os.environ:
            assert gpu_cases.digest(got) == stored[case.name], f"{case.name}: run tests/cuda/make_digests.py if the change is wanted"


@pytest.mark.parametrize("dtype", SOME_DTYPES)
def test_subnormals_are_kept_apart_where_the_machine_does_not_flush(host: Host, dtype: str) -> None:
    host.set(flush=False)
    for case in gpu_cases.cases(dtype, tuple(kind for kind in gpu_cases.KINDS if kind != "softmax_loss")):
        given = gpu_cases.inputs(case)
        assert gpu_cases.errors(case, given, gpu_cases.run(host.backend, case, given), flush=False) == []


def test_a_negative_subnormal_is_not_kept_by_relu_though_ftz_is_on(host: Host) -> None:
    x = np.array([-1e-40, 1e-40, -0.0], "f4")
    y = host.backend.to_numpy(host.backend.relu_forward(host.backend.asarray(x), None))
    assert y.tobytes() == np.array([0.0, 1e-40, -0.0], "f4").tobytes()


def test_softmax_has_the_same_bits_under_every_schedule(host: Host) -> None:
    case = gpu_cases.Case("softmax_loss", "float32", (1, 300, 50))
    given = gpu_cases.inputs(case)
    found = set()
    for schedule in SCHEDULES:
        host.set(schedule=schedule)
        found.add(gpu_cases.digest(gpu_cases.run(host.backend, case, given)))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", SOME_DTYPES)
def test_every_kernel_is_run_by_the_cases(host: Host, dtype: str) -> None:
    for case in gpu_cases.cases(dtype):
        gpu_cases.run(host.backend, case, gpu_cases.inputs(case))
    assert set(host.launched) == set(host_build.kernel_names(SOURCE.read_text(), dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_number_survives_widening_and_rounding(host: Host, dtype: str) -> None:
    """As a bias added to -0.0, which changes nothing: it widens to float32 and rounds back."""
    every = np.arange(2**16, dtype=np.uint16).view(gpu_cases.numpy_dtype(dtype)).reshape(1, -1)
    host.set(flush=False)
    z = host.backend.asarray(np.full((1, *every.shape), -0.0, np.float32))
    y = host.backend._empty(z.shape, every.dtype)
    host.backend._bias("bias_add", z, host.backend.asarray(every), y)
    assert (gpu_cases.bits(y.get()) == gpu_cases.bits(every)).all()


@pytest.mark.parametrize(("dtype", "z"), [("float16", -1e-9), ("bfloat16", -1e-45)])
def test_what_rounds_to_minus_zero_is_kept(host: Host, dtype: str, z: float) -> None:
    """As on the backends that look at the sign of the rounded z."""
    host.set(flush=False)
    for cols in (1, 8):  # the plain kernel and the wide one
        y, mask = host.backend._empty((1, 1, cols), gpu_cases.numpy_dtype(dtype)), host.backend._empty((1, 1, 1), np.uint8)
        host.backend._bias("bias_relu_mask", host.backend.asarray(np.full((1, 1, cols), z, np.float32)), None, y, mask)
        assert (y.get().view(np.uint16) == 0x8000).all()
        assert mask.get()[0, 0, 0] == 2**cols - 1


@pytest.mark.parametrize(("dtype", "x", "w"), [("float16", -(2.0**-14), 2.0**-14), ("bfloat16", -(2.0**-75), 2.0**-74)])
def test_what_rounds_to_minus_zero_is_kept_by_a_small_layer(host: Host, dtype: str, x: float, w: float) -> None:
    host.set(flush=False)
    T = gpu_cases.numpy_dtype(dtype)
    y, mask = host.backend.affine_relu_forward(*(host.backend.asarray(np.full((1, 1), value, T)) for value in (x, w)), None, None)
    assert host.launched == ["small_forward"]
    assert y.get().view(np.uint16) == 0x8000
    assert mask._bits.get() == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_to_16_bits_is_to_nearest_even(host: Host, dtype: str) -> None:
    """Around every 16-bit number: the number itself, the middle to the next, and one float32 step to either side of that."""
    T = gpu_cases.numpy_dtype(dtype)
    grid = np.arange(0, 2**16, 3, dtype=np.uint16).view(T).astype(np.float32).view(np.uint32)
    middle = grid + np.uint32({"float16": 1 << 12, "bfloat16": 1 << 15}[dtype])
    z = np.stack([grid, middle, middle + np.uint32(1), middle - np.uint32(1)])[None].view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        want = z.astype(T)
    on = host.backend.asarray(z)
    host.set(flush=False)
    y = host.backend._empty(z.shape, T)
    host.backend._bias("bias_add", on, None, y)
    assert (gpu_cases.bits(y.get()) == gpu_cases.bits(want)).all()


# ---------------------------------------------------------------- more elements than 32 bits count

# Columns and rows whose product passes 2**32; of the launch only the blocks at the end run, on memory that is never touched elsewhere.
_ROWS, _COLS = 2**22 + 3, 1032


@pytest.fixture
def vast(host: Host) -> object:
    """Makes device arrays of any size out of address space alone."""
    import mmap

    def make(shape: tuple[int, ...], dtype: np.dtype) -> object:
        size = int(np.prod(shape)) * dtype.itemsize
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE of Linux
        return host.cp.ndarray._of(np.frombuffer(memory, np.uint8).view(dtype).reshape(shape))

    return make


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_offsets_beyond_32_bits(host: Host, vast: object, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    T = gpu_cases.numpy_dtype(dtype)
    shape, last = (_ROWS, _COLS), slice(_ROWS - 40, None)
    x, y, mask = vast(shape, T), vast(shape, T), vast((_ROWS, _COLS // 8), np.dtype(np.uint8))
    wide = x if T.itemsize == 4 else vast(shape, np.dtype(np.float32))
    want = with_signs = gpu_cases.uniform((40, _COLS), 5).astype(T)
    x._host[last] = wide._host[last] = with_signs
    b = host.backend.asarray(np.zeros(_COLS, T))
    kernel_calls = _only_the_last_blocks(host, monkeypatch, 400)

    host.backend._flat("relu", (x, y))
    assert np.array_equal(y._host[last][-8:], np.where(want < 0, T.type(0), want)[-8:])
    y._host[last] = 0
    host.backend._bias("bias_relu_mask", wide, b, y, mask)
    assert np.array_equal(y._host[last][-8:], np.where(want < 0, T.type(0), want)[-8:])
    assert np.array_equal(mask._host[last][-8:], np.packbits(want >= 0, axis=1, bitorder="little")[-8:])
    y._host[last] = 0
    host.backend._mask_backward(x, mask, y)
    assert np.array_equal(y._host[last][-8:], np.where(want < 0, T.type(0), want)[-8:])
    assert kernel_calls == ["relu_wide", "bias_relu_mask_wide", "mask_backward_wide"]


def test_sums_beyond_32_bits(host: Host, vast: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many groups only the last is summed: its rows lie beyond 2**32 elements."""
    T = np.dtype(np.float16)
    groups, rows, cols = 2**16 + 9, 64, 1032
    dout = vast((groups, rows, cols), T)
    dout._host[-1] = 1
    _only_the_last_blocks(host, monkeypatch, None)
    parts = host.backend.bias_backward(dout, None)
    assert np.array_equal(parts._host[-1], np.full(cols, rows, T))


def _only_the_last_blocks(host: Host, monkeypatch: pytest.MonkeyPatch, blocks: int | None) -> list[str]:
    """Let each launch run only its last blocks; None: those of the last group. Returns the list of launched kernels."""
    launch, names = host_build.HostKernel.__call__, []

    def run(kernel: host_build.HostKernel, grid: tuple[int, ...], block: tuple[int, ...], args: tuple) -> None:
        total = int(np.prod(grid))
        if blocks is not None:
            kernel.module.window = (total - blocks, blocks)
        else:
            groups = int(args[6])
            kernel.module.window = (grid[0] * (groups - 1), grid[0])
        names.append(kernel.name)
        launch(kernel, grid, block, args)

    monkeypatch.setattr(host_build.HostKernel, "__call__", run)
    return names
