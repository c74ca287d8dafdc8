"""The probes: that they do the work they are paid for, that they are plausible, and what is said where they cannot run."""

import numpy as np
import pytest

from rectilinear.measure import ceilings, machine
from rectilinear.measure.ceilings import _LLVM, _buffers, _copy_ir, _fma_ir, _NumPy, _read_ir, merged


@pytest.fixture(scope="module")
def llvm():
    return _LLVM()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("chains", [1, 10, 24])
def test_every_fma_of_the_peak_probe_is_done(llvm, dtype, chains):
    # With a = b = 1, c starts at 1 and grows by 1 each time: after n times every chain holds 1 + n; the sum adds a.
    for width in llvm._widths:
        (sink,) = _buffers(64, 1)
        sink.view(dtype)[:] = 1
        llvm._kernel(_fma_ir(dtype, width, chains), 2)(1000, sink.ctypes.data)
        lanes = width // np.dtype(dtype).itemsize
        assert sink.view(dtype)[:lanes].tolist() == [1 + chains * 1001] * lanes


def test_every_byte_of_the_read_probe_is_read(llvm):
    for width in llvm._widths:
        (source,), (sink,) = _buffers(width * 8 * 5, 1), _buffers(64, 1)
        words = source.view(np.int64)
        words[:] = np.arange(words.size) ** 2
        llvm._kernel(_read_ir(width, 8), 4)(3, 5, source.ctypes.data, sink.ctypes.data)
        assert sink.view(np.int64)[: width // 8].sum() == words.sum()


@pytest.mark.parametrize("hint", ["", ", !nontemporal !0"])
def test_every_byte_of_the_copy_probe_is_copied(llvm, hint):
    for width in llvm._widths:
        (source,), (target,) = (_buffers(width * 4 * 5, 1) for _ in range(2))
        source[:] = np.random.default_rng(0).integers(0, 256, source.size)
        llvm._kernel(_copy_ir(width, 4, hint=hint), 4)(1, 5, source.ctypes.data, target.ctypes.data)
        assert np.array_equal(source, target)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(ceilings, "_SECONDS", 0.001)
    monkeypatch.setattr(ceilings, "_TRIES", 1)
    monkeypatch.setattr(ceilings, "caches", lambda: {"L1": 2**15, "L2": 2**18, "L3": 2**20})


def test_ceilings_are_complete_and_plausible(hasty):
    found = ceilings.measure(1)
    assert "LLVM IR" in found["probe"]
    assert found["flops"]["float32"] > found["flops"]["float64"] > 1e8
    assert [level["level"] for level in found["levels"]] == ["L1", "L2", "L3", "memory"]
    assert [level["capacity"] for level in found["levels"]] == [2**15, 2**18, 2**20 + 2**18, None]
    assert all(level["read"] > 1e8 and level["copy"] > 1e8 for level in found["levels"])


def test_without_llvmlite_an_estimate_is_named_as_such(hasty, monkeypatch):
    def absent(held_to):
        raise ImportError("No module named 'llvmlite'")

    monkeypatch.setattr(ceilings, "_LLVM", absent)
    found = ceilings.measure(1)
    assert found["probe"].startswith("estimate by NumPy (llvmlite: ImportError: No module named 'llvmlite')")
    assert found["flops"]["float32"] > 1e8
    assert {level["copy_by"] for level in found["levels"]} == {"np.copyto"}


def test_repeats_of_the_estimate_are_done():
    calls = []
    ceilings._repeated(calls.append)(3, 5)
    assert calls == [3] * 5
    assert _NumPy("x").name == "x"


def test_the_best_of_two_probes_counts():
    level = {"level": "L1", "capacity": 1, "footprint": 1, "read": 5.0, "copy": 7.0, "copy_by": "copy"}
    first = {"probe": "p", "threads": 1, "assumed": [], "flops": {"float32": 2.0, "float64": 1.0}, "levels": [level]}
    second = {**first, "flops": {"float32": 1.0, "float64": 3.0}, "levels": [{**level, "read": 4.0, "copy": 9.0, "copy_by": "in place"}]}
    best = merged([first, second])
    assert best["flops"] == {"float32": 2.0, "float64": 3.0}
    assert best["levels"] == [{**level, "copy": 9.0, "copy_by": "in place"}]
    assert first["levels"] == [level]


def test_the_rate_counts_the_work_of_all_threads(monkeypatch):
    import time

    monkeypatch.setattr(ceilings, "_SECONDS", 0.02)
    rate = ceilings._rate(lambda thread, repeats: time.sleep(0.001 * repeats), 1.0, 2)
    assert 2 * 700 < rate <= 2 * 1000  # two threads, one unit per sleep of a millisecond or a little more


def test_the_machine_is_described():
    found = machine.describe()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert machine.library_versions()["numpy"] == np.__version__
