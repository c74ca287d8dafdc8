"""The drop-in functions: affine and ReLU layers, forward and backward, and the softmax loss, with CS231n's names and caches.

Every function here checks its arguments, asks `plain`, or where they are not plain `dispatch`, who serves them, and hands operands to that
backend; none computes. The mathematics is derived in ``docs/mathematics.md``, after CS231n, assignments 1 and 2.

Words used below: N samples, D features, M outputs; B groups in the stacked form, where every array has one more leading axis.

Notes that hold for all of them:

- dtypes: everything computes in T, what the arrays' library promotes them to (integers alone: its default float). float16 and
  bfloat16 compute in float32 and are rounded once.
- ``out`` is a writable array of exactly the result's shape and dtype that shares no memory with an argument; it is filled and returned.
- Errors: `ShapeError` (a ValueError), `DTypeError` (a TypeError), TypeError for what is no array, `BackendError` where the choice of
  backend cannot work. Nothing has been written when one is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rectilinear.backends.contract import Array, Keep, Wanted
from rectilinear.backends.cupy_scratch import refuse_while_recording
from rectilinear.backends.generic import beside, known
from rectilinear.dispatch import (
    Call,
    a_or_an,
    check_outs,
    common_namespace,
    dtype_name,
    product,
    readable,
    resolve,
    same,
    same_shape,
    shape_text,
)
from rectilinear.errors import DTypeError, ShapeError
from rectilinear.keepmask import KeepMask
from rectilinear.plain import fits_at_once, gradients_fit_at_once, labels_on_its_device, plain_backend

__all__ = [
    "affine_backward",
    "affine_forward",
    "affine_relu_backward",
    "affine_relu_forward",
    "relu_backward",
    "relu_forward",
    "softmax_loss",
]

_AFFINE = ("x", "w", "b")
_AFFINE_BACKWARD = ("dout", "x", "w", "b", "relu cache")
_RELU = ("x",)
_SOFTMAX = ("x", "y")
_RELU_BACKWARD = ("dout", "cache")
_GRADIENTS = ("dx", "dw", "db")
_OUTS = tuple(f"out[{i}] ({name})" for i, name in enumerate(_GRADIENTS))
_EVERYTHING = (True, True, True)
_BIAS_ALONE = (False, False, True)
_NOTHING = (False, False, False)
_NOWHERE = (None, None, None)
_UNSIGNED = {np.dtype(f"i{size}"): np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
_LARGEST_LABEL = 1 << 31  # where the number of classes is not known
_SEQUENCE = (tuple, list)  # a union is made anew each time it is looked at
_BOOL = (bool, np.bool_)


# ---------------------------------------------------------------- affine


def affine_forward(x: Array, w: Array, b: Array | None, *, out: Array | None = None) -> tuple[Array, tuple[Array, Array, Array | None]]:
    """Affine (fully connected) layer: ``out = x w + b``.

    Parameters
    ----------
    x : array of shape (N, d_1, ..., d_k), or (B, N, d_1, ..., d_k) in the stacked form
        Each sample is flattened to D = d_1 ... d_k features; shape (N,) has D = 1.
    w : array of shape (D, M), or (B, D, M)
        Two axes or three decide between the plain and the stacked form.
    b : array of shape (M,), or (B, M); or None
        None: no bias.
    out : array of shape (N, M) or (B, N, M) and dtype T, optional

    Returns
    -------
    out : array of shape (N, M), or (B, N, M)
    cache : tuple
        ``(x, w, b)``, the caller's own arrays, for `affine_backward`.

    Raises
    ------
    ShapeError
        x has fewer axes than w wants, or another number of features or groups; b or `out` is of another shape.
    DTypeError
        The dtypes have no common one to compute in: complex, object, longdouble.
    TypeError
        An argument is no array (a list, a matrix, a masked array), or they are of two libraries or devices.
    ValueError
        `out` cannot be written to or shares memory with an argument.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 2.0], [3.0, 4.0]])  # (N, D)
    >>> w = np.array([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]])  # (D, M)
    >>> out, cache = affine_forward(x, w, np.array([0.5, 0.0, 0.0]))
    >>> out
    array([[1.5, 2. , 1. ],
           [3.5, 4. , 1. ]])
    """
    backend = plain_backend(x, (w,), b)
    if backend is not None and (shape := _plain_shape(x, w, b)) and (out is None or fits_at_once(out, shape, x.dtype, (x, w, b))):
        return backend.affine_forward(x, w, b, out), (x, w, b)
    if backend is not None and (flat_x := _flattened(x, w)) is not None:
        return affine_forward(flat_x, w, b, out=out)[0], (x, w, b)
    call = resolve("affine_forward", _AFFINE, (x, w, b), backend)
    flat, shape = _affine_shapes(call, x, w, b)
    target = _target(call, out, shape)
    operands = _samples(call, x, flat), call.operand(w), call.operand(b)
    return call.deliver(call.run("affine_forward", *operands, target), None, out, target), (x, w, b)


def affine_backward(
    dout: Array,
    cache: tuple[Array, Array, Array | None],
    *,
    needs: Wanted = _EVERYTHING,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
) -> tuple[Array | None, Array | None, Array | None]:
    """Gradients of `affine_forward`: ``dx = dout w^T``, ``dw = x^T dout``, ``db = dout.sum(axis=0)``.

    Parameters
    ----------
    dout : array of shape (N, M), or (B, N, M)
        Gradient of the loss with respect to the output.
    cache : tuple
        ``(x, w, b)``, as `affine_forward` returned it.
    needs : tuple of three bools
        Which of dx, dw, db to compute; the others come back None.
    out : tuple of three arrays or None, optional
        Where dx, dw and db go; None for one that is to be a fresh array or is not needed.

    Returns
    -------
    dx : array of x's shape
    dw : array of w's shape
    db : array of b's shape; None if b is None

    Raises
    ------
    ShapeError
        `dout` is not of the output's shape, or an array in `out` not of its gradient's.
    TypeError
        `cache` is not (x, w, b), or `needs` not three bools; and as for `affine_forward`.
    ValueError
        As for `affine_forward`; or `out` has an array for a gradient that is not computed.

    Examples
    --------
    >>> import numpy as np
    >>> x, w = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]])
    >>> out, cache = affine_forward(x, w, np.zeros(3))
    >>> dx, dw, db = affine_backward(np.ones((2, 3)), cache)
    >>> db  # every row of out had b added to it
    array([2., 2., 2.])
    """
    x, w, b = cache if type(cache) is tuple and len(cache) == 3 else _affine_cache("affine_backward", cache)
    return _affine_backward("affine_backward", dout, x, w, b, None, needs, out)


# ---------------------------------------------------------------- ReLU


def relu_forward(x: Array, *, out: Array | None = None) -> tuple[Array, Array]:
    """Rectified linear unit: x where ``not (x < 0)``, else 0. NaN, -0.0 and +inf stay, -inf gives 0.

    Parameters
    ----------
    x : array of any shape
    out : array of x's shape and dtype T, optional

    Returns
    -------
    out : array of x's shape
    cache : array
        x itself, for `relu_backward`.

    Raises
    ------
    ShapeError, DTypeError, TypeError, ValueError
        As for `affine_forward`.

    Examples
    --------
    >>> import numpy as np
    >>> out, cache = relu_forward(np.array([-1.0, 0.0, 2.0]))
    >>> out
    array([0., 0., 2.])
    """
    backend = plain_backend(x)
    if backend is not None and (out is None or fits_at_once(out, x.shape, x.dtype, (x,))):
        return backend.relu_forward(x, out), x
    call = resolve("relu_forward", _RELU, (x,), backend)
    target = _target(call, out, x.shape)
    return call.deliver(call.run("relu_forward", call.operand(x), target), None, out, target), x


def relu_backward(dout: Array, cache: Array | KeepMask, *, out: Array | None = None) -> Array:
    """Gradient of `relu_forward`: dout where ``not (x < 0)``, else 0.

    At x == 0 the gradient passes, where most frameworks take 0. Where it does not pass the result is exactly 0, also for a dout of
    NaN or inf. On a device that flushes subnormals a negative subnormal x may count as 0 and pass.

    Parameters
    ----------
    dout : array of x's shape
    cache : array or KeepMask
        x, as `relu_forward` returned it, or the ReLU half of `affine_relu_forward`'s cache. A bool or integer array is an x too.
    out : array of x's shape and dtype T, optional
        Here dout itself will do.

    Returns
    -------
    dx : array of x's shape

    Raises
    ------
    ShapeError
        `dout` or `out` is not of x's shape.
    TypeError
        `cache` is neither an array nor a mask; and as for `affine_forward`.
    DTypeError, ValueError
        As for `affine_forward`.

    Examples
    --------
    >>> import numpy as np
    >>> relu_backward(np.array([10.0, 20.0, 30.0]), np.array([-1.0, 0.0, 2.0]))
    array([ 0., 20., 30.])
    """
    if isinstance(cache, _SEQUENCE):
        raise TypeError(
            f"relu_backward: cache is a {type(cache).__name__} of {len(cache)}; it takes the array x that relu_forward returned, "
            "or the second half of affine_relu_forward's cache"
        )
    if cache is None:
        raise TypeError("relu_backward: cache is None; it takes the array x that relu_forward returned")
    backend = plain_backend(dout, keep=cache)
    if backend is not None and dout.shape == cache.shape:
        apart_from = (_array_of(cache),) if out is dout else (dout, _array_of(cache))
        if out is None or fits_at_once(out, dout.shape, dout.dtype, apart_from):
            return backend.relu_backward(dout, cache, out)
    call = resolve("relu_backward", _RELU_BACKWARD, (dout, cache), backend)
    if not same_shape(dout.shape, cache.shape):
        raise ShapeError(f"relu_backward: dout has shape {shape_text(dout.shape)} but the forward's x had {shape_text(cache.shape)}")
    target = _target(call, out, dout.shape, in_place=dout)
    return call.deliver(call.run("relu_backward", call.operand(dout), call.keep_operand(cache), target), None, out, target)


# ---------------------------------------------------------------- affine, then ReLU


def affine_relu_forward(
    x: Array, w: Array, b: Array | None, *, out: Array | None = None
) -> tuple[Array, tuple[tuple[Array, Array, Array | None], Keep]]:
    """Affine layer followed by ReLU: ``out = relu(x w + b)``, fused where the backend can.

    Parameters
    ----------
    x : array of shape (N, d_1, ..., d_k), or (B, N, d_1, ..., d_k) in the stacked form
    w : array of shape (D, M), or (B, D, M)
    b : array of shape (M,), or (B, M); or None
    out : array of shape (N, M) or (B, N, M) and dtype T, optional
        All as for `affine_forward`.

    Returns
    -------
    out : array of shape (N, M), or (B, N, M)
    cache : tuple
        ``(fc_cache, relu_cache)``, for `affine_relu_backward`. The first half serves `affine_backward`, the second `relu_backward`; it
        is ``z = x w + b`` or, where the backend never stores z, a `KeepMask`.

    Raises
    ------
    ShapeError, DTypeError, TypeError, ValueError
        As for `affine_forward`.

    Examples
    --------
    >>> import numpy as np
    >>> out, (fc_cache, relu_cache) = affine_relu_forward(np.array([[1.0, 2.0]]), np.eye(2), np.array([-1.5, 0.0]))
    >>> out
    array([[0., 2.]])
    """
    backend = plain_backend(x, (w,), b)
    if backend is not None and (shape := _plain_shape(x, w, b)) and (out is None or fits_at_once(out, shape, x.dtype, (x, w, b))):
        result, keep = backend.affine_relu_forward(x, w, b, out)
        return result, ((x, w, b), keep)
    if backend is not None and (flat_x := _flattened(x, w)) is not None:
        result, (_, keep) = affine_relu_forward(flat_x, w, b, out=out)
        return result, ((x, w, b), keep)
    call = resolve("affine_relu_forward", _AFFINE, (x, w, b), backend)
    flat, shape = _affine_shapes(call, x, w, b)
    target = _target(call, out, shape)
    operands = _samples(call, x, flat), call.operand(w), call.operand(b)
    if call.compute != call.dtype:
        # Rounded before ReLU looks at the sign, so that a z which rounds to -0.0 is kept by forward and backward alike.
        z = call.deliver(call.run("affine_forward", *operands, None))
        return relu_forward(z, out=out)[0], ((x, w, b), z)
    result, keep = call.run("affine_relu_forward", *operands, target)
    return call.deliver(result, None, out, target), ((x, w, b), call.deliver(keep))


def affine_relu_backward(
    dout: Array,
    cache: tuple[tuple[Array, Array, Array | None], Array | KeepMask],
    *,
    needs: Wanted = _EVERYTHING,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
) -> tuple[Array | None, Array | None, Array | None]:
    """Gradients of `affine_relu_forward`: `relu_backward`, then `affine_backward`, fused where the backend can.

    Parameters
    ----------
    dout : array of shape (N, M), or (B, N, M)
    cache : tuple
        ``(fc_cache, relu_cache)``, as `affine_relu_forward` returned it, of this backend or of another for the same library.
    needs : tuple of three bools
        Which of dx, dw, db to compute; the others come back None.
    out : tuple of three arrays or None, optional
        Where dx, dw and db go, as for `affine_backward`.

    Returns
    -------
    dx : array of x's shape
    dw : array of w's shape
    db : array of b's shape; None if b is None

    Raises
    ------
    ShapeError
        `dout`, the ReLU half of `cache` or an array in `out` is not of the shape that it belongs to.
    TypeError
        `cache` is not ((x, w, b), relu_cache); and as for `affine_backward`.
    DTypeError, ValueError
        As for `affine_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> out, cache = affine_relu_forward(np.array([[1.0, 2.0]]), np.eye(2), np.array([-1.5, 0.0]))
    >>> dx, dw, db = affine_relu_backward(np.ones((1, 2)), cache)
    >>> dx
    array([[0., 1.]])
    """
    if not isinstance(cache, _SEQUENCE) or len(cache) != 2:
        raise TypeError(
            f"affine_relu_backward: cache is {_met(cache)}; it takes ((x, w, b), relu_cache), as affine_relu_forward returned it"
        )
    affine, keep = cache
    x, w, b = affine if type(affine) is tuple and len(affine) == 3 else _affine_cache("affine_relu_backward", affine)
    if keep is None or isinstance(keep, _SEQUENCE):
        met = _met(keep)
        raise TypeError(
            f"affine_relu_backward: the ReLU half of cache is {met}; it takes z or a KeepMask, as affine_relu_forward returned it"
        )
    return _affine_backward("affine_relu_backward", dout, x, w, b, keep, needs, out)


# ---------------------------------------------------------------- softmax


def softmax_loss(x: Array, y: Array | Sequence[int], *, out: Array | None = None) -> tuple[Any, Array]:
    """Softmax cross-entropy, averaged over samples, and its gradient.

    Loss ``mean_i(-log softmax(x_i)[y_i])``, gradient ``(softmax(x) - onehot(y)) / N``; stable for any finite scores.

    Parameters
    ----------
    x : array of shape (N, C), C >= 1
        Scores.
    y : array of integers of shape (N,), or a list of ints
        Labels, 0 to C - 1. Where they cannot be read without waiting (GPU, traced and lazy arrays) a label outside that range gives a
        NaN loss and a NaN row of dx; elsewhere a ValueError.
    out : array of shape (N, C) and dtype T, optional
        For dx.

    Returns
    -------
    loss : 0-d value of dtype T; a NumPy scalar for NumPy arrays
        NaN for N = 0.
    dx : array of shape (N, C)

    Raises
    ------
    ShapeError
        x has not two axes, or no classes; y is not of shape (N,); `out` is not of x's shape.
    ValueError
        A label is outside 0 to C - 1; and as for `affine_forward`.
    TypeError
        y is not of integers; and as for `affine_forward`.
    DTypeError
        As for `affine_forward`.

    Examples
    --------
    >>> import numpy as np
    >>> loss, dx = softmax_loss(np.array([[0.0, 0.0], [0.0, 0.0]]), [0, 1])
    >>> float(round(loss, 4))
    0.6931
    >>> dx
    array([[-0.25,  0.25],
           [ 0.25, -0.25]])
    """
    backend = plain_backend(x)
    if backend is not None and _plain_labels(x, y) and (out is None or fits_at_once(out, x.shape, x.dtype, (x, y))):
        return backend.softmax_loss(x, y, out)
    call = resolve("softmax_loss", _RELU, (x,), backend)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ShapeError(f"softmax_loss: x has shape {shape_text(x.shape)}; it takes (N, C) scores of C >= 1 classes")
    y = _labels(call, x, y)
    call.names, call.arrays = _SOFTMAX, (x, y)
    target = _target(call, out, x.shape)
    loss, dx = call.run("softmax_loss", call.operand(x), call.backend.asarray(y) if call.moves else y, target)
    loss = call.deliver(loss)
    return (loss[()] if type(loss) is np.ndarray else loss), call.deliver(dx, None, out, target)


def _plain_labels(x: Array, y: Any) -> bool:
    """Whether these are scores and labels that fit, as nearly always: base arrays of one library."""
    if type(y) is not type(x) or x.ndim != 2 or y.shape != x.shape[:1]:
        return False
    unsigned = _UNSIGNED.get(y.dtype)
    if unsigned is None or x.size == 0:
        return False
    if type(y) is not np.ndarray:  # not to be read without waiting
        return labels_on_its_device(x, y)
    labels = y.view(unsigned)  # without its sign a label below 0 is a large one
    return bool(labels.item(labels.argmax()) < x.shape[1])  # argmax saves setting up a reduction, 0.6 us


def _labels(call: Call, x: Array, y: Any) -> Array:
    classes, wanted = (x.shape[1], f"0 to {x.shape[1] - 1}") if known(x.shape[1]) else (_LARGEST_LABEL, "0 upwards")
    if isinstance(y, _SEQUENCE):
        if not all(isinstance(label, int | np.integer) and not isinstance(label, bool) for label in y):
            raise DTypeError(f"softmax_loss: y is a {type(y).__name__} of other things than ints; labels are integers, {wanted}")
        # Looked at before they become an array, which may be too narrow for them.
        _check_labels(x, y, np.array([not 0 <= label < classes for label in y], bool), wanted)
        y = np.asarray(y, np.int64)
        if call.xp is not np:
            refuse_while_recording("softmax_loss: y comes from the host", "make it an array, and an argument of the captured function")
            y = call.xp.asarray(y, **beside(x))
    common_namespace("softmax_loss", tuple(zip(_SOFTMAX, (x, y), strict=True)))
    y = np.asarray(y) if call.xp is np else y
    if dtype_name(y.dtype).lstrip("u") not in ("int8", "int16", "int32", "int64"):
        raise DTypeError(f"softmax_loss: y has dtype {dtype_name(y.dtype)}; labels are integers, {wanted}")
    if not same_shape(y.shape, x.shape[:1]):
        raise ShapeError(f"softmax_loss: y has shape {shape_text(y.shape)} but x of shape {shape_text(x.shape)} wants one label per sample")
    values = readable(y)
    if values is not None:
        _check_labels(x, values, (values < 0) | (values >= classes), wanted)
    return y


def _check_labels(x: Array, labels: Any, wrong: np.ndarray, wanted: str) -> None:
    if wrong.any():
        i = int(np.argmax(wrong))
        classes = shape_text(x.shape[1:])[1:-2]
        raise ValueError(f"softmax_loss: y[{i}] is {labels[i]} but x has {classes} classes, labels go from {wanted}")


# ---------------------------------------------------------------- shapes, caches, out


def _plain_shape(x: Array, w: Array, b: Array | None) -> tuple[int, ...] | None:
    """Shape of the output if samples are flat, in the plain form or the stacked one, and all extents fit."""
    try:
        (n, d), (rows, m) = x.shape, w.shape
    except ValueError:  # another number of axes
        try:
            (groups, n, d), (matrices, rows, m) = x.shape, w.shape
        except ValueError:
            return None
        return (groups, n, m) if groups == matrices and d == rows and (b is None or b.shape == (groups, m)) else None
    return (n, m) if d == rows and (b is None or b.shape == (m,)) else None


def _flattened(x: Array, w: Array) -> Array | None:
    """A view of images x (N, d_1, ..., d_k) as flat samples, if w takes those."""
    if x.ndim < 3 or w.ndim != 2 or x.size == 0 or x.size != len(x) * len(w) or not x.flags.c_contiguous:
        return None
    return x.reshape(len(x), len(w))


def _array_of(keep: Keep | None) -> Array | None:
    return keep._bits if type(keep) is KeepMask else keep


def _affine_shapes(call: Call, x: Array, w: Array, b: Array | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Shapes of x as (..., n, d) and of the output; raises where the arguments do not fit."""
    x_shape, w_shape = x.shape, w.shape
    lead = len(w_shape) - 1
    flat = _flat_shape(call.function, x_shape, w_shape, lead)
    if b is not None:
        b_shape = (*w_shape[:-2], w_shape[-1])
        if b.shape != b_shape and not same_shape(b.shape, b_shape):
            raise ShapeError(
                f"{call.function}: b has shape {shape_text(b.shape)} but w of shape {shape_text(w_shape)} wants {shape_text(b_shape)}"
            )
    return flat, (*flat[:lead], w_shape[-1])


def _samples(call: Call, x: Array, flat: tuple[Any, ...]) -> Array:
    """x as the operand (..., n, d)."""
    if len(flat) == x.ndim:
        return call.operand(x)
    if len(flat) == x.ndim + 1:
        return call.operand(x[..., None])
    try:
        return call.operand(call.xp.reshape(x, tuple(extent if known(extent) else -1 for extent in flat)))
    except (ValueError, TypeError) as error:  # dask flattens nothing of unknown extent
        raise ShapeError(
            f"{call.function}: x of shape {shape_text(x.shape)} has to be flattened to {shape_text(flat)}, which its library cannot do "
            "while an extent is unknown; let it find out (dask: x.compute_chunk_sizes()) or flatten the samples before"
        ) from error


def _flat_shape(function: str, x_shape: tuple[Any, ...], w_shape: tuple[Any, ...], lead: int) -> tuple[Any, ...]:
    if lead not in (1, 2):
        raise ShapeError(f"{function}: w has shape {shape_text(w_shape)}; it takes (D, M), or (B, D, M) for the stacked form")
    if len(x_shape) < lead:
        wanted = "(N, ...)" if lead == 1 else "(B, N, ...), since w is stacked"
        raise ShapeError(f"{function}: x has shape {shape_text(x_shape)}; it takes {wanted}")
    if lead == 2 and not same(x_shape[0], w_shape[0]):
        raise ShapeError(
            f"{function}: x has {x_shape[0]} groups (shape {shape_text(x_shape)}) but w has {w_shape[0]} (shape {shape_text(w_shape)})"
        )
    features = product(x_shape[lead:])
    if not same(features, w_shape[-2]):
        met, wanted = shape_text(x_shape), shape_text(w_shape)
        one = "; of a single sample pass x[None]" if len(x_shape) == lead == 1 and same(x_shape[0], w_shape[-2]) else ""
        plural = "" if features == 1 else "s"
        raise ShapeError(
            f"{function}: x has {features} feature{plural} per sample (shape {met}) but w takes {w_shape[-2]} (shape {wanted}){one}"
        )
    return (*x_shape[:lead], features if known(features) else w_shape[-2])


def _affine_cache(function: str, cache: Any) -> tuple[Array, Array, Array | None]:
    if isinstance(cache, _SEQUENCE) and len(cache) == 3:
        x, w, b = cache
        return x, w, b
    hint = "; for affine_relu_forward's cache there is affine_relu_backward" if isinstance(cache, _SEQUENCE) and len(cache) == 2 else ""
    raise TypeError(f"{function}: cache is {_met(cache)}; it takes (x, w, b), as affine_forward returned it{hint}")


def _met(cache: Any) -> str:
    if cache is None:
        return "None"
    name = f"{type(cache).__module__}.{type(cache).__name__}".removeprefix("builtins.")
    return f"a {name} of {len(cache)}" if isinstance(cache, _SEQUENCE) else a_or_an(name)


def _affine_backward(
    function: str, dout: Array, x: Array, w: Array, b: Array | None, keep: Any, needs: Any, out: Any
) -> tuple[Array | None, Array | None, Array | None]:
    backend = plain_backend(dout, (x, w), b, keep)
    if backend is not None and dout.shape == (shape := _plain_shape(x, w, b)) and (keep is None or keep.shape == shape):
        wanted = needs if needs is _EVERYTHING and b is not None else _wanted(function, needs, b)
        outs = _NOWHERE if out is None else _gradient_outs(function, out, wanted)
        if out is None or gradients_fit_at_once(outs, dout, x, w, b, _array_of(keep)):
            if wanted is _EVERYTHING or keep is not None or wanted != _BIAS_ALONE:
                return _NOWHERE if wanted == _NOTHING else backend.affine_backward(dout, x, w, keep, wanted, outs)
            return None, None, backend.bias_backward(dout, outs[2])
    elif backend is not None and out is None and (flat_x := _flattened(x, w)) is not None:
        dx, dw, db = _affine_backward(function, dout, flat_x, w, b, keep, needs, out)
        return None if dx is None else dx.reshape(x.shape), dw, db
    call = resolve(function, _AFFINE_BACKWARD, (dout, x, w, b, keep), backend)
    flat, shape = _affine_shapes(call, x, w, b)
    if dout.shape != shape and not same_shape(dout.shape, shape):
        raise ShapeError(f"{function}: dout has shape {shape_text(dout.shape)} but the forward's output had {shape_text(shape)}")
    if keep is not None and keep.shape != shape and not same_shape(keep.shape, shape):
        raise ShapeError(
            f"{function}: the ReLU half of cache has shape {shape_text(keep.shape)} but the forward's output had {shape_text(shape)}"
        )
    wanted = _wanted(function, needs, b)
    shapes = (x.shape, w.shape, () if b is None else b.shape)
    outs = _gradient_outs(function, out, wanted)
    check_outs(call, _OUTS, outs, shapes)
    targets = (call.target(outs[0], flat), call.target(outs[1], shapes[1]), call.target(outs[2], shapes[2]))
    grads: tuple[Array | None, Array | None, Array | None] = _NOWHERE
    if keep is None and wanted == _BIAS_ALONE:
        grads = None, None, call.run("bias_backward", call.operand(dout), targets[2])
    elif wanted != _NOTHING:
        operands = call.operand(dout), _samples(call, x, flat), call.operand(w), call.keep_operand(keep)
        grads = call.run("affine_backward", *operands, wanted, targets)
    dx, dw, db = (call.deliver(*each) for each in zip(grads, shapes, outs, targets, strict=True))
    return dx, dw, db


def _wanted(function: str, needs: object, b: Array | None) -> Wanted:
    if needs is _EVERYTHING and b is not None:
        return _EVERYTHING
    if isinstance(needs, _SEQUENCE) and len(needs) == 3:
        dx, dw, db = needs
        if type(dx) is type(dw) is type(db) is bool:
            return dx, dw, db and b is not None
        if isinstance(dx, _BOOL) and isinstance(dw, _BOOL) and isinstance(db, _BOOL):
            return bool(dx), bool(dw), bool(db) and b is not None
    raise TypeError(f"{function}: needs is {needs!r}; it takes three bools, for dx, dw and db")


def _gradient_outs(function: str, out: Any, wanted: Wanted) -> tuple[Array | None, Array | None, Array | None]:
    if out is None:
        return _NOWHERE
    if not isinstance(out, _SEQUENCE) or len(out) != 3:
        raise TypeError(f"{function}: out is {_met(out)}; it takes a tuple (dx, dw, db), with None where no array is given")
    dx, dw, db = out
    (want_dx, want_dw, want_db) = wanted
    if not ((dx is None or want_dx) and (dw is None or want_dw) and (db is None or want_db)):
        name = next(name for name, buffer, want in zip(_GRADIENTS, out, wanted, strict=True) if buffer is not None and not want)
        raise ValueError(f"{function}: out has an array for {name}, which is not computed (needs, or b is None); put None there")
    return dx, dw, db


def _target(call: Call, out: Array | None, shape: tuple[Any, ...], in_place: Array | None = None) -> Array | None:
    if out is None:
        return None
    check_outs(call, ("out",), (out,), (shape,), in_place)
    return call.target(out, shape)
