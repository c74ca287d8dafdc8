"""A complete backend for another array library, array-api-strict. What each method is given and owes: `rectilinear.backends.contract`."""

import array_api_strict as xp
import numpy as np

from rectilinear import KeepMask
from rectilinear.backends.contract import Probe

HOST = xp.Device("CPU_DEVICE")
quiet = np.errstate(under="ignore")  # strict computes by NumPy, which may have been told to raise


class StrictBackend:
    api_version = 1
    name = "strict"
    library = "array_api_strict"
    half = False  # given float32 in the place of 16-bit floats

    def probe(self):
        return Probe(True, version=xp.__version__, device="cpu", threads=1)

    @quiet
    def affine_forward(self, x, w, b, out):
        z = x @ w
        return into(out, z if b is None else z + b[..., None, :])

    def affine_relu_forward(self, x, w, b, out):
        z = self.affine_forward(x, w, b, None)
        return self.relu_forward(z, out), z

    @quiet
    def affine_backward(self, dout, x, w, keep, wanted, out):
        dz = dout if keep is None else self.relu_backward(dout, keep, None)
        dx = into(out[0], dz @ w.mT) if wanted[0] else None
        dw = into(out[1], x.mT @ dz) if wanted[1] else None
        return dx, dw, self.bias_backward(dz, out[2]) if wanted[2] else None

    @quiet
    def bias_backward(self, dout, out):
        return into(out, xp.astype(xp.sum(dout, axis=-2, dtype=xp.float64), dout.dtype))  # a long float32 sum would drift

    def relu_forward(self, x, out):
        return into(out, xp.where(x < 0, 0, x))

    def relu_backward(self, dout, keep, out):
        return into(out, xp.where(keep.to_bool(), dout, 0) if isinstance(keep, KeepMask) else xp.where(keep < 0, 0, dout))

    @np.errstate(all="ignore")  # far scores give exp(-inf), a right 0
    def softmax_loss(self, x, y, out):
        n, classes = x.shape
        onehot = xp.astype(y, xp.int64)[:, None] == xp.arange(classes, device=x.device)[None, :]
        if n == 0:
            return xp.asarray(float("nan"), dtype=x.dtype, device=x.device), into(out, x + 0)
        shifted = x - xp.max(x, axis=1, keepdims=True)
        total = xp.sum(xp.exp(shifted), axis=1, keepdims=True)
        labelled = xp.any(onehot, axis=1, keepdims=True)  # false for a label that is no class
        picked = xp.sum(xp.where(onehot, xp.log(total) - shifted, 0), axis=1, keepdims=True)
        loss = xp.sum(xp.where(labelled, picked, float("nan")) / n)
        return loss, into(out, xp.where(labelled, (xp.exp(shifted) / total - xp.astype(onehot, x.dtype)) / n, float("nan")))

    def asarray(self, x, dtype=None):
        if isinstance(x, KeepMask):
            return KeepMask(self.asarray(x.bits), x.shape)
        return xp.asarray(x, dtype=None if dtype is None else getattr(xp, getattr(dtype, "name", str(dtype)).rpartition(".")[2]))

    def to_numpy(self, x):
        if isinstance(x, KeepMask):
            return KeepMask(self.to_numpy(x.bits), x.shape)
        return np.asarray(x.to_device(HOST))

    def synchronize(self):
        pass


def into(out, result):
    if out is None:
        return result
    out[...] = result
    return out
