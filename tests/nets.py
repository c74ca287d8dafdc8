"""What the tests of `rectilinear.nn` share."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from rectilinear.nn import Affine, AffineReLU, ReLU, Sequential

from .conftest import on_cupy

OTHER_LIBRARIES = [
    "array_api_strict",
    pytest.param("torch", marks=pytest.mark.libraries),
    pytest.param("jax.numpy", marks=pytest.mark.libraries),
    pytest.param("dask.array", marks=pytest.mark.libraries),
]
if on_cupy():
    OTHER_LIBRARIES = ["cupy"]


def namespace(name: str | None):
    """A library's namespace; None for the chosen backend's."""
    if name == "jax.numpy":  # which has float64 only when told
        importlib.import_module("jax").config.update("jax_enable_x64", True)
    return name and importlib.import_module(name)


def net_of(rng, xp=None, dtype="float32"):
    where = {"rng": rng, "xp": xp, "dtype": dtype}
    return Sequential(AffineReLU(6, 5, **where), Affine(5, 4, bias=False, **where), ReLU(), Affine(4, 3, **where))


def square_net(rng, xp=None, **where):
    """Two layers of one shape, which may be tied."""
    return Sequential(Affine(3, 3, rng=rng, xp=xp, **where), Affine(3, 3, rng=rng, xp=xp, **where))


def library(array) -> str:
    return type(array).__module__.partition(".")[0].removesuffix("lib")


def home_of(xp) -> str:
    return "numpy" if xp is None else xp.__name__.partition(".")[0]


def brought(xp, a: np.ndarray):
    """a in a library."""
    return a if xp is None else xp.asarray(a.copy())


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def layouts(w: np.ndarray) -> dict[str, np.ndarray]:
    """The values of w (square), each time in another layout."""
    wide = np.zeros((2 * len(w), 3 * len(w)), w.dtype)
    wide[1::2, ::3] = w
    raw = np.zeros(w.nbytes + 1, "u1")[1:].view(w.dtype).reshape(w.shape)
    raw[...] = w
    return {
        "c": w.copy(),
        "fortran": np.asfortranarray(w),
        "transposed": w.T.copy().T,
        "backwards": w[::-1].copy()[::-1],
        "both backwards": w[::-1, ::-1].copy()[::-1, ::-1],
        "gaps": wide[1::2, ::3],
        "unaligned": raw,
        "read-only": read_only(w),
    }


def unchanged(net):
    """Call it later: whether the parameters are the same objects with the same values, and the gradients are the same objects."""
    arrays = [(layer, name, array) for _, layer in net.leaves() for name, array in layer.params.items()]
    grads = [(layer, layer.grads) for _, layer in net.leaves()]
    values = net.state_dict()

    def check() -> bool:
        after = net.state_dict()
        return (
            all(layer.params[name] is array for layer, name, array in arrays)
            and all(layer.grads is held for layer, held in grads)
            and all(np.array_equal(after[key], values[key], equal_nan=True) for key in values)
        )

    return check
