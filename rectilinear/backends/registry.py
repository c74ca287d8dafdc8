"""Which backend works: the names, what each says of itself, and the choice among them.

The choice serves NumPy arrays; other libraries' arrays bring their own backend (`rectilinear.dispatch`). Strongest first:
the context (`use_backend`), the process (`set_backend`), the variable ``RECTILINEAR_BACKEND``, ``auto``. This file is the
only one that knows of any of them, and `active` the only place that decides.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from rectilinear.backends.contract import API_VERSION, Backend, Probe
from rectilinear.choice import Block, Choice
from rectilinear.errors import BackendError

VARIABLE = "RECTILINEAR_BACKEND"
ENTRY_POINTS = "rectilinear.backends"

Factory: TypeAlias = Callable[[], Backend]

GENERIC = "generic"
AUTO = "auto"

_BUILT_IN = {
    "numba": "rectilinear.backends.numba_backend:NumbaBackend",
    "numpy": "rectilinear.backends.numpy_backend:NumpyBackend",
    "cupy": "rectilinear.backends.cupy_loader:make",
    GENERIC: "rectilinear.backends.generic:GenericBackend",
}
_AUTO_ORDER = ("numba", "numpy")  # never the GPU unasked


@dataclass(frozen=True)
class BackendInfo:
    """One row of `list_backends`.

    Attributes
    ----------
    name : str
    usable : bool
    reason : str or None
        Why it is not usable and what to do about it. For a usable one what it has to do without, or what is wrong with the choice of
        threads; for the active backend of ``auto``, what was passed over and why.
    version : str or None
        Version of the library that does the work.
    device : str or None
    threads : int or None
        Number of threads that a call made here and now may use.
    simd : str or None
        Instruction set or BLAS kernel of its products.
    active : bool
        Whether it serves NumPy arrays in the calling context.
    chosen_by : str or None
        ``"context"``, ``"process"``, ``"variable"`` or ``"auto"``, for the active one.
    """

    name: str
    usable: bool
    reason: str | None = None
    version: str | None = None
    device: str | None = None
    threads: int | None = None
    simd: str | None = None
    active: bool = False
    chosen_by: str | None = None


class _Loaded(NamedTuple):
    backend: Backend | None  # none where it cannot work
    probe: Probe


class _Chosen(NamedTuple):
    name: str
    backend: Backend
    chosen_by: str
    note: str | None = None


_log = logging.getLogger(__name__)

_registered: dict[str, Factory] = globals().get("_registered", {})
_loaded: dict[str, _Loaded] = globals().get("_loaded", {})
# Held for assignments only, never while foreign code runs: an import that needs a backend would wait for whoever imports it.
_lock = threading.RLock()


def _renew_lock() -> None:
    # A lock held by another thread at the moment of a fork would stay locked in the child for ever.
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


# ---------------------------------------------------------------- the names and what stands behind them


def register(name: str, factory: Factory) -> None:
    """Add a backend under `name`; `factory` is called without arguments when it is first needed.

    Installed plug-ins are found through the entry-point group and need not call this.
    """
    name = name.strip().lower()
    if name in _BUILT_IN or name == AUTO:
        raise ValueError(f"register: {name!r} is the name of a built-in backend")
    with _lock:
        _registered[name] = factory
        _loaded.pop(name, None)


def unregister(name: str) -> None:
    """Take back `register`."""
    with _lock:
        del _registered[name]
        _loaded.pop(name, None)


def _factories() -> dict[str, Factory]:
    """Every known name, in the order in which tables show them. Nobody takes a name from one before: built-in, registered, plug-in."""
    built_in = {name: _importer(path) for name, path in _BUILT_IN.items()}
    return built_in | _registered | _plug_ins() | _registered | built_in  # keys stay where they came first, the last value counts


def _importer(path: str) -> Factory:
    module, _, attribute = path.partition(":")
    return lambda: getattr(importlib.import_module(module), attribute)()


@functools.cache  # a scan of everything installed, 3 ms
def _plug_ins() -> dict[str, Factory]:
    from importlib.metadata import EntryPoint, entry_points

    def factory(point: EntryPoint) -> Factory:
        return lambda: point.load()()

    found: dict[str, Factory] = {}
    for point in entry_points(group=ENTRY_POINTS):
        name = point.name.strip().lower()
        if name != AUTO:
            found.setdefault(name, factory(point))
    return found


def _load(name: str) -> _Loaded | None:
    """The backend of that name and its probe's answer, made once; None for an unknown name. What goes wrong becomes the reason."""
    loaded = _loaded.get(name)
    if loaded is None:
        # Names that are built in are looked up without asking for what is installed.
        factory = _importer(_BUILT_IN[name]) if name in _BUILT_IN else _registered.get(name) or _plug_ins().get(name)
        if factory is None:
            return None
        made = _make(factory)
        _log.debug(
            "backend %s is %s%s", name, "usable" if made.backend else "not usable", f": {made.probe.reason}" if made.probe.reason else ""
        )
        with _lock:
            loaded = _loaded.setdefault(name, made)
    return loaded


