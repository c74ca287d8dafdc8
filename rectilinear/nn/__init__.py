"""The layers of `rectilinear.layers` as objects that keep their parameters, and what trains them.

No arithmetic of the layers lives here: every `forward` and `backward` is one call of the function of that name, and its cache is kept
in between. `params` and `grads` are plain dictionaries of arrays, so that code which knows NumPy needs nothing else.

Parameters lie on the backend chosen when the layer is made, or in the array library given as ``xp=``. Inputs are brought there: to that
library and device, and to the layer's dtype. Any other array may be put into `params`: of any layout, dtype and byte order, and one array
into two layers, which then stay tied.

>>> import numpy as np
>>> from rectilinear.nn import SGD, Affine, AffineReLU, Sequential, SoftmaxCrossEntropy
>>> rng = np.random.default_rng(0)
>>> x, y = rng.standard_normal((5, 4)), [0, 1, 2, 1, 0]
>>> net, loss = Sequential([AffineReLU(4, 8, rng=rng), Affine(8, 3, rng=rng)]), SoftmaxCrossEntropy()
>>> optimizer = SGD(net, lr=0.1, momentum=0.9)
>>> for _ in range(100):
...     _ = loss.forward(net.forward(x), y)
...     net.backward(loss.backward())
...     optimizer.step()
>>> net.forward(x, training=False).argmax(axis=1).tolist()
[0, 1, 2, 1, 0]
"""

from rectilinear.nn.affine import Affine, AffineReLU
from rectilinear.nn.files import load, save
from rectilinear.nn.module import Layer, Module
from rectilinear.nn.relu import ReLU
from rectilinear.nn.sequential import Sequential
from rectilinear.nn.sgd import SGD
from rectilinear.nn.softmax import SoftmaxCrossEntropy

__all__ = [
    "SGD",
    "Affine",
    "AffineReLU",
    "Layer",
    "Module",
    "ReLU",
    "Sequential",
    "SoftmaxCrossEntropy",
    "load",
    "save",
]
