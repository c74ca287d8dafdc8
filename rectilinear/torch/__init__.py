"""The layers in PyTorch: functions and modules with gradients, and `accelerate`, which speeds up a model that is there already.

Weights are PyTorch's, (out, in), and parameters are an ``nn.Linear``'s. It needs torch 2.6 or newer, which nothing else in rectilinear
imports: ``pip install 'rectilinear[torch]'``, or ``'.[torch]'`` in a checkout.

>>> import torch
>>> from rectilinear.torch import accelerate
>>> model = torch.nn.Sequential(torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
>>> handle = accelerate(model)
>>> model(torch.ones(64, 784)).shape
torch.Size([64, 10])
>>> handle.undo()
"""

from rectilinear.torch.acceleration import Handle, accelerate
from rectilinear.torch.functions import affine, affine_relu, relu
from rectilinear.torch.modules import Affine, AffineReLU

__all__ = ["Affine", "AffineReLU", "Handle", "accelerate", "affine", "affine_relu", "relu"]
