"""What is measured on a GPU, as far as a CPU can show it: 16-bit cases and their check, the clock, and the peers' code run on the CPU."""

import contextlib
import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import rectilinear
from rectilinear.measure import gpu, ours
from rectilinear.measure.cases import HALF_ITEMSIZE, Case
from rectilinear.measure.gpu import COPIES, LAUNCHED, Waits
from rectilinear.measure.reference import check, expected, inputs, numpy_dtype
from rectilinear.measure.subjects import ON_GPU, PEERS, backend_subjects
from rectilinear.measure.turns import started

STEP = (16, 128, 128)
HALVES = tuple(HALF_ITEMSIZE)
PEERS_PACKAGE = "rectilinear.measure.peers"

# ---------------------------------------------------------------- cases of 16 bits


def rounded_before_the_bias(data, dtype):
    """A step as a library does it that rounds each product and each sum; all sums in float32."""
    x, w, b, dout = (data[k].astype("f4") for k in ("x", "w", "b", "dout"))
    z = ((x @ w).astype(dtype) + b.astype(dtype)).astype(dtype)
    dz = np.where(z >= 0, dout, 0)
    return tuple(a.astype(dtype) for a in (np.maximum(z, 0), dz @ w.T, x.T @ dz, dz.sum(0)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [STEP, (1, 64, 64), (100, 3072, 100), (5, 4096, 7)])
def test_rounding_before_the_bias_changes_no_keep_set_in_16_bits(shape, dtype):
    case = Case("step", shape, dtype)
    data = inputs(case)
    assert {str(a.dtype) for a in data.values()} == {dtype}
    got = rounded_before_the_bias(data, numpy_dtype(dtype))
    assert check(case, data, got) is None
    x, w, b = (data[k].astype("f8") for k in ("x", "w", "b"))
    np.testing.assert_array_equal(got[0] > 0, x @ w + b > 0)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_sums_in_16_bits_is_refused(dtype):
    """As many roundings as terms: a chain of additions, each rounded."""
    case = Case("db", (1000, 10), dtype)
    data = inputs(case)
    total = np.zeros(10, numpy_dtype(dtype))
    for row in data["dout"]:
        total = (total + row).astype(total.dtype)
    assert "off by" in check(case, data, (total,))
    assert check(case, data, (data["dout"].astype("f4").sum(0).astype(total.dtype),)) is None


@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_that_is_missing_from_a_sum_is_refused_in_16_bits(dtype):
    case = Case("step", STEP, dtype)
    data = inputs(case)
    y, dx, dw, db = rounded_before_the_bias(data, numpy_dtype(dtype))
    short = dict(data, dout=np.where(np.arange(16)[:, None] == 3, 0, data["dout"]).astype(data["dout"].dtype))
    for i, wrong in enumerate(rounded_before_the_bias(short, numpy_dtype(dtype))[1:], 1):
        given = [y, dx, dw, db]
        given[i] = wrong
        assert f"result {i}" in check(case, data, tuple(given))


def test_the_two_16_bit_types_have_exact_results_of_their_own():
    """dout is drawn alike and rounded by each: what is kept of one must not be taken for the other's."""
    found = {dtype: expected(Case("step", STEP, dtype), inputs(Case("step", STEP, dtype)))[0][3] for dtype in HALVES}
    assert not np.array_equal(*found.values())
    assert Case("step", STEP, "bfloat16").bytes_read * 2 == Case("step", STEP, "float32").bytes_read


# ---------------------------------------------------------------- the clock of a library without events


@pytest.fixture
def clock(monkeypatch):
    """A host that queues work (1 s a call) and a device that does it later (5 s a call); what they were told, in order."""
    now = SimpleNamespace(host=0.0, device=0.0, journal=[])
    monkeypatch.setattr(gpu, "perf_counter", lambda: now.host)

    def call():
        now.journal.append("call")
        now.host += 1
        now.device = max(now.device, now.host) + 5
        return now.device

    def until(made):
        now.journal.append("wait" if made is None else f"wait for {made:.0f}")
        now.host = max(now.host, now.device)

    now.call, now.timer = call, Waits("a GPU", lambda a: call(), lambda a: call(), until)
    return now


def test_a_batch_waits_once_at_its_end_for_its_last_result(clock):
    clock.device = 100.0  # still busy with something else, which does not count
    assert clock.timer.elapsed(clock.call, 4) == 1 + 4 * 5
    assert clock.journal == ["wait", *["call"] * 4, "wait for 121"]


def test_the_hosts_share_has_no_waiting_in_it(clock):
    clock.device = 100.0
    assert clock.timer.launch(clock.call) == 1
    assert clock.journal == ["wait", *["call"] * LAUNCHED, "wait for 151"]


def test_copies_are_waited_for(clock):
    arrays = [np.zeros(10, "f4")]
    timer = Waits(
        "a GPU", lambda a: clock.call(), lambda a: clock.call(), lambda made: setattr(clock, "host", max(clock.host, clock.device))
    )
    assert timer.copies(arrays, arrays)["to_device"] == {"bytes": 40, "seconds": [6.0] * COPIES}


# ---------------------------------------------------------------- ours, recorded


def test_a_recorded_step_has_all_its_arrays_as_arguments(monkeypatch):
    """What `capture` is given: a recording that copied its arguments in would work with any others."""
    given = []

    def capture(function):
        return lambda *arrays: (given.append(arrays), function(*(a.copy() for a in arrays)))[1]

    monkeypatch.setattr(rectilinear, "capture", capture, raising=False)
    case = Case("step", STEP, "float32")
    run = ours.build_captured(case, inputs(case))
    assert len(given) == 2  # run once, and recorded
    assert check(case, inputs(case), run.results(run.call())) is None
    assert all(a is b for a, b in zip(given[0], given[2], strict=True))


def test_it_takes_part_where_cupy_does(monkeypatch):
    for usable in (True, False):
        info = SimpleNamespace(name="cupy", usable=usable, reason="no GPU")
        monkeypatch.setattr(rectilinear, "list_backends", lambda info=info: [info])
        found, missing = backend_subjects()
        assert ("cupy-captured" in [subject.name for subject in found]) is usable
        assert ("cupy" in missing) is not usable


# ---------------------------------------------------------------- the peers


KINDS = {
    "affine": STEP,
    "forward": STEP,
    "backward": STEP,
    "step": STEP,
    "step_fortran": STEP,
    "stacked": (4, 8, 16, 24),
    "relu_forward": (10, 100),
    "relu_backward": (10, 100),
    "db": (100, 100),
    "softmax": (128, 10),
    "infer": (32,),
    "train": (32,),
}


def cases(peer):
    for dtype in peer.dtypes:
        for kind, shape in KINDS.items():
            case = Case(kind, shape, dtype)
            # In 16 bits only what tools/gpu_check.py asks for: whole steps.
            if peer.covers(case) and (dtype not in HALVES or kind == "step"):
                yield case


def right(build, case):
    run = build(case, inputs(case))
    for _ in range(2):
        value = run.call()
        if case.kind != "train":  # which changes its parameters
            assert check(case, inputs(case), run.results(value)) is None, case.name
    fresh = build(case, inputs(case))
    assert check(case, inputs(case), fresh.results(fresh.call())) is None, case.name
    assert run.gpu.elapsed(run.call, 2) > 0
    assert run.gpu.launch(run.call) > 0
    assert run.gpu.copies(inputs(case).values(), fresh.call())["to_device"]["bytes"] > 0


@pytest.fixture
def torch_gpu(monkeypatch):
    """The module as on a machine with a GPU, which is the CPU; a CUDA graph is there what was called while it was recorded."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.delitem(sys.modules, f"{PEERS_PACKAGE}.torch_gpu", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        module = importlib.import_module(f"{PEERS_PACKAGE}.torch_gpu")
    monkeypatch.setattr(module, "DEVICE", "cpu")

    class Graph(TorchDispatchMode):
        """Keeps the operations that are called within, and repeats them into the same memory."""

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            self.__dict__.setdefault("recorded", []).append((operation, args, kwargs or {}, result))
            return result

        def replay(self):
            with torch.inference_mode():
                for operation, args, kwargs, result in self.recorded:
                    again = operation(*args, **kwargs)
                    if again.data_ptr() != result.data_ptr():
                        result.copy_(again)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "synchronize": lambda: None,
        "CUDAGraph": Graph,
        "graph": lambda graph: graph,
        "get_device_name": lambda: "a GPU",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield module
    sys.modules.pop(f"{PEERS_PACKAGE}.torch_gpu", None)


def peer(name):
    return next(subject for subject in PEERS if subject.name == name)


@pytest.mark.libraries
@pytest.mark.parametrize(("name", "function"), [("torch-cuda", "eager"), ("torch-lean-cuda", "lean"), ("torch-graph-cuda", "graph")])
def test_the_code_of_pytorchs_gpu_peers_is_right(torch_gpu, name, function):
    assert peer(name).target == f"{PEERS_PACKAGE}.torch_gpu:{function}"
    for case in cases(peer(name)):
        right(getattr(torch_gpu, function), case)


@pytest.mark.libraries
def test_a_replay_computes_anew_into_the_same_arrays(torch_gpu):
    case = Case("step", STEP, "float32")
    run = torch_gpu.graph(case, inputs(case))
    first = run.call()
    with torch_gpu.torch.inference_mode():
        for result in first:
            result.fill_(np.nan)
    second = run.call()
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert check(case, inputs(case), run.results(second)) is None


@pytest.mark.libraries
@pytest.mark.nightly  # Inductor compiles
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's own, when Inductor is imported
def test_the_code_of_the_compiled_peer_is_right(torch_gpu):
    right(torch_gpu.compiled, Case("step", STEP, "bfloat16"))


@pytest.mark.libraries
def test_the_code_of_jaxs_gpu_peer_is_right(monkeypatch):
    import jax

    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu", device_kind="a GPU")])
    monkeypatch.delitem(sys.modules, f"{PEERS_PACKAGE}.jax_gpu", raising=False)
    module = importlib.import_module(f"{PEERS_PACKAGE}.jax_gpu")
    with jax.enable_x64(True):
        for case in cases(peer("jax-cuda")):
            right(module.build, case)
    sys.modules.pop(f"{PEERS_PACKAGE}.jax_gpu", None)


@pytest.mark.libraries
@pytest.mark.nightly  # five processes that load large libraries
def test_builds_without_a_gpu_say_so():
    names = [subject.name for subject in PEERS if subject.name.endswith("-cuda")]
    assert len(names) == 5
    with started([peer(name) for name in names], 1) as (children, _, missing):
        assert not children
        assert set(missing) == set(names)
        for name, reason in missing.items():
            assert f"this {'JAX' if name.startswith('jax') else 'PyTorch'} (" in reason
            assert "GPU" in reason
    assert "is built without CUDA" in missing["torch-cuda"]


@pytest.mark.libraries
def test_jax_computes_no_tf32_there():
    """The name of the variable is JAX's: a misspelt one would go unnoticed."""
    code = "import jax; print(jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64)"
    variables = {**peer("jax-cuda").environment, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["highest", "True"]


def test_subjects_on_a_gpu_take_16_bits():
    there = {subject.name: subject for subject in PEERS if subject.name.endswith(("-cuda", "-cupy"))}
    assert len(there) == 6
    assert all(set(HALVES) <= set(subject.dtypes) <= set(ON_GPU) for subject in there.values())
    assert not any(set(HALVES) & set(subject.dtypes) for subject in PEERS if subject.name not in there)
