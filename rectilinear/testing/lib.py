"""What is put to the test: the arrays of one library, under one backend. `libs_for` gives them for the name of a backend."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import array_api_compat as compat
import numpy as np

import rectilinear
from rectilinear.backends import registry
from rectilinear.backends.contract import Backend
from rectilinear.dispatch import library_name
from rectilinear.errors import BackendError

STRICT = "array_api_strict"


@dataclass(frozen=True)
class Lib:
    """One way to run the layers: which arrays, under which chosen backend.

    Attributes
    ----------
    name : str
        As tests and reports show it.
    array : callable
        Makes an array of this library, a copy, of a NumPy array.
    backend : str
        The backend that is chosen meanwhile. It serves NumPy arrays; another library's are served by their own.
    library : str
        Import name of the arrays' library.
    readonly_inputs : bool
        `array` makes arrays that cannot be written to, so that a backend which writes into an argument raises.
    installed : bool
        A new process knows the backend by that name too.

    Examples
    --------
    >>> lib = Lib("numpy", numpy_copy)
    >>> lib.writable, lib.views, lib.flushes
    (True, True, False)
    """

    name: str
    array: Callable[[Any], Any]
    backend: str = "numpy"
    library: str = "numpy"
    readonly_inputs: bool = False
    installed: bool = True

    def __str__(self) -> str:
        return self.name

    def numpy(self, x: Any) -> np.ndarray:
        """x on the host; lazy arrays are computed."""
        return np.asarray(rectilinear.to_numpy(x))

    def owns(self, x: Any) -> bool:
        """Whether x is an array of this library."""
        return library_name(x) == self.library

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A writable array full of a value that no test expects."""
        made = self.array(np.full(shape, 77, dtype))
        if self.readonly_inputs:
            made.setflags(write=True)
        return made

    # What a library is capable of is tried, so that no list of libraries has to be kept.

    @property
    def on_numpy(self) -> bool:
        return self.library == "numpy"

    @cached_property
    def writable(self) -> bool:
        """Whether arrays of this library can be written to at all, so that ``out`` makes sense."""
        try:
            self.empty((1,), "float64")[...] = 1
        except TypeError:
            return False
        return True

    @cached_property
    def views(self) -> bool:
        """Whether slices are views, so that arrays have layouts, and share memory."""
        if not self.writable:
            return False
        whole = self.empty((4,), "float64")
        part = whole[1:]
        whole[...] = 1
        return bool((self.numpy(part) == 1).all())

    @cached_property
    def lazy(self) -> bool:
        """Whether values are computed when somebody asks for them, and not before."""
        return bool(compat.is_lazy_array(self.array(np.zeros(1))))

    @cached_property
    def flushes(self) -> bool:
        """Whether the library takes subnormals for 0."""
        return not bool(self.numpy(self.array(np.array([-5e-324])) < 0)[0])

    @cached_property
    def heeds_errstate(self) -> bool:
        """Whether the library computes by NumPy, there and then, so that `numpy.errstate` has a say."""
        tiny = self.array(np.array([1e-300]))
        try:
            with np.errstate(under="raise"):
                tiny * tiny
        except FloatingPointError:
            return True
        return False

    @cached_property
    def default_float(self) -> str:
        """Dtype of the library's arrays of floats, where none is named."""
        xp = compat.array_namespace(self.array(np.zeros(1)))
        return self.numpy(xp.zeros(1)).dtype.name

    def has(self, dtype: str) -> bool:
        """Whether there are arrays of this dtype in the library."""
        try:
            return self.numpy(self.array(np.ones(1, dtype))).dtype == dtype
        except TypeError:
            return False


# ---------------------------------------------------------------- arrays


def numpy_copy(x: Any) -> np.ndarray:
    return np.array(x)


def numpy_readonly(x: Any) -> np.ndarray:
    """Catches whoever writes into an argument."""
    made = np.array(x)
    made.setflags(write=False)
    return made


