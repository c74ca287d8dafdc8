"""Which backend works: the names, what each says of itself, and the choice among them.

The choice serves NumPy arrays; other libraries' arrays bring their own backend (`rectilinear.dispatch`). Strongest first:
the context (`use_backend`), the process (`set_backend`), the variable ``RECTILINEAR_BACKEND``, ``auto``. This file is the
only one that knows of any of them, and `active` the only place that decides.

Plug-ins are found by two groups of entry points, ``rectilinear.backends`` (name -> class) and ``rectilinear.libraries`` (import name of
a library -> name of the backend that serves its arrays). Both are read as text; a plug-in is imported when it is first needed.
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
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from rectilinear.backends.contract import API_VERSION, Backend, Probe
from rectilinear.choice import Block, Choice
from rectilinear.errors import BackendError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

VARIABLE = "RECTILINEAR_BACKEND"
ENTRY_POINTS = "rectilinear.backends"
LIBRARIES = "rectilinear.libraries"

Factory: TypeAlias = Callable[[], Backend]

GENERIC = "generic"
AUTO = "auto"

_BUILT_IN = {
    "numba": "rectilinear.backends.numba_backend:NumbaBackend",
    "numpy": "rectilinear.backends.numpy_backend:NumpyBackend",
    "cupy": "rectilinear.backends.cupy_loader:make",
    "dask": "rectilinear.backends.dask_backend:DaskBackend",
    GENERIC: "rectilinear.backends.generic:GenericBackend",
}
_AUTO_ORDER = ("numba", "numpy")  # never the GPU unasked
_SERVERS = {"cupy": "cupy", "dask": "dask"}
"""Import name of a library -> the built-in backend that serves its arrays."""
NEVER_CHOSEN = {GENERIC: "the arrays of other libraries", "dask": "dask arrays"}
"""Name of a backend that is no choice for NumPy's arrays -> what it serves by itself."""
_PRIMITIVES = tuple(name for name, value in vars(Backend).items() if callable(value) and not name.startswith("_"))


@dataclass(frozen=True)
class BackendInfo:
    """One row of `list_backends`.

    Attributes
    ----------
    name : str
    usable : bool
    reason : str or None
        Why it is not usable and what to do about it. For a usable one what it has to do without, or what is wrong with the choice of
        threads; for the active backend of ``auto``, what was passed over and why; for a plug-in, which library's arrays it serves.
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


class _PlugIns(NamedTuple):
    """What installed distributions say of themselves."""

    points: dict[str, list[EntryPoint]]
    """Name of a backend -> who offers it; the first one is meant."""
    claims: dict[str, list[str]]
    """Import name of a library -> names of the backends that claim its arrays."""
    unread: str | None
    """Why none of it could be read."""
    servers: dict[str, str]
    """Import name of a library -> name of the backend that serves it, once it has been asked for."""


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
    if not name:
        raise ValueError("register: name is empty; give the backend one")
    if name in _BUILT_IN or name == AUTO:
        raise ValueError(f"register: {name!r} is the name of a built-in backend")
    with _lock:
        _registered[name] = factory
        _loaded.pop(name, None)
    _plug_ins.cache_clear()  # a claim may be by this name


def unregister(name: str) -> None:
    """Take back `register`. KeyError where nothing is registered under this name."""
    name = name.strip().lower()
    with _lock:
        if name not in _registered:
            raise KeyError(f"unregister: no backend is registered as {name!r}; registered are: {', '.join(_registered) or 'none'}")
        del _registered[name]
        _loaded.pop(name, None)
    _plug_ins.cache_clear()


def _factories() -> dict[str, Factory]:
    """Every known name, in the order in which tables show them. Nobody takes a name from one before: built-in, registered, plug-in."""
    built_in = {name: _importer(path) for name, path in _BUILT_IN.items()}
    plug_ins = {name: _loader(points[0]) for name, points in _plug_ins().points.items()}
    return built_in | _registered | plug_ins | _registered | built_in  # keys stay where they came first, the last value counts


def _importer(path: str) -> Factory:
    module, _, attribute = path.partition(":")
    return lambda: getattr(importlib.import_module(module), attribute)()


def _loader(point: EntryPoint) -> Factory:
    return lambda: point.load()()


@functools.cache  # a scan of everything installed, 3 ms each
def _plug_ins() -> _PlugIns:
    from importlib.metadata import entry_points

    found = _PlugIns({}, {}, None, {})
    try:
        backends, libraries = entry_points(group=ENTRY_POINTS), entry_points(group=LIBRARIES)
    except Exception as error:  # whoever wrote metadata that cannot be read: NumPy's arrays, torch's and so on are served all the same
        return found._replace(unread=f"plug-ins were not looked for: {type(error).__name__} in the metadata of what is installed: {error}")
    for point in backends:
        name = point.name.strip().lower()
        if name != AUTO:
            found.points.setdefault(name, []).append(point)
    for point in libraries:
        names = found.claims.setdefault(point.name.strip(), [])
        name = point.value.strip().lower()
        if name not in names:
            names.append(name)
    return found


def _load(name: str) -> _Loaded | None:
    """The backend of that name and its probe's answer, made once; None for an unknown name. What goes wrong becomes the reason."""
    loaded = _loaded.get(name)
    if loaded is None:
        # Names that are built in are looked up without asking for what is installed.
        factory = _importer(_BUILT_IN[name]) if name in _BUILT_IN else _registered.get(name)
        if factory is None:
            points = _plug_ins().points.get(name)
            if points is None:
                return None
            factory = _loader(points[0])
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
        probe = _probe(backend)
    except (Exception, SystemExit) as error:  # a broken backend is one more reason in the table, not the end of the others
        first_line = str(error).partition("\n")[0]
        return _Loaded(None, Probe(False, f"{type(error).__name__} while loading it: {first_line}"))
    return _Loaded(backend if probe.usable else None, probe)


