"""asarray, to_numpy, synchronize, and what the backend says of itself."""

from __future__ import annotations

import numpy as np

import rectilinear as r
from rectilinear.backends import registry
from rectilinear.backends.contract import API_VERSION
from rectilinear.testing.lib import Lib


def test_asarray_and_back(lib: Lib) -> None:
    """An array of any library comes to the chosen backend, and any array to the host."""
    x = np.arange(6.0).reshape(2, 3)
    made = lib.array(x)
    r.synchronize(made)
    np.testing.assert_array_equal(r.to_numpy(made), x)
    got = r.asarray(made)
    assert isinstance(got, np.ndarray) == (registry.active().library == "numpy")
    np.testing.assert_array_equal(r.to_numpy(got), x)


def test_asarray_keeps_values_and_takes_a_dtype(plain_lib: Lib) -> None:
    assert r.to_numpy(r.asarray([[1, 2], [3, 4]])).tolist() == [[1, 2], [3, 4]]
    assert r.to_numpy(r.asarray([1, 2], dtype="float32")).dtype == np.float32
    backend = registry.active()
    assert backend.to_numpy(backend.asarray(np.array([1, 2]), np.dtype("float32"))).dtype == np.float32
    r.synchronize()


def test_what_it_says_of_itself(plain_lib: Lib) -> None:
    """A row of the table that a user can act on."""
    (info,) = (info for info in r.list_backends() if info.active)
    assert info.name == plain_lib.backend == r.get_backend()
    assert info.usable
    assert info.threads is None or info.threads >= 1
    backend = registry.active()
    assert backend.api_version == API_VERSION
    assert isinstance(backend.library, str)
    assert isinstance(backend.half, bool)
    assert backend.probe() == backend.probe()
