"""Affine and ReLU layers for JAX: in JAX's own operations where it traces, on rectilinear's CPU kernels where it does not.

There are three ways, and `_serve` chooses. JAX's own operations are those of the layer functions on JAX arrays (the generic backend);
they are all that ``jit``, ``vmap``, ``grad`` and ``jvp`` ever see. Outside of a trace large operands go to the numba backend's kernels
through DLPack, without a copy. Where asked for, a traced affine layer calls those kernels back from the compiled program; such a
callback sees NumPy alone, for one that touches JAX waits for threads that wait for it (jax issues 24255 and 25861).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rectilinear import layers
from rectilinear.backends import registry
from rectilinear.backends.contract import Array, Wanted
from rectilinear.buffers import empty
from rectilinear.dispatch import remedy, type_name
from rectilinear.errors import DTypeError
from rectilinear.keepmask import KeepMask

__all__ = ["affine", "affine_relu", "relu"]

# Where the kernels begin to be faster than a compiled call of JAX's, fetching and handing over included: minima of alternating calls in
# float32 on two cores of an AMD EPYC with AVX-512, JAX 0.10.2. With few rows or features a product waits for memory in either library.
_LEAST_FLOP = 1 << 26
_LEAST_ROWS = 32
_LEAST_FEATURES = 128
_LEAST_RELU_BYTES = 16 << 20  # where the C library takes fresh pages for each of XLA's results

_ALIGNMENT = 64
"""Bytes. XLA takes memory of others as it is only where it begins at a multiple of them, and copies elsewhere."""


def affine(x: Array, w: Array, b: Array | None = None, *, callback: bool = False) -> Array:
    """Affine (fully connected) layer: ``x w + b``.

    Parameters
    ----------
    x : array of shape (N, d_1, ..., d_k), or (B, N, d_1, ..., d_k) in the stacked form
        Each sample is flattened to D = d_1 ... d_k features. JAX or NumPy, as are the others.
    w : array of shape (D, M), or (B, D, M)
    b : array of shape (M,), or (B, M); or None
        None: no bias.
    callback : bool
        Where JAX computes on the CPU, call the chosen backend's kernels under ``jit``, ``vmap`` and ``grad`` too; gradients are
        the kernels' as well. Neither ``jvp`` nor second derivatives pass through it.

    Returns
    -------
    jax.Array of shape (N, M), or (B, N, M)
        Of the dtype that JAX promotes the arguments to (integers alone: its default float).

    Raises
    ------
    ShapeError, DTypeError
        As for `rectilinear.affine_forward`, at trace time.
    TypeError
        An argument is an array neither of JAX nor of NumPy.

    Examples
    --------
    >>> import jax
    >>> x, w = jax.numpy.ones((2, 3)), jax.numpy.ones((3, 2))
    >>> affine(x, w, jax.numpy.array([0.5, -3.0]))
    Array([[3.5, 0. ],
           [3.5, 0. ]], dtype=float32)
    """
    return _serve("affine_forward", {"x": x, "w": w, "b": b}, callback)


def relu(x: Array) -> Array:
    """Rectified linear unit: x where ``not (x < 0)``, else 0. NaN, -0.0 and +inf stay, -inf gives 0.

    At x == 0 the gradient passes, where `jax.nn.relu` takes 0; where x < 0 it is exactly 0, also for a cotangent of NaN or inf.

    Parameters
    ----------
    x : array of any shape, JAX or NumPy

    Returns
    -------
    jax.Array of x's shape

    Examples
    --------
    >>> import jax
    >>> jax.vmap(jax.grad(relu))(jax.numpy.array([-1.0, 0.0, 2.0]))
    Array([0., 1., 1.], dtype=float32)
    """
    return _serve("relu_forward", {"x": x}, False)


def affine_relu(x: Array, w: Array, b: Array | None = None, *, callback: bool = False) -> Array:
    """Affine layer followed by ReLU: ``relu(x w + b)``, with `relu`'s gradient.

    Parameters
    ----------
    x, w, b, callback
        As for `affine`.

    Returns
    -------
    jax.Array of shape (N, M), or (B, N, M)

    Raises
    ------
    ShapeError, DTypeError, TypeError
        As for `affine`.

    Examples
    --------
    >>> import jax
    >>> affine_relu(jax.numpy.array([[1.0, 2.0]]), jax.numpy.eye(2), jax.numpy.array([-1.5, 0.0]))
    Array([[0., 2.]], dtype=float32)
    """
    return _serve("affine_relu_forward", {"x": x, "w": w, "b": b}, callback)


def _serve(function: str, given: dict[str, Array | None], callback: bool) -> Array:
    arrays = [_jax_array(function, name, x) for name, x in given.items()]
    if not any(isinstance(x, jax.core.Tracer) for x in arrays):
        if (callback or _pays(arrays)) and (views := _views(arrays)) is not None:
            return _on_kernels(function, views)
    elif callback and jax.default_backend() == "cpu":
        return _by_callback(function, *arrays)
    return _in_jax[function](*arrays)


def _jax_array(function: str, name: str, x: Any) -> Any:
    if isinstance(x, jax.Array) or (x is None and name == "b"):
        return x
    if isinstance(x, np.ndarray | np.generic) and not isinstance(x, np.matrix | np.ma.MaskedArray):
        try:
            return jnp.asarray(x.astype(x.dtype.newbyteorder("="), copy=False))
        except TypeError:
            raise DTypeError(f"{function}: {name} has dtype {x.dtype}, which JAX has not; convert it to float32 or float64") from None
    way = remedy(name, x, jnp.zeros(()))
    raise TypeError(f"{function}: {name} is of type {type_name(x)}, which is an array neither of JAX nor of NumPy; pass {way}")


# ---------------------------------------------------------------- JAX's own operations


def _layer(function: str, *arrays: Any) -> Any:
    """The layer function on JAX arrays. It is `where` that ReLU comes to, whose gradient is ours, so that no rule is needed."""
    dtype = jnp.result_type(*(x for x in arrays if x is not None))
    # The layer functions see dtypes alone, and a weak one (that of jnp.full(shape, 1.0), say) has no vote.
    strong = (x.astype(dtype) if x is not None and x.aval.weak_type else x for x in arrays)
    return getattr(layers, function)(*strong)[0]


_in_jax = {
    function: jax.jit(functools.partial(_layer, function), inline=True)
    for function in ("affine_forward", "relu_forward", "affine_relu_forward")
}


# ---------------------------------------------------------------- outside of a trace: the kernels, through DLPack


def _pays(arrays: list[Any]) -> bool:
    x = arrays[0]
    if len(arrays) == 1:
        return bool(x.nbytes >= _LEAST_RELU_BYTES)
    w = arrays[1]
    if w.ndim not in (2, 3) or x.ndim < w.ndim - 1:
        return False
    d, m = w.shape[-2:]
    return bool(x.shape[w.ndim - 2] >= _LEAST_ROWS and d >= _LEAST_FEATURES and 2 * x.size * m >= _LEAST_FLOP)


def _views(arrays: list[Any]) -> list[np.ndarray | None] | None:
    """The arrays as NumPy sees them, without a copy, if they are what the kernels take: of one native dtype, whole on the first CPU."""
    given = [x for x in arrays if x is not None]
    dtype, cpu = given[0].dtype, jax.local_devices(backend="cpu")[0]
    native = dtype == np.float32 or (dtype == np.float64 and jax.config.jax_enable_x64)
    if not native or any(x.dtype != dtype or x.aval.weak_type or x.devices() != {cpu} for x in given):
        return None
    # What comes through DLPack is committed to its device, which matters where there is another one.
    if not (jax.default_backend() == "cpu" and jax.device_count() == 1) and not any(x.committed for x in given):
        return None
    if registry.active().name != "numba":  # NumPy's BLAS gains nothing on XLA
        return None
    return [None if x is None else np.from_dlpack(x) for x in arrays]


def _on_kernels(function: str, views: list[Any]) -> Any:
    x = views[0]
    shape = x.shape if len(views) == 1 else (*x.shape[: views[1].ndim - 1], views[1].shape[-1])
    size = math.prod(shape) * x.itemsize
    memory = empty((size + _ALIGNMENT,), np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    out = memory[start : start + size].view(x.dtype).reshape(shape)
    getattr(layers, function)(*views, out=out)
    return jax.dlpack.from_dlpack(out)


# ---------------------------------------------------------------- inside of a trace: the kernels, called back


def _by_callback(function: str, x: Any, w: Any, b: Any) -> Any:
    result = jax.eval_shape(_in_jax[function], x, w, b)  # or the error
    x, w, b = (a if a is None else a.astype(result.dtype) for a in (x, w, b))
    return _called(function == "affine_relu_forward", x.reshape(*result.shape[:-1], w.shape[-2]), w, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _called(relu: bool, x: Any, w: Any, b: Any) -> Any:
    """x (..., n, d), w (..., d, m) and b (..., m), of one dtype."""
    return _called_forward(relu, x, w, b)[0]


def _called_forward(relu: bool, x: Any, w: Any, b: Any) -> tuple[Any, Any]:
    rows, m = x.shape[:-1], w.shape[-1]
    shapes = [jax.ShapeDtypeStruct((*rows, m), x.dtype)]
    if relu:
        shapes.append(jax.ShapeDtypeStruct((*rows, -(-m // 8)), np.uint8))
    out, *bits = _call_host(_forward_on_host, shapes, x, w, b)
    return out, (bits, x, w, b)


def _called_backward(relu: bool, saved: Any, dout: Any) -> tuple[Any, Any, Any]:
    bits, x, w, b = saved

    def call(host: Any, *primals: Any) -> Any:
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in primals if a is not None]
        return _call_host(host, shapes, dout, bits, x, w, b)

    # Two calls, for XLA leaves out one that nobody uses the results of: that of a first layer's dx.
    (dx,), (dw, *db) = call(_dx_on_host, x), call(_dw_db_on_host, w, b)
    return dx, dw, db[0] if db else None


_called.defvjp(_called_forward, _called_backward)


def _call_host(host: Any, shapes: Any, *operands: Any) -> Any:
    """Call `host` when the program comes to it, on XLA's own buffers.

    Not by `jax.pure_callback`, which hands over JAX arrays that it copies on JAX's threads. The callback waits for the copy and the copy
    for the callback's thread: on one core that ends never, whatever the callback does with them (JAX 0.10.2).
    """
    from jax.experimental.buffer_callback import buffer_callback  # here, for all else does without an experiment of JAX's

    return buffer_callback(host, shapes, vmap_method="expand_dims")(*operands)


# The host's side: NumPy alone, on XLA's own buffers. `vmap` puts axes in front of operands, of extent 1 where one has no such axis; these
# and the groups of the stacked form are all one to what follows. Results have every axis in full.


def _forward_on_host(_: Any, results: Any, *operands: Any) -> None:
    x, w, b = _arrays(operands)
    out, *bits = _arrays(results)
    (n, d), m = x.shape[-2:], w.shape[-1]
    if math.prod(w.shape[:-2]) == 1 and (b is None or math.prod(b.shape[:-1]) == 1):  # one layer for all: a product of many rows
        x, w, b = x.reshape(math.prod(x.shape[:-2]) * n, d), w.reshape(d, m), None if b is None else b.reshape(m)
        out, bits = out.reshape(len(x), m), [a.reshape(len(x), -(-m // 8)) for a in bits]
    else:
        lead = out.shape[:-2]
        x, w, b, out, *bits = (_groups(lead, a, own) for a, own in zip((x, w, b, out, *bits), (2, 2, 1, 2, 2), strict=False))
    if not bits:
        layers.affine_forward(x, w, b, out=out)
        return
    _, (_, keep) = layers.affine_relu_forward(x, w, b, out=out)
    kept = keep.to_bool() if isinstance(keep, KeepMask) else ~(keep < 0)
    bits[0][...] = np.packbits(kept, axis=-1, bitorder="little")


def _backward_on_host(needs: Wanted, _: Any, results: Any, dout: Any, bits: Any, *operands: Any) -> None:
    dout, x, w, b, *bits = _arrays((dout, *operands, *bits))
    grads = iter(_arrays(results))
    dx, dw, db = (next(grads, None) if wanted else None for wanted in needs)  # without b there is no db
    lead = next(grad.shape[:-2] for grad in (dx, dw) if grad is not None)
    dout, x, w, b = _groups(lead, dout, 2), _groups(lead, x, 2), _groups(lead, w, 2), _groups(lead, b, 1)
    out = _groups(lead, dx, 2), _groups(lead, dw, 2), _groups(lead, db, 1)
    if bits:
        cache = (x, w, b), KeepMask(_groups(lead, bits[0], 2), dout.shape)
        layers.affine_relu_backward(dout, cache, needs=needs, out=out)
    else:
        layers.affine_backward(dout, (x, w, b), needs=needs, out=out)


def _arrays(buffers: Any) -> Any:
    return (None if buffer is None else np.asarray(buffer) for buffer in buffers)


def _groups(lead: Any, x: Any, own: int) -> Any:
    """x, whose last `own` axes are its own, with one axis of groups before them; none where there is one group."""
    if x is None:
        return None
    shape, groups = x.shape[-own:], math.prod(lead)
    full = x if x.shape[:-own] == lead else np.broadcast_to(x, (*lead, *shape))  # what is broadcast is read-only
    return full.reshape(shape if groups == 1 else (groups, *shape))


# JAX compiles anew for another callable, so there is one for each kind of call.
_dx_on_host = functools.partial(_backward_on_host, (True, False, False))
_dw_db_on_host = functools.partial(_backward_on_host, (False, True, True))
