"""Backends with one fault each, planted in a copy of the reference, and the promise that each breaks; run by test_conform.py."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from rectilinear import KeepMask
from rectilinear.backends.contract import Probe
from rectilinear.backends.generic import GenericBackend


class Reference(GenericBackend):
    """The generic backend, for NumPy arrays. It keeps every promise."""

    name = "reference"
    library = "numpy"

    def probe(self) -> Probe:
        return Probe(True, version="1", device="cpu", threads=1)

    def asarray(self, x: Any, dtype: Any = None) -> Any:
        return np.asarray(x, dtype=dtype)

    def to_numpy(self, x: Any) -> Any:
        return x

    # Where several faults come in.

    def product(self, a: Any, b: Any) -> Any:
        return np.matmul(a, b)

    def affine_forward(self, x: Any, w: Any, b: Any, out: Any) -> Any:
        with np.errstate(under="ignore"):
            z = self.product(x, w)
        return self.deliver(out, z if b is None else z + b[..., None, :])

    def deliver(self, out: Any, result: Any) -> Any:
        if out is None:
            return result
        out[...] = result
        return out


class BiasAxis(Reference):
    def bias_backward(self, dout: Any, out: Any) -> Any:
        return self.deliver(out, np.resize(dout.sum(axis=-1), (*dout.shape[:-2], dout.shape[-1])))


class Tail(Reference):
    """Whole blocks of 16 rows alone are computed."""

    def product(self, a: Any, b: Any) -> Any:
        z = np.matmul(a, b)
        whole = z.shape[-2] // 16 * 16
        if whole:
            z[..., whole:, :] = 0
        return z


class OneGroup(Reference):
    def product(self, a: Any, b: Any) -> Any:
        return np.matmul(a, b[:1] if b.ndim == 3 else b)


class GroupsOfBias(Reference):
    def bias_backward(self, dout: Any, out: Any) -> Any:
        return self.deliver(
            out,
            np.broadcast_to(
                super().bias_backward(dout, None).sum(axis=0) if dout.ndim == 3 else super().bias_backward(dout, None),
                (*dout.shape[:-2], dout.shape[-1]),
            ),
        )


class Unstable(Reference):
    """exp of the scores themselves."""

    def softmax_loss(self, x: Any, y: Any, out: Any) -> Any:
        if len(x) == 0:
            return super().softmax_loss(x, y, out)
        with np.errstate(all="ignore"):
            p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
            loss = -np.log(p[np.arange(len(x)), y]).mean(dtype=x.dtype)
        return loss, self.deliver(out, (p - np.eye(x.shape[1], dtype=x.dtype)[y]) / x.dtype.type(len(x)))


class SumOfScores(Reference):
    """The loss is a sum over samples, not their mean."""

    def softmax_loss(self, x: Any, y: Any, out: Any) -> Any:
        loss, dx = super().softmax_loss(x, y, out)
        return loss * x.dtype.type(len(x)), dx


class PlainSum(Reference):
    """One float32 accumulator for all rows."""

    def bias_backward(self, dout: Any, out: Any) -> Any:
        return self.deliver(out, np.add.reduce(dout, axis=-2))


class Chain(Reference):
    """One float32 accumulator for a product, too."""

    def product(self, a: Any, b: Any) -> Any:
        if a.ndim != 2 or a.shape[1] < 10_000:
            return np.matmul(a, b)
        z = np.zeros((a.shape[0], b.shape[1]), a.dtype)
        for k in range(0, a.shape[1], 4):
            z += a[:, k : k + 4] @ b[k : k + 4]
        return z


class Greater(Reference):
    """Another gradient at 0."""

    def relu_backward(self, dout: Any, keep: Any, out: Any) -> Any:
        return self.deliver(out, np.where(keep > 0, dout, dout.dtype.type(0)))


class Product(Reference):
    """0 times NaN is NaN."""

    def relu_backward(self, dout: Any, keep: Any, out: Any) -> Any:
        with np.errstate(invalid="ignore"):
            return self.deliver(out, dout * ~np.asarray(keep < 0))


class DropsNaN(Reference):
    def relu_forward(self, x: Any, out: Any) -> Any:
        return self.deliver(out, np.where(x >= 0, x, x.dtype.type(0)))


class Underflow(Reference):
    """NumPy's own word on it."""

    def affine_forward(self, x: Any, w: Any, b: Any, out: Any) -> Any:
        z = self.product(x, w)
        return self.deliver(out, z if b is None else z + b[..., None, :])


