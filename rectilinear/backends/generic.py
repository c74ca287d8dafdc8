"""The generic backend: the layers in the words of the Python array API standard, on any library that keeps it.

It is the readable reference that every other backend is tested against: one expression per formula, forward beside backward, and
nothing for speed but what the libraries do themselves. The mathematics is derived in ``docs/mathematics.md``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_jax_array, is_torch_array

from rectilinear.backends.contract import API_VERSION, Array, Keep, Probe, Wanted
from rectilinear.keepmask import KeepMask

# Rows summed one after the other before partial sums are combined. A plain float32 column sum of 10**6 values of one sign loses
# 1e-2; blocks of 128 keep every level's relative error under 128 units in the last place, 8e-6.
SUM_BLOCK = 128

# Terms of a product that are left to the library to add up, where it may do so in one chain.
LONG_SUM = 4096


def may_underflow(primitive: Callable[..., Any]) -> Callable[..., Any]:
    """A primitive whose result may underflow, which is no error, whatever the caller's NumPy errstate makes of it.

    Overflow and NaN come from the caller's numbers and follow the caller's errstate. Setting an errstate costs 0.4 us at every call, so
    it is set only when there was an error; primitives write nothing that they read.
    """

    @functools.wraps(primitive)
    def quiet(*operands: Any) -> Any:
        try:
            return primitive(*operands)
        except (FloatingPointError, RuntimeWarning):
            with np.errstate(under="ignore"):
                return primitive(*operands)

    return quiet


class GenericBackend:
    """See `rectilinear.backends.contract.Backend` for what each primitive is given and gives."""

    api_version = API_VERSION
    name = "generic"
    library = "array API"
    half = False

    def probe(self) -> Probe:
        from importlib.metadata import version

        return Probe(True, version=version("array-api-compat"), device="the arrays'")

    def namespace(self, x: Array) -> Any:
        return array_namespace(x)

    # affine

    @may_underflow
    def affine_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> Array:
        xp = self.namespace(x)
        z = product(xp, x, w)
        return _into(out, z if b is None else z + b[..., None, :])

    @may_underflow
    def affine_backward(
        self,
        dout: Array,
        x: Array,
        w: Array,
        keep: Keep | None,
        wanted: Wanted,
        out: tuple[Array | None, Array | None, Array | None],
    ) -> tuple[Array | None, Array | None, Array | None]:
        xp = self.namespace(dout)
        dz = dout if keep is None else self.relu_backward(dout, keep, None)
        dx = _into(out[0], product(xp, dz, xp.matrix_transpose(w))) if wanted[0] else None
        dw = _into(out[1], product(xp, xp.matrix_transpose(x), dz)) if wanted[1] else None
        db = self.bias_backward(dz, out[2]) if wanted[2] else None
        return dx, dw, db

    @may_underflow
    def bias_backward(self, dout: Array, out: Array | None) -> Array:
        return _into(out, sum_rows(self.namespace(dout), dout))

    # ReLU

    def relu_forward(self, x: Array, out: Array | None) -> Array:
        # Not maximum(x, 0), which may turn -0.0 into 0.0, and not a product, which turns -inf into NaN.
        return _into(out, self.namespace(x).where(x < 0, 0, x))

    def relu_backward(self, dout: Array, keep: Keep, out: Array | None) -> Array:
        xp = self.namespace(dout)
        if isinstance(keep, KeepMask):
            return _into(out, xp.where(keep.to_bool(), dout, 0))
        return _into(out, xp.where(keep < 0, 0, dout))

    # affine, then ReLU

    def affine_relu_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> tuple[Array, Keep]:
        z = self.affine_forward(x, w, b, None)
        return self.relu_forward(z, out), z

    # softmax

    @may_underflow
    def softmax_loss(self, x: Array, y: Array, out: Array | None) -> tuple[Array, Array]:
        xp, nan = self.namespace(x), float("nan")
        if x.shape[0] == 0:
            return xp.sum(x) + nan, _into(out, xp.zeros_like(x))
        classes = xp.arange(x.shape[1], **beside(x))
        onehot = classes[None, :] == xp.astype(y, classes.dtype)[:, None]
        labelled = xp.any(onehot, axis=1)  # false for a label that is no class

        # Libraries over NumPy warn where far scores give exp(-inf), a right 0.
        with np.errstate(over="ignore", invalid="ignore"):
            shifted = x - xp.max(x, axis=1, keepdims=True)  # so that exp cannot overflow
            e = xp.exp(shifted)
        total = xp.sum(e, axis=1, keepdims=True)
        minus_log = xp.sum(xp.where(onehot, xp.log(total) - shifted, 0), axis=1)
        n = xp.sum(xp.astype(y == y, x.dtype))  # counted, since a lazy array may not know its extent
        loss = xp.sum(xp.where(labelled, minus_log, nan) / n)  # divided first: the sum of a mean within range may be beyond it
        dx = xp.where(labelled[:, None], (e / total - xp.astype(onehot, x.dtype)) / n, nan)
        return loss, _into(out, dx)

    # arrays

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        raise NotImplementedError("the generic backend has no library of its own: make the array with yours")

    def to_numpy(self, x: Array) -> Any:
        raise NotImplementedError("the generic backend has no library of its own: rectilinear.to_numpy knows the array's")

    def synchronize(self) -> None:
        """Nothing is pending here; `rectilinear.synchronize` waits for the arrays it is given."""


def product(xp: Any, a: Array, b: Array) -> Array:
    """a (..., n, k) b (..., k, m), in blocks of `LONG_SUM` terms where the library would add up a longer k in one chain.

    A BLAS may do so for results too narrow for its tiles. Of float32 numbers of one sign, k = 10**6, PyTorch's product on a CPU had errors
    of 1.5e-4 at n = m = 2 and JAX's at n = 1, where NumPy's has 3e-7; in blocks they are below 1e-7, and on PyTorch no slower (Zen 4).
    """
    (n, k), m = a.shape[-2:], b.shape[-1]
    fewest = 64 if is_torch_array(a) else 2
    # An extent that a lazy array does not know, or a traced one that is a symbol, is no int.
    if not (isinstance(k, int) and isinstance(n, int) and isinstance(m, int)) or k <= LONG_SUM or min(n, m) >= fewest:
        return xp.matmul(a, b)
    whole = k - k % LONG_SUM
    blocks = whole // LONG_SUM
    left = xp.reshape(a[..., :whole], (*a.shape[:-1], blocks, LONG_SUM))
    right = xp.reshape(b[..., :whole, :], (*b.shape[:-2], blocks, LONG_SUM, m))
    partial = xp.matmul(xp.moveaxis(left, -2, -3), right)  # (..., blocks, n, m)
    total = xp.reshape(sum_rows(xp, xp.reshape(partial, (*partial.shape[:-2], n * m))), (*partial.shape[:-3], n, m))
    return total if whole == k else total + xp.matmul(a[..., whole:], b[..., whole:, :])


def sum_rows(xp: Any, a: Array) -> Array:
    """Sum of a (..., n, m) over n, in blocks of `SUM_BLOCK` rows whose sums are summed likewise."""
    n = a.shape[-2]
    if not known(n):  # no blocks to be had; a wider accumulator does as well
        return xp.astype(xp.sum(a, axis=-2, dtype=xp.float64), a.dtype)
    while isinstance(n, int) and n > SUM_BLOCK:  # a traced extent may be a symbol
        whole = n - n % SUM_BLOCK
        blocks = xp.reshape(a[..., :whole, :], (*a.shape[:-2], whole // SUM_BLOCK, SUM_BLOCK, a.shape[-1]))
        partial = xp.sum(blocks, axis=-2, dtype=a.dtype)
        if whole < n:
            tail = xp.sum(a[..., whole:, :], axis=-2, keepdims=True, dtype=a.dtype)
            partial = xp.concat([partial, tail], axis=-2)
        a, n = partial, partial.shape[-2]
    return xp.sum(a, axis=-2, dtype=a.dtype)


def known(extent: Any) -> bool:
    """Whether a lazy array knows this extent; unknown ones are None or NaN."""
    return extent is not None and extent == extent


def beside(x: Array) -> dict[str, Any]:
    """Arguments that make a new array on the device of x. JAX finds it by itself, and calls a sharding of x's shape a device."""
    return {} if is_jax_array(x) else {"device": device(x)}


def _into(out: Array | None, result: Array) -> Array:
    if out is None:
        return result
    out[...] = result
    return out
