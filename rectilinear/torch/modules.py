"""The layers as modules of PyTorch: `Affine` and `AffineReLU`, with the parameters of an ``nn.Linear``."""

from __future__ import annotations

from torch import nn

from rectilinear.torch.functions import affine, affine_relu
from rectilinear.torch.primitives import Tensor


class Affine(nn.Linear):  # type: ignore[misc]  # torch is Any to mypy
    """`affine` as a module: an ``nn.Linear`` on rectilinear's kernels.

    Parameters
    ----------
    in_features, out_features, bias, device, dtype
        As for ``nn.Linear``, whose parameters, initial values and ``state_dict`` it has: weight (out, in), bias (out,).

    Examples
    --------
    >>> import torch
    >>> layer = Affine(3, 2)
    >>> _ = layer.load_state_dict(torch.nn.Linear(3, 2).state_dict())
    >>> layer(torch.ones(4, 3)).shape
    torch.Size([4, 2])
    """

    def forward(self, input: Tensor) -> Tensor:
        return affine(input, self.weight, self.bias)


class AffineReLU(nn.Linear):  # type: ignore[misc]
    """`affine_relu` as a module: an ``nn.Linear`` and the ReLU after it, whose gradient at 0 is 1.

    Parameters
    ----------
    in_features, out_features, bias, device, dtype
        As for ``nn.Linear``, whose parameters, initial values and ``state_dict`` it has.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(AffineReLU(3, 8), Affine(8, 2))
    >>> sorted(net.state_dict())
    ['0.bias', '0.weight', '1.bias', '1.weight']
    """

    def forward(self, input: Tensor) -> Tensor:
        return affine_relu(input, self.weight, self.bias)