def _make(factory: Factory) -> _Loaded:
    try:
        backend = factory()
        probe = backend.probe()
    except (Exception, SystemExit) as error:  # a broken backend is one more reason in the table, not the end of the others
        first_line = str(error).partition("\n")[0]
        return _Loaded(None, Probe(False, f"{type(error).__name__} while loading it: {first_line}"))
    if probe.usable and backend.api_version != API_VERSION:
        older = "it" if backend.api_version < API_VERSION else "rectilinear"
        reason = f"written for contract {backend.api_version}, this rectilinear has {API_VERSION}; update {older}"
        probe = replace(probe, usable=False, reason=reason)
    if not probe.usable and not probe.reason:
        probe = replace(probe, reason="it gives no reason")
    return _Loaded(backend if probe.usable else None, probe)


def serving(library: str) -> Backend:
    """The backend for arrays of another library than NumPy: the built-in one made for it, else the generic one."""
    name = library if library in _BUILT_IN else GENERIC
    loaded = _loaded.get(name) or _load(name)
    if loaded is None or loaded.backend is None:
        raise BackendError(_refusal(name, "rectilinear"))
    return loaded.backend


# ---------------------------------------------------------------- the choice


def active() -> Backend:
    """The backend that serves NumPy arrays here and now."""
    chosen = _choice.settled
    if chosen is None or _choice.ever_open:
        chosen = _choice.current()
    return chosen.backend


def _by_variable() -> _Chosen:
    asked = os.environ.get(VARIABLE, "").strip().lower()
    if asked and asked != AUTO:
        return _pick(asked, f"{VARIABLE}={os.environ[VARIABLE]!r}", "variable")
    return _auto("variable" if asked else "auto")


# importlib.reload, and IPython's autoreload, keep what was chosen and registered.
_choice: Choice[_Chosen] = globals().get("_choice") or Choice("backend", _by_variable)


def _auto(chosen_by: str) -> _Chosen:
    passed_over: list[str] = []
    for name in _AUTO_ORDER:
        loaded = _load(name)
        if loaded is not None and loaded.backend is not None:
            return _said(_Chosen(name, loaded.backend, chosen_by, "; ".join(passed_over) or None))
        passed_over.append(f"auto passed over {name}: {loaded.probe.reason if loaded else 'unknown'}")
    raise BackendError(_refusal(AUTO, "rectilinear"))


def _pick(name: str, asker: str, chosen_by: str) -> _Chosen:
    """The choice of a name that somebody asked for, or the error that helps them on."""
    if not isinstance(name, str):
        raise TypeError(f"{asker}: name is a {type(name).__name__}; give the name of a backend, such as 'numpy'")
    name = name.strip().lower()
    if name == AUTO:
        return _auto(chosen_by)
    loaded = _load(name) if name != GENERIC else None
    if loaded is None or loaded.backend is None:
        raise BackendError(_refusal(name, asker))
    return _said(_Chosen(name, loaded.backend, chosen_by))


def _said(chosen: _Chosen) -> _Chosen:
    _log.debug("NumPy arrays go to backend %s, chosen by %s%s", chosen.name, chosen.chosen_by, f"; {chosen.note}" if chosen.note else "")
    return chosen


