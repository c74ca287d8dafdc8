"""What pyproject.toml calls extras, as messages name them: the parts that need more than NumPy and array-api-compat."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

Extra = Literal["numba", "cuda12", "cuda13", "dask", "files", "bench", "testing"]


def how_to_install(extra: Extra) -> str:
    """What to type for an extra, where the package is installed and where a checkout is used as it is.

    The first command needs no package index that knows the name: pip sees that rectilinear is there and installs what the extra adds.

    >>> how_to_install("numba")
    "pip install 'rectilinear[numba]', or '.[numba]' in a checkout"
    """
    return f"pip install 'rectilinear[{extra}]', or '.[{extra}]' in a checkout"


def lacks(module: str, extra: Extra) -> str | None:
    """That a module is not installed, and what brings it; None if it is there."""
    return None if find_spec(module) else f"{module} is not installed; {how_to_install(extra)}"