class Empty(Reference):
    """The sum begins with the first row."""

    def bias_backward(self, dout: Any, out: Any) -> Any:
        return self.deliver(out, dout[..., 0, :] + super().bias_backward(dout[..., 1:, :], None))


class EmptySum(Reference):
    """An array that nothing is written into, for lack of rows."""

    def bias_backward(self, dout: Any, out: Any) -> Any:
        db = super().bias_backward(dout, None)
        return self.deliver(out, db if dout.shape[-2] else np.full_like(db, np.nan))


class AsItLies(Reference):
    """Elements in the order of memory, whatever the strides say."""

    def relu_forward(self, x: Any, out: Any) -> Any:
        return self.deliver(out, super().relu_forward(x.ravel(order="K").reshape(x.shape), None))


class Wider(Reference):
    def relu_forward(self, x: Any, out: Any) -> Any:
        return self.deliver(out, super().relu_forward(x, None).astype(np.float64))


class HalfInHalf(Reference):
    """Takes 16-bit floats, and sums in them."""

    half = True

    def product(self, a: Any, b: Any) -> Any:
        z = np.zeros((*a.shape[:-1], b.shape[-1]), a.dtype)
        for k in range(a.shape[-1]):
            z += a[..., k : k + 1] * b[..., k : k + 1, :]
        return z


class BitsReversed(Reference):
    def relu_backward(self, dout: Any, keep: Any, out: Any) -> Any:
        if isinstance(keep, KeepMask):
            kept = np.unpackbits(keep.bits, axis=-1, count=keep.shape[-1], bitorder="big").view(bool)
            return self.deliver(out, np.where(kept, dout, dout.dtype.type(0)))
        return super().relu_backward(dout, keep, out)


class MaskTooShort(Reference):
    """The bits of the last row are never written."""

    def affine_relu_forward(self, x: Any, w: Any, b: Any, out: Any) -> Any:
        result, z = super().affine_relu_forward(x, w, b, out)
        bits = np.packbits(~(z < 0), axis=-1, bitorder="little")
        bits[..., -1:, :] = 0
        return result, KeepMask(bits, z.shape)


class WritesInput(Reference):
    """ReLU's gradient in place, in the caller's dout."""

    def affine_backward(self, dout: Any, x: Any, w: Any, keep: Any, wanted: Any, out: Any) -> Any:
        if keep is not None and dout.flags.writeable:
            dout[np.asarray(keep < 0)] = 0
        return super().affine_backward(dout, x, w, keep, wanted, out)


class KeepsArguments(Reference):
    last: Any = None

    def relu_forward(self, x: Any, out: Any) -> Any:
        self.last = x
        return super().relu_forward(x, out)


class ReturnsArgument(Reference):
    """Nothing to do where nothing is negative."""

    def relu_forward(self, x: Any, out: Any) -> Any:
        return x if out is None and (x >= 0).all() else super().relu_forward(x, out)


class OneBuffer(Reference):
    """The buffer of the last result of this shape serves again."""

    def __init__(self) -> None:
        self.buffers: dict[Any, Any] = {}

    def deliver(self, out: Any, result: Any) -> Any:
        return super().deliver(self.buffers.setdefault((result.shape, result.dtype), result) if out is None else out, result)


class OutIgnored(Reference):
    def affine_forward(self, x: Any, w: Any, b: Any, out: Any) -> Any:
        return super().affine_forward(x, w, b, None)


class OutNotFilled(Reference):
    def relu_backward(self, dout: Any, keep: Any, out: Any) -> Any:
        result = super().relu_backward(dout, keep, None)
        return result if out is None else out


class OutPartlyFilled(Reference):
    """Zeros are not written, since a fresh array has them."""

    def affine_backward(self, dout: Any, x: Any, w: Any, keep: Any, wanted: Any, out: Any) -> Any:
        grads = super().affine_backward(dout, x, w, keep, wanted, (None, None, None))
        for grad, buffer in zip(grads, out, strict=True):
            if buffer is not None:
                np.copyto(buffer, grad, where=grad != 0)
        return tuple(grad if buffer is None else buffer for grad, buffer in zip(grads, out, strict=True))