def set_backend(name: str | None) -> None:
    """Choose the backend of this process, for every thread that is in no `use_backend`.

    Parameters
    ----------
    name : str or None
        A name out of `list_backends`, or ``"auto"``; case and blanks around it do not matter. None drops the process's choice:
        the next call that needs one reads ``RECTILINEAR_BACKEND`` anew.

    Raises
    ------
    BackendError
        At once, if the name is unknown or the backend cannot work here. The choice is then what it was.

    Examples
    --------
    >>> import rectilinear
    >>> rectilinear.set_backend("numpy")
    >>> rectilinear.get_backend()
    'numpy'
    >>> rectilinear.set_backend(None)
    """
    _choice.choose(None if name is None else _pick(name, "set_backend", "process"))


class use_backend(Block[_Chosen]):
    """Choose the backend for a ``with`` block, in this thread or task and the tasks started from it.

    Tasks and ``asyncio.to_thread`` inherit the choice, new threads do not. Leaving the block restores what was before.

    Parameters
    ----------
    name : str
        As in `set_backend`.

    Raises
    ------
    BackendError
        At once (not at ``with``), if the name is unknown or the backend cannot work here.

    Examples
    --------
    >>> import rectilinear
    >>> with rectilinear.use_backend("numpy"):
    ...     rectilinear.get_backend()
    'numpy'
    """

    def __init__(self, name: str) -> None:
        super().__init__(_choice, _pick(name, "use_backend", "context"))

    def __enter__(self) -> str:
        super().__enter__()
        return self._value.name


def get_backend() -> str:
    """Name of the backend that serves NumPy arrays in the calling context.

    Raises
    ------
    BackendError
        If the choice is the variable's and the variable names no usable backend.
    """
    return _choice.current().name


# ---------------------------------------------------------------- the words


def list_backends() -> list[BackendInfo]:
    """Every backend: whether it is usable, why not, and which one is active and by what.

    Probes each one on the first call (the GPU's runs a small kernel). A bad ``RECTILINEAR_BACKEND`` does not raise here: no backend is
    active then. Nor does a bad ``RECTILINEAR_NUM_THREADS``: the number of threads is None then, and `reason` says why.

    Returns
    -------
    list of BackendInfo
    """
    try:
        choice = _choice.current()
    except BackendError:
        choice = None
    infos = []
    for name in _factories():
        loaded = _load(name)
        if loaded is None:  # unregistered meanwhile
            continue
        probe, is_active = loaded.probe, choice is not None and name == choice.name
        notes = [choice.note if is_active and choice else None, probe.reason]
        try:
            threads = _threads(loaded)
        except ValueError as error:  # a bad variable
            threads = None
            notes.append(str(error))
        infos.append(
            BackendInfo(
                name=name,
                usable=probe.usable,
                reason="; ".join(filter(None, notes)) or None,
                version=probe.version,
                device=probe.device,
                threads=threads,
                simd=probe.simd,
                active=is_active,
                chosen_by=choice.chosen_by if is_active and choice else None,
            )
        )
    return infos


def _threads(loaded: _Loaded) -> int | None:
    now = getattr(loaded.backend, "threads", None)
    return now() if callable(now) else loaded.probe.threads


def choice_error() -> str | None:
    """What is wrong with the choice in the calling context, if something is; for ``python -m rectilinear info``."""
    try:
        _choice.current()
    except BackendError as error:
        return str(error)
    return None


def _refusal(name: str, asker: str) -> str:
    states = {known: loaded.probe for known in _factories() if (loaded := _load(known)) is not None}
    if name == GENERIC:
        what = "'generic' serves the arrays of other libraries by itself and is never chosen"
    elif name in states:
        what = f"backend {name!r} is not usable here: {states[name].reason}"
    elif name == AUTO:
        what = "no backend is usable"
    else:
        near = difflib.get_close_matches(name, [AUTO, *(known for known in states if known != GENERIC)], n=1)
        what = f"unknown backend {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
    rows = [(AUTO, f"usable: the first usable of {', '.join(_AUTO_ORDER)}")]
    for known, probe in states.items():
        if known != GENERIC:
            rows.append((known, "usable" if probe.usable else f"not usable: {probe.reason}"))
    width = max(len(known) for known, _ in rows)
    return "\n".join([f"{asker}: {what}. The backends are:", *(f"  {known:<{width}}  {words}" for known, words in rows)])
