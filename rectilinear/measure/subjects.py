"""The list of subjects: rectilinear's backends, and the peers they are compared with.

A subject is a function ``build(case, data) -> Run``, named by module and attribute, since it is imported only in its own process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rectilinear.measure.cases import HALF_ITEMSIZE, ITEMSIZE, PASSES, Case
from rectilinear.measure.gpu import Timer


class Run(NamedTuple):
    """A case ready to be run: `call` does the pass and waits for it; `results` makes NumPy arrays of what it returned.

    With `gpu`, the arrays are on one, `call` only launches the pass, and `gpu` times it.
    """

    call: Callable[[], Any]
    results: Callable[[Any], tuple[np.ndarray, ...]]
    gpu: Timer | None = None


@dataclass(frozen=True)
class Subject:
    """One contender, in a process of its own.

    `target` is ``"module:function"``; `backend` the rectilinear backend it runs on, None for a peer; `passes` and `dtypes` what
    it takes part in, and `note` why not in more.
    """

    name: str
    target: str
    backend: str | None = None
    passes: tuple[str, ...] = tuple(PASSES)
    dtypes: tuple[str, ...] = ("float32", "float64")
    about: str = ""
    note: str = ""
    environment: dict[str, str] = field(default_factory=dict, hash=False)

    def covers(self, case: Case) -> bool:
        return case.kind in self.passes and case.dtype in self.dtypes


BASELINE = "cs231n"
"""The peer that is always there, since it needs NumPy alone; `--compare` measures in units of it."""

_HERE = "rectilinear.measure"
_GPU = f"{_HERE}.peers.torch_gpu"
ON_GPU = (*ITEMSIZE, *HALF_ITEMSIZE)
"""The dtypes of a subject on a GPU."""

_NETS = ("infer", "train")

PEERS = (
    Subject(BASELINE, f"{_HERE}.peers.cs231n:build", about="CS231n's layers in plain NumPy"),
    Subject("torch", f"{_HERE}.peers.torch_eager:build", about="PyTorch eager with autograd"),
    Subject("torch-lean", f"{_HERE}.peers.torch_lean:build", about="PyTorch in inference mode, into preallocated arrays"),
    Subject(
        "torch-compile",
        f"{_HERE}.peers.torch_compile:build",
        about="torch.compile with autograd",
        passes=("step", "stacked", "softmax", "infer", "train"),
        dtypes=("float32",),
        note="compiles for seconds per case, so it takes part in float32 and the passes where fusing can show",
    ),
    Subject("torch-nn", f"{_HERE}.peers.torch_nn:eager", passes=_NETS, about="PyTorch eager, a Sequential of its own modules"),
    Subject(
        "torch-nn-compile",
        f"{_HERE}.peers.torch_nn:compiled",
        passes=_NETS,
        dtypes=("float32",),
        about="the same modules by torch.compile",
        note="compiles for seconds per case, so it takes part in float32 alone",
    ),
    Subject("jax", f"{_HERE}.peers.jax_jit:build", about="JAX jit", environment={"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}),
    Subject(
        "sklearn",
        f"{_HERE}.peers.sklearn_mlp:build",
        passes=_NETS,
        about="scikit-learn, MLPRegressor.predict and MLPClassifier.partial_fit",
    ),
    Subject("cs231n-cupy", f"{_HERE}.peers.cs231n_cupy:build", about="CS231n's layers, CuPy in NumPy's place, on the GPU", dtypes=ON_GPU),
    Subject("torch-cuda", f"{_GPU}:eager", dtypes=ON_GPU, about="PyTorch eager with autograd, on the GPU"),
    Subject("torch-lean-cuda", f"{_GPU}:lean", dtypes=ON_GPU, about="PyTorch in inference mode, into preallocated arrays, on the GPU"),
    Subject(
        "torch-graph-cuda",
        f"{_GPU}:graph",
        passes=tuple(name for name in PASSES if name != "train"),
        dtypes=ON_GPU,
        about="the same, recorded as a CUDA graph and replayed",
        note="its warm-up would train the net, so it takes no part there",
    ),
    Subject(
        "torch-compile-cuda",
        f"{_GPU}:compiled",
        passes=("step", "stacked", "softmax", "infer", "train"),
        dtypes=("float32", *HALF_ITEMSIZE),
        about="torch.compile with autograd, on the GPU",
        note="compiles for seconds per case, so it takes no part in float64, nor where nothing can be fused",
    ),
    Subject(
        "jax-cuda",
        f"{_HERE}.peers.jax_gpu:build",
        dtypes=ON_GPU,
        about="JAX jit, on the GPU",
        # Its products of float32 are TF32 unless told otherwise, and it would take most of the GPU's memory for itself.
        environment={
            "JAX_ENABLE_X64": "1",
            "JAX_PLATFORMS": "cuda",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        },
    ),
    Subject("thinc", f"{_HERE}.peers.thinc_net:build", about="thinc, Relu and Softmax layers", passes=("train",), dtypes=("float32",)),
)

IN_FRAMEWORKS = (
    Subject(
        "torch-accelerated",
        f"{_HERE}.peers.torch_nn:accelerated",
        backend="auto",
        passes=_NETS,
        about="the same modules after rectilinear.torch.accelerate",
    ),
    Subject(
        "sklearn-accelerated",
        f"{_HERE}.peers.sklearn_mlp:accelerated",
        backend="auto",
        passes=_NETS,
        about="the same estimators of rectilinear.sklearn",
    ),
)
"""rectilinear as users of other frameworks meet it; with the peers, since these have to be installed."""

CAPTURED = Subject(
    "cupy-captured",
    f"{_HERE}.ours:build_captured",
    backend="cupy",
    passes=("step", "stacked"),
    dtypes=ON_GPU,
    about="rectilinear's cupy backend, recorded by rectilinear.capture and replayed",
    note="whole steps are what one records",
    environment={"RECTILINEAR_BACKEND": "cupy"},
)


def backend_subjects() -> tuple[list[Subject], dict[str, str]]:
    """Two subjects for each usable backend, as called by default and with ``out=``; and the reasons why others are not usable."""
    import rectilinear
    from rectilinear.backends.registry import NEVER_CHOSEN

    subjects, missing = [], {}
    for info in rectilinear.list_backends():
        if info.name in NEVER_CHOSEN:
            continue
        if not info.usable:
            missing[info.name] = info.reason or "not usable"
            continue
        for suffix, function, about in (("", "build", ""), ("-out", "build_out", ", into preallocated arrays (out=)")):
            subjects.append(
                Subject(
                    info.name + suffix,
                    f"{_HERE}.ours:{function}",
                    backend=info.name,
                    about=f"rectilinear's {info.name} backend{about}",
                    environment={"RECTILINEAR_BACKEND": info.name},
                    dtypes=ON_GPU if info.name == "cupy" else tuple(ITEMSIZE),
                )
            )
    if any(subject.backend == "cupy" for subject in subjects):
        subjects.append(CAPTURED)
    return subjects, missing
