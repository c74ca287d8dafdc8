"""CS231n's code on CuPy arrays: what one has on a GPU without this library."""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec
from typing import Any

from rectilinear.backends import cupy_loader
from rectilinear.measure.cases import Case
from rectilinear.measure.gpu import Events
from rectilinear.measure.subjects import Run

_backend = cupy_loader.make()
_found = _backend.probe()
if not _found.usable:
    raise ImportError(_found.reason)
_cp = _backend.runtime.cp


def on(xp: Any) -> Any:
    """The module `cs231n` once more, with `xp` as its ``np``, as if it had said ``import cupy as np``.

    NumPy's functions take CuPy arrays too, but each call would then go through NumPy first.
    """
    spec = find_spec("rectilinear.measure.peers.cs231n")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["np"] = xp
    return module


_layers = on(_cp)


def build(case: Case, data: dict[str, Any]) -> Run:
    run = _layers.build(case, {name: _cp.asarray(a) for name, a in data.items()})
    return Run(run.call, lambda value: tuple(_cp.asnumpy(a) for a in value), Events(_cp, _cp.asarray, _cp.asnumpy))
