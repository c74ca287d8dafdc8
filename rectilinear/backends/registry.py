"""Which backend works: the names, what each says of itself, and the choice among them.

The choice serves NumPy arrays; other libraries' arrays bring their own backend (`rectilinear.dispatch`). Strongest first:
the context (`use_backend`), the process (`set_backend`), the variable ``RECTILINEAR_BACKEND``, ``auto``. This file is the
only one that knows of any of them, and `active` the only place that decides.
"""

from __future__ import annotations

import difflib
import importlib
import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from rectilinear.backends.contract import API_VERSION, Backend, Probe
from rectilinear.errors import BackendError

VARIABLE = "RECTILINEAR_BACKEND"
ENTRY_POINTS = "rectilinear.backends"

GENERIC = "generic"
AUTO = "auto"

_BUILT_IN = {
    "numpy": "rectilinear.backends.numpy_backend:NumpyBackend",
    GENERIC: "rectilinear.backends.generic:GenericBackend",
}
_AUTO_ORDER = ("numpy",)  # never the GPU unasked


@dataclass(frozen=True)
class BackendInfo:
    """One row of `list_backends`.

    Attributes
    ----------
    name : str
    usable : bool
    reason : str or None
        Why it is not usable and what to do about it; for the active backend of ``auto``, what was passed over and why.
    version : str or None
        Version of the library that does the work.
    device : str or None
    threads : int or None
        Number of threads it may use.
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
    backend: Backend | None
    probe: Probe


class _Choice(NamedTuple):
    backend: Backend
    chosen_by: str
    note: str | None = None


class _Override(NamedTuple):
    """A `use_backend` that is open: what it chose, in which thread, and the one around it."""

    choice: _Choice
    thread: int
    outer: _Override | None


# A ContextVar alone cannot be the process's choice, new threads would not see it; a global alone cannot be a context's.
_override: ContextVar[_Override | None] = ContextVar("rectilinear_backend", default=None)
_process: _Choice | None = None
_default: _Choice | None = None  # by variable or auto, kept from the first call that needed it

_registered: dict[str, Callable[[], Backend]] = {}
_loaded: dict[str, _Loaded] = {}
_lock = threading.RLock()


def _renew_lock() -> None:
    # A lock held by another thread at the moment of a fork would stay locked in the child for ever.
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


# ---------------------------------------------------------------- the names and what stands behind them


def register(name: str, factory: Callable[[], Backend]) -> None:
    """Add a backend under `name` (lower case); `factory` is called without arguments, once, when it is first needed.

    Installed plug-ins are found through the entry-point group and need not call this.
    """
    with _lock:
        if name in _BUILT_IN or name == AUTO:
            raise ValueError(f"register: {name!r} is the name of a built-in backend")
        _registered[name] = factory
        _loaded.pop(name, None)


def unregister(name: str) -> None:
    """Take back `register`."""
    with _lock:
        del _registered[name]
        _loaded.pop(name, None)


def _factories() -> dict[str, Callable[[], Backend]]:
    """Every known name, in the order in which tables show them: built-in, registered, plug-ins. The first of a name counts."""
    names: dict[str, Callable[[], Backend]] = {}
    for name, path in _BUILT_IN.items():
        names[name] = _importer(path)
    for name, factory in _registered.items():
        names.setdefault(name, factory)
    for name, factory in _plug_ins().items():
        names.setdefault(name, factory)
    return names


def _importer(path: str) -> Callable[[], Backend]:
    module, _, attribute = path.partition(":")
    return lambda: getattr(importlib.import_module(module), attribute)()


def _plug_ins() -> dict[str, Callable[[], Backend]]:
    from importlib.metadata import EntryPoint, entry_points  # about 10 ms, and only needed for names that are not built in

    def factory(point: EntryPoint) -> Callable[[], Backend]:
        return lambda: point.load()()

    return {point.name.lower(): factory(point) for point in entry_points(group=ENTRY_POINTS)}


def _known(name: str) -> Callable[[], Backend] | None:
    if name in _BUILT_IN:
        return _importer(_BUILT_IN[name])
    return _registered.get(name) or _plug_ins().get(name)


def _load(name: str, factory: Callable[[], Backend]) -> _Loaded:
    """The backend and its probe's answer, made once. What goes wrong in a plug-in becomes its reason."""
    loaded = _loaded.get(name)
    if loaded is not None:
        return loaded
    with _lock:
        if name not in _loaded:
            backend: Backend | None = None
            try:
                backend = factory()
                probe = backend.probe()
                if probe.usable and backend.api_version != API_VERSION:
                    probe = Probe(False, f"written for contract {backend.api_version}, this rectilinear has {API_VERSION}; update it")
            except Exception as error:  # a broken backend is one more reason in the table, not the end of the others
                probe = Probe(False, f"{type(error).__name__} while loading it: {error}")
            _loaded[name] = _Loaded(backend, probe)
        return _loaded[name]


def backend_named(name: str) -> Backend:
    """The backend of that exact name, whether or not it may be chosen; for dispatch by array type, and for tests."""
    factory = _known(name)
    loaded = _load(name, factory) if factory is not None else None
    if loaded is None or loaded.backend is None or not loaded.probe.usable:
        raise BackendError(_refusal(name, "rectilinear"))
    return loaded.backend


def serving(library: str) -> Backend:
    """The backend for arrays of another library than NumPy: one made for it, else the generic one."""
    return backend_named(library if library in _BUILT_IN else GENERIC)


