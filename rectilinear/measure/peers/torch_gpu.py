"""PyTorch on a GPU: the same passes as on the CPU, eager, at its leanest, compiled, and the leanest recorded as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch

from rectilinear.measure.cases import Case
from rectilinear.measure.gpu import WARM_UP, Waits
from rectilinear.measure.peers import torch_eager, torch_lean
from rectilinear.measure.subjects import Run

if torch.version.cuda is None:
    raise ImportError(f"this PyTorch ({torch.__version__}) is built without CUDA: it has no NVIDIA GPU to run on")
if not torch.cuda.is_available():
    raise ImportError(f"this PyTorch ({torch.__version__}) finds no GPU: see what nvidia-smi says, and CUDA_VISIBLE_DEVICES")

DEVICE = "cuda"


def eager(case: Case, data: dict[str, Any]) -> Run:
    return _timed(torch_eager.build(case, data, DEVICE))


def lean(case: Case, data: dict[str, Any]) -> Run:
    return _timed(torch_lean.build(case, data, DEVICE))


def compiled(case: Case, data: dict[str, Any]) -> Run:
    from rectilinear.measure.peers import torch_compile  # wants a compiler, which the others do not

    return _timed(torch_compile.build(case, data, DEVICE))


def graph(case: Case, data: dict[str, Any]) -> Run:
    """The leanest, recorded once and replayed: what a training loop with fixed arrays can have."""
    run = torch_lean.build(case, data, DEVICE)
    # As PyTorch's manual has it: libraries set themselves up on another stream before anything is recorded.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run.call()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        value = run.call()

    def replay() -> Any:
        recorded.replay()
        return value

    return _timed(Run(replay, run.results))


def _timed(run: Run) -> Run:
    name = torch.cuda.get_device_name()
    timer = Waits(name, lambda a: torch_eager.tensor(a, DEVICE), torch_eager.array, lambda made: torch.cuda.synchronize())
    return Run(run.call, run.results, timer)
