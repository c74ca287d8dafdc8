"""torch.compile on top of autograd: Inductor's fused kernels, which need a C++ compiler."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch.nn import functional

from rectilinear.measure.cases import Case
from rectilinear.measure.peers.torch_eager import Differentiated, affine_relu, autograd, net, net_loss
from rectilinear.measure.subjects import Run

if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
    raise ImportError("torch.compile needs a C++ compiler (c++, g++ or clang++); install one")


def build(case: Case, data: dict[str, Any], device: str = "cpu") -> Run:
    torch._dynamo.reset()  # each shape is compiled for itself, as a program that has one shape would
    functions = (affine_relu, functional.cross_entropy, net_loss, net)
    return autograd(case, data, Differentiated(*(torch.compile(f, dynamic=False) for f in functions)), device)