class NeedsIgnored(Reference):
    def affine_backward(self, dout: Any, x: Any, w: Any, keep: Any, wanted: Any, out: Any) -> Any:
        return super().affine_backward(dout, x, w, keep, (True, True, True), out)


class Swallows(Reference):
    """An empty result instead of the error."""

    def affine_forward(self, x: Any, w: Any, b: Any, out: Any) -> Any:
        try:
            return super().affine_forward(x, w, b, out)
        except Exception:
            return np.zeros((1, 1))


class DtypeOfAsarray(Reference):
    def asarray(self, x: Any, dtype: Any = None) -> Any:
        return np.asarray(x)


class AnyOrder(Reference):
    """The order of sums is another one each time."""

    def product(self, a: Any, b: Any) -> Any:
        order = np.random.default_rng().permutation(a.shape[-1])
        return np.matmul(a[..., order], b[..., order, :])


class SharedScratch(Reference):
    """One scratch for all threads."""

    scratch: ClassVar[Any] = None

    def product(self, a: Any, b: Any) -> Any:
        type(self).scratch = np.matmul(a, b)
        time.sleep(1e-4)
        return type(self).scratch.copy()


class Leaks(Reference):
    kept: ClassVar[list[Any]] = []

    def affine_forward(self, x: Any, w: Any, b: Any, out: Any) -> Any:
        result = super().affine_forward(x, w, b, out)
        self.kept.append(np.tile(result, 8))  # more than a busy process has free without asking the system
        return result


@dataclass(frozen=True)
class Fault:
    """What is wrong, in words, with the backend, and the promise that it breaks."""

    words: str
    backend: type[Reference]
    breaks: str
    slow: bool = False


FAULTS = (
    Fault("db sums along the wrong axis", BiasAxis, "values"),
    Fault("the rows after the last whole block are dropped", Tail, "values"),
    Fault("all groups use the first one's weights", OneGroup, "stacked"),
    Fault("db of all groups is added up", GroupsOfBias, "stacked"),
    Fault("softmax takes exp of the scores themselves", Unstable, "softmax"),
    Fault("the loss is a sum, not a mean", SumOfScores, "softmax"),
    Fault("db has one float32 accumulator for a million rows", PlainSum, "accuracy", slow=True),
    Fault("a product has one float32 accumulator", Chain, "accuracy", slow=True),
    Fault("`>` for `>=`: no gradient at 0", Greater, "edges"),
    Fault("a product for a selection: 0 times NaN", Product, "edges"),
    Fault("`x >= 0` in forward: NaN is dropped", DropsNaN, "edges"),
    Fault("a product that underflows raises where np.errstate says so", Underflow, "errstate"),
    Fault("N = 0: the sum begins with the first row", Empty, "sizes"),
    Fault("N = 0: db is never written", EmptySum, "sizes"),
    Fault("elements are read in the order of memory", AsItLies, "strides"),
    Fault("float32 in, float64 out", Wider, "dtypes"),
    Fault("16-bit floats are summed in 16 bits", HalfInHalf, "dtypes"),
    Fault("a KeepMask's bits are read from the other end", BitsReversed, "masks"),
    Fault("a KeepMask lacks its last row", MaskTooShort, "masks"),
    Fault("dout is written to", WritesInput, "inputs"),
    Fault("an argument is kept", KeepsArguments, "inputs"),
    Fault("relu returns its argument where all of it is kept", ReturnsArgument, "results"),
    Fault("results of one shape share a buffer", OneBuffer, "results"),
    Fault("`out` is ignored", OutIgnored, "out"),
    Fault("`out` is returned, but not filled", OutNotFilled, "out"),
    Fault("zeros are not written into `out`", OutPartlyFilled, "out"),
    Fault("`needs` is ignored", NeedsIgnored, "needs"),
    Fault("an error is swallowed, and something else returned", Swallows, "errors"),
    Fault("asarray forgets the dtype", DtypeOfAsarray, "arrays"),
    Fault("the order of sums is another one on each run", AnyOrder, "bits"),
    Fault("threads share a scratch", SharedScratch, "threads"),
    Fault("copies of each result stay", Leaks, "memory", slow=True),
)
