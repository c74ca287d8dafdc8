"""JAX on a GPU: the passes of `jax_jit`, each one jitted function, launched and waited for by the batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rectilinear.measure.cases import Case
from rectilinear.measure.gpu import Waits
from rectilinear.measure.peers import jax_jit
from rectilinear.measure.subjects import Run

_NONE = f"this JAX ({jax.__version__}) has no GPU; pip install 'jax[cuda13]' where there is one."


def _device() -> Any:
    """The GPU that arrays go to by default.

    Raises
    ------
    ImportError
        There is none, or this JAX cannot use it.
    """
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # JAX's answers where it lacks the platform that JAX_PLATFORMS asks for
        raise ImportError(" ".join([_NONE, *str(error).splitlines()[:1]])) from None
    if device.platform != "gpu":
        raise ImportError(f"{_NONE} It runs on {device.platform}.")
    return device


_found = _device()


def build(case: Case, data: dict[str, Any]) -> Run:
    run = jax_jit.build(case, data, done=lambda made: made)
    return Run(run.call, run.results, Waits(_found.device_kind, jnp.asarray, np.asarray, jax.block_until_ready))