def _probe(backend: Backend) -> Probe:
    """The backend's own answer, where it is one that this version can work with at all."""
    if backend.api_version != API_VERSION:
        older = "it" if backend.api_version < API_VERSION else "rectilinear"
        return Probe(False, f"written for contract {backend.api_version}, this rectilinear has {API_VERSION}; update {older}")
    lacks = [name for name in _PRIMITIVES if not callable(getattr(backend, name, None))]
    lacks += [name for name, kind in (("library", str), ("half", bool)) if not isinstance(getattr(backend, name, None), kind)]
    if lacks:
        return Probe(False, f"it lacks {', '.join(lacks)}, which rectilinear.backends.contract asks of a backend; update it")
    probe = backend.probe()
    return probe if probe.usable or probe.reason else replace(probe, reason="it gives no reason")


# ---------------------------------------------------------------- the arrays of other libraries than NumPy


def serving(library: str) -> Backend:
    """The backend for arrays of this library, other than NumPy: the built-in one made for it, a plug-in that claims it, or the generic."""
    name = _SERVERS.get(library) or _plug_ins().servers.get(library) or _find_server(library)
    loaded = _loaded.get(name) or _load(name)
    if loaded is None or loaded.backend is None:
        raise BackendError(_refusal(name, "rectilinear"))
    return loaded.backend


def _find_server(library: str) -> str:
    plug_ins = _plug_ins()
    name = next((name for name in plug_ins.claims.get(library, ()) if _claim(library, name)[0]), GENERIC)
    plug_ins.servers[library] = name
    return name


def _claim(library: str, name: str) -> tuple[bool, str]:
    """Whether the backend of that name, which claims the arrays of this library, serves them; in words, too. Imports it if need be."""
    claims, generic = f"claims the arrays of {library}", f"the {GENERIC} backend serves them"
    if library == "numpy":
        return False, f"{claims}, which the chosen backend serves"
    if library in _SERVERS:
        return False, f"{claims}, which the built-in backend {_SERVERS[library]} serves"
    others = [other for other in _plug_ins().claims[library] if other != name]
    if others:
        return False, f"{claims}, and so does {' and '.join(others)}: {generic} until only one is installed"
    loaded = _load(name)
    if loaded is None:
        return False, f"{claims}, but no backend of this name is installed: {generic}"
    if loaded.backend is None:
        return False, f"{claims}: {generic}"
    if loaded.backend.library != library:
        return False, f"{claims}, but computes in {loaded.backend.library}: {generic}"
    return True, f"serves the arrays of {library}"


def _plug_in_notes() -> dict[str, list[str]]:
    """Name of a backend -> what is to be said about how plug-ins name and claim it. Some of the names may be no backend's."""
    plug_ins = _plug_ins()
    notes: dict[str, list[str]] = {}
    for name, points in plug_ins.points.items():
        taken = name in _BUILT_IN or name in _registered
        unused = [f"{point.value} has this name too and is not used" for point in (points if taken else points[1:])]
        if unused:
            notes.setdefault(name, []).extend(unused)
    for library, names in plug_ins.claims.items():
        for name in names:
            notes.setdefault(name, []).append(_claim(library, name)[1])
    if plug_ins.unread:
        notes[GENERIC] = [plug_ins.unread]
    return notes


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
        raise TypeError(f"{asker}: name is {name!r:.100}; give the name of a backend, such as 'numpy'")
    name = name.strip().lower()
    if name == AUTO:
        return _auto(chosen_by)
    loaded = _load(name) if name not in NEVER_CHOSEN else None
    if loaded is None or loaded.backend is None:
        raise BackendError(_refusal(name, asker))
    return _said(_Chosen(name, loaded.backend, chosen_by))


def _said(chosen: _Chosen) -> _Chosen:
    _log.debug("NumPy arrays go to backend %s, chosen by %s%s", chosen.name, chosen.chosen_by, f"; {chosen.note}" if chosen.note else "")
    return chosen


def choice() -> _Chosen:
    """What is chosen here and now, and by whom."""
    return _choice.current()


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
    said = _plug_in_notes()
    for name in _factories() | said:
        loaded = _load(name)
        if loaded is None:  # claims a library, or unregistered meanwhile
            infos.extend([BackendInfo(name, False, "; ".join(said[name]))] if name in said else [])
            continue
        probe, is_active = loaded.probe, choice is not None and name == choice.name
        notes = [choice.note if is_active and choice else None, probe.reason, *said.get(name, ())]
        try:
            threads = _threads(loaded)
        except Exception as error:  # a bad variable; a plug-in's error
            threads = None
            notes.append(str(error) or type(error).__name__)
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
    if name in NEVER_CHOSEN:
        what = f"{name!r} serves {NEVER_CHOSEN[name]} by itself and is never chosen"
    elif name in states:
        what = f"backend {name!r} is not usable here: {states[name].reason}"
    elif name == AUTO:
        what = "no backend is usable"
    else:
        near = difflib.get_close_matches(name, [AUTO, *(known for known in states if known not in NEVER_CHOSEN)], n=1)
        what = f"unknown backend {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
    rows = [(AUTO, f"usable: the first usable of {', '.join(_AUTO_ORDER)}")]
    for known, probe in states.items():
        if known not in NEVER_CHOSEN:
            rows.append((known, "usable" if probe.usable else f"not usable: {probe.reason}"))
    width = max(len(known) for known, _ in rows)
    return "\n".join([f"{asker}: {what}. The backends are:", *(f"  {known:<{width}}  {words}" for known, words in rows)])