def _jax(x: Any) -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax.numpy.asarray(np.array(x))


def _dask(x: Any) -> Any:
    import dask.array

    dask.config.set(scheduler="synchronous")
    return dask.array.from_array(np.array(x), chunks=-1)


def _cupy(x: Any) -> Any:
    with rectilinear.use_backend("cupy"):
        return rectilinear.asarray(np.array(x))


def _by_import(library: str, x: Any) -> Any:
    return importlib.import_module(library).asarray(np.array(x))


_MAKERS: dict[str, Callable[[Any], Any]] = {"numpy": numpy_copy, "jax": _jax, "dask": _dask, "cupy": _cupy}
"""Those that ``asarray`` of the library's own name does not serve."""


def library_lib(name: str, library: str) -> Lib:
    """A library's own arrays, under whatever backend serves them.

    Parameters
    ----------
    name : str
    library : str
        Import name. Nothing is imported before an array is made.

    Examples
    --------
    >>> library_lib("strict", "array_api_strict").array([1.0, 2.0])
    Array([1., 2.], dtype=array_api_strict.float64)
    """
    return Lib(name, _MAKERS.get(library) or partial(_by_import, library), library=library)


def numpy_libs(backend: str, *, name: str | None = None, installed: bool = True) -> tuple[Lib, Lib]:
    """NumPy arrays under a chosen backend, and such that cannot be written to."""
    name = name or backend
    return (
        Lib(name, numpy_copy, backend, installed=installed),
        Lib(f"{name}-readonly", numpy_readonly, backend, readonly_inputs=True, installed=installed),
    )


def libs_for(name: str, library: str | None = None) -> tuple[Lib, ...]:
    """What the backend of that name is tried on.

    Parameters
    ----------
    name : str
        A backend out of `rectilinear.list_backends`, ``"generic"`` included.
    library : str, optional
        Import name of the library whose arrays are taken. Default: NumPy arrays, which a chosen backend serves, and, where the backend
        computes in another library, that one's too; for ``"generic"``, array_api_strict.

    Returns
    -------
    tuple of Lib

    Raises
    ------
    BackendError
        The name is unknown, the backend is not usable here, or another one serves the arrays of `library`.
    ImportError
        `library` is not installed.

    Examples
    --------
    >>> [lib.name for lib in libs_for("numpy")]
    ['numpy', 'numpy-readonly']
    >>> [lib.name for lib in libs_for("generic")]
    ['generic on array_api_strict']
    """
    name = name.strip().lower()
    if name in registry.NEVER_CHOSEN:
        return (_served(name, library or (STRICT if name == registry.GENERIC else name), None),)
    with rectilinear.use_backend(name) as name:
        backend = registry.active()
    libs: list[Lib] = []
    if library in (None, "numpy"):
        libs += numpy_libs(name, installed=name not in registry._registered)
    own = backend.library
    if library not in (None, "numpy", own):
        raise BackendError(f"{name} computes in {own}: it serves NumPy arrays where it is chosen, and no {library} arrays")
    if library == own != "numpy" or (library is None and own != "numpy" and registry.serving(own) is backend):
        libs.append(_served(name, own, backend))
    return tuple(libs)


def _served(name: str, library: str, backend: Backend | None) -> Lib:
    """Arrays of that library, if the backend serves them; None stands for one that is never chosen, by its name."""
    importlib.import_module(library)
    serving = registry.serving(library)
    if library == "numpy" or (serving.name != name if backend is None else serving is not backend):
        by = "the chosen backend" if library == "numpy" else f"backend {serving.name!r}"
        raise BackendError(f"{library} arrays are served by {by} here, not by {name!r}")
    lib = library_lib(f"{name} on {library}", library)
    if backend is None or library in _MAKERS:
        return lib
    return Lib(lib.name, lambda x: backend.asarray(np.array(x)), library=library)


def version_of(library: str) -> str:
    """Version of an imported library, as it says itself."""
    return str(getattr(sys.modules.get(library), "__version__", ""))