# ---------------------------------------------------------------- the choice


def active() -> Backend:
    """The backend that serves NumPy arrays here and now."""
    return _choice().backend


def _choice() -> _Choice:
    override = _override.get()
    if override is not None and (override.thread == threading.get_ident() or not _inherited_by_thread(override)):
        return override.choice
    return _process or _default or _choose_default()


def _inherited_by_thread(override: _Override) -> bool:
    """Whether this thread has the override only because it was started inside of it.

    On free-threaded builds (``sys.flags.thread_inherit_context``) a new thread runs in a copy of its starter's context, which
    elsewhere it does not; a context handed over on purpose (a task, ``asyncio.to_thread``) is not the thread's own.
    """
    own = getattr(threading.current_thread(), "_context", None)
    return own is not None and own.get(_override) is override


def _choose_default() -> _Choice:
    global _default
    with _lock:
        if _default is None:
            asked = os.environ.get(VARIABLE, "").strip().lower()
            if asked and asked != AUTO:
                _default = _Choice(_chosen(asked, f"{VARIABLE}={os.environ[VARIABLE]!r}"), "variable")
            else:
                _default = _auto("variable" if asked else "auto")
        return _default


def _auto(chosen_by: str) -> _Choice:
    passed_over: list[str] = []
    for name in _AUTO_ORDER:
        backend, probe = _load(name, _importer(_BUILT_IN[name]))
        if backend is not None and probe.usable:
            return _Choice(backend, chosen_by, "; ".join(passed_over) or None)
        passed_over.append(f"auto passed over {name}: {probe.reason}")
    raise BackendError(_refusal(AUTO, "rectilinear"))


def _chosen(name: str, asker: str) -> Backend:
    """The backend of a name that somebody asked for, or the error that helps them on."""
    factory = _known(name) if name != GENERIC else None
    if factory is not None:
        backend, probe = _load(name, factory)
        if backend is not None and probe.usable:
            return backend
    raise BackendError(_refusal(name, asker))


def _pick(name: str, asker: str, chosen_by: str) -> _Choice:
    if not isinstance(name, str):
        raise TypeError(f"{asker}: name is a {type(name).__name__}; give the name of a backend, such as 'numpy'")
    name = name.strip().lower()
    return _auto(chosen_by) if name == AUTO else _Choice(_chosen(name, asker), chosen_by)


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
    global _process, _default
    choice = None if name is None else _pick(name, "set_backend", "process")
    with _lock:
        _process = choice
        if choice is None:
            _default = None


class use_backend:
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
        self._choice = _pick(name, "use_backend", "context")

    def __enter__(self) -> str:
        _override.set(_Override(self._choice, threading.get_ident(), _override.get()))
        return self._choice.backend.name

    def __exit__(self, *_: object) -> None:
        # The chain, and not a token kept on self, so that one object may be open in several threads and more than once.
        override = _override.get()
        if override is not None:
            _override.set(override.outer)


def get_backend() -> str:
    """Name of the backend that serves NumPy arrays in the calling context.

    Raises
    ------
    BackendError
        If the choice is the variable's and the variable names no usable backend.
    """
    return _choice().backend.name


# ---------------------------------------------------------------- the words


def list_backends() -> list[BackendInfo]:
    """Every backend: whether it is usable, why not, and which one is active and by what.

    Probes each one on the first call (the GPU's runs a small kernel). A bad ``RECTILINEAR_BACKEND`` does not raise here: no backend is
    active then.

    Returns
    -------
    list of BackendInfo
    """
    try:
        choice = _choice()
    except BackendError:
        choice = None
    infos = []
    for name, factory in _factories().items():
        backend, probe = _load(name, factory)
        is_active = choice is not None and backend is choice.backend
        infos.append(
            BackendInfo(
                name=name,
                usable=probe.usable,
                reason=choice.note if is_active and choice else probe.reason,
                version=probe.version,
                device=probe.device,
                threads=probe.threads,
                simd=probe.simd,
                active=is_active,
                chosen_by=choice.chosen_by if is_active and choice else None,
            )
        )
    return infos


def choice_error() -> str | None:
    """What is wrong with the choice in the calling context, if something is; for ``python -m rectilinear info``."""
    try:
        _choice()
    except BackendError as error:
        return str(error)
    return None


def _refusal(name: str, asker: str) -> str:
    factories = _factories()
    if name == GENERIC:
        what = "'generic' serves the arrays of other libraries by itself and is never chosen"
    elif name in factories:
        what = f"backend {name!r} is not usable here: {_load(name, factories[name]).probe.reason}"
    elif name == AUTO:
        what = "no backend is usable"
    else:
        near = difflib.get_close_matches(name, [AUTO, *(n for n in factories if n != GENERIC)], n=1)
        what = f"unknown backend {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
    rows = [(AUTO, f"usable: the first usable of {', '.join(_AUTO_ORDER)}")]
    for known, factory in factories.items():
        if known != GENERIC:
            probe = _load(known, factory).probe
            rows.append((known, "usable" if probe.usable else f"not usable: {probe.reason}"))
    width = max(len(known) for known, _ in rows)
    return "\n".join([f"{asker}: {what}. The backends are:", *(f"  {known:<{width}}  {words}" for known, words in rows)])


def _forget_everything() -> None:
    """Back to the state after import; for tests."""
    global _process, _default
    with _lock:
        _process = _default = None
        _loaded.clear()
        _override.set(None)
