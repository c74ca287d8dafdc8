"""Parameters in safetensors files (https://huggingface.co/docs/safetensors)."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeAlias

import numpy as np

from rectilinear.errors import DTypeError
from rectilinear.extras import how_to_install
from rectilinear.nn.module import Module
from rectilinear.nn.parameters import put
from rectilinear.nn.sgd import SGD

FilePath: TypeAlias = str | bytes | PathLike[str] | PathLike[bytes]

_OPTIMIZER = "optimizer."
"""What the names of an optimiser's values begin with: ``optimizer.lr``, ``optimizer.velocity.0.w``."""

_DTYPES = {"bool", "float16", "bfloat16", "float32", "float64"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def save(model: Module, path: FilePath, optimizer: SGD | None = None, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write `model.state_dict()` to a safetensors file, and the optimiser's with it if it is given.

    A file that is there already stays as it is until the new one is complete, also where several threads or processes save to it.

    Parameters
    ----------
    model : Module
    path : str, bytes or path-like
        Of a link, the file that it leads to is written.
    optimizer : SGD, optional
        Its rates and velocity go under names that begin with ``optimizer.``.
    metadata : mapping of str to str, optional
        What else the file is to hold, for `metadata` to read.

    Raises
    ------
    DTypeError
        A parameter is of a dtype that the files do not have, such as longdouble.
    TypeError
        `optimizer` is no SGD.
    ValueError
        A parameter's name begins with ``optimizer.``.
    ImportError
        safetensors is not installed (extra ``files``).

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> from rectilinear import nn
    >>> layer = nn.Affine(3, 2, rng=np.random.default_rng(0))
    >>> optimizer = nn.SGD(layer, lr=0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "layer.safetensors")
    ...     nn.save(layer, path, optimizer)
    ...     optimizer.lr = 0.5
    ...     nn.load(layer, path, optimizer)
    >>> optimizer.lr
    0.1
    """
    tensors = model.state_dict()
    if taken := [name for name in tensors if name.startswith(_OPTIMIZER)]:
        raise ValueError(
            f"nn.save: {taken[0]} is a name of the optimiser's in these files; give the layers another one than {_OPTIMIZER!r}"
        )
    if not (optimizer is None or isinstance(optimizer, SGD)):
        raise TypeError(f"nn.save: optimizer is of type {type(optimizer).__name__}; it takes an SGD")
    if optimizer is not None:
        for key, value in optimizer.state_dict().items():
            if isinstance(value, Mapping):
                tensors |= {f"{_OPTIMIZER}{key}.{name}": array for name, array in value.items()}
            else:
                tensors[_OPTIMIZER + key] = np.array(value)
    for key, value in tensors.items():
        if value.dtype.name not in _DTYPES:
            raise DTypeError(f"nn.save: {key} has dtype {value.dtype}, which safetensors files do not have; convert it")
    target = os.path.realpath(os.fsdecode(path))
    part = f"{target}.{os.getpid()}-{threading.get_ident()}.part"
    try:
        _safetensors("save").save_file(tensors, part, **({} if metadata is None else {"metadata": dict(metadata)}))
        os.replace(part, target)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise


def load(model: Module, path: FilePath, optimizer: SGD | None = None) -> None:
    """Fill `model` from a file that `save` wrote, and the optimiser too if it is given.

    Raises
    ------
    ShapeError, DTypeError, ValueError
        As `Module.load_state_dict` and `SGD.load_state_dict` raise them, or the file holds no optimiser's state but one is asked for.
        Neither the model nor the optimiser has been changed then.
    ImportError
        safetensors is not installed (extra ``files``).
    """
    tensors = _safetensors("load").load_file(os.fsdecode(path))
    state = {key: value for key, value in tensors.items() if not key.startswith(_OPTIMIZER)}
    of_optimizer: dict[str, Any] = {"velocity": {}}
    for key, value in tensors.items():
        if key.startswith(_OPTIMIZER):
            name, dot, parameter = key.removeprefix(_OPTIMIZER).partition(".")
            if dot:
                of_optimizer.setdefault(name, {})[parameter] = value
            else:
                of_optimizer[name] = value
    if optimizer is not None and len(state) == len(tensors):
        raise ValueError(f"nn.load: {os.fsdecode(path)} holds no optimiser's state; load without optimizer, or save with it")
    changes = model._prepared(state)
    if optimizer is not None:
        optimizer._take(*optimizer._prepared(of_optimizer))
    for parameter, array in changes:
        put(parameter, array)


def metadata(path: FilePath) -> dict[str, str]:
    """The metadata that `save` was given for this file."""
    _safetensors("metadata")
    from safetensors import safe_open

    with safe_open(os.fsdecode(path), framework="numpy") as file:
        return dict(file.metadata() or {})


def _safetensors(caller: str) -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(f"nn.{caller}: safetensors is not installed; {how_to_install('files')}") from None
    return safetensors.numpy
