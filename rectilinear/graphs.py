"""`capture`: what a function does on CuPy arrays, recorded as a CUDA graph and replayed, which saves the host nearly all of its work.

A graph holds addresses. So each one keeps all that lies behind them: the copies of its arguments, a memory pool for what the function
makes, the scratch of products and kernels (`backends.cupy_scratch`), and the arrays that the function holds itself, such as parameters
(found by `rectilinear.reach`). Before a replay it is seen that those are still in their places. Here is no import of CuPy.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import MethodType
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from rectilinear.backends import cupy_scratch, registry
from rectilinear.backends.contract import Array
from rectilinear.backends.cupy_scratch import PER_THREAD, Scratch
from rectilinear.extras import how_to_install
from rectilinear.keepmask import KeepMask, unchecked
from rectilinear.reach import Held, arrays_in, edges_from, held

_MOST_SIGNATURES = 16  # kept for one function; each has memory of its own on the GPU
_ALIGNED = 16  # bytes that kernels and products move at a time
_PRODUCTS = f"with nvmath-python those of the layers can: {how_to_install('cuda13')} (or cuda12)"


def capture(function: Callable[..., Any], *, copies: bool = False) -> Callable[..., Any]:
    """A callable that does what `function` does: with CuPy arrays, from the second call on, by replaying a CUDA graph of it.

    The first call with arguments of a kind runs `function` as it is. The second records it, which computes nothing, and replays the
    record; later ones copy the arguments to where the record reads them, and replay it. So n calls have the effect of n calls, at a few
    microseconds of Python each. With arrays of other libraries it only calls `function`, so that a program is the same everywhere.

    Parameters
    ----------
    function : callable
        Takes and returns arrays, in tuples, lists and dicts if need be, and anything else. It has to do the same at every call with
        arguments of a kind: these have the same structure, array shapes, strides, dtypes and device, and equal values of all that is no
        array. A Python number is thus frozen; a change of it makes another record (the latest 16 are kept).
    copies : bool
        False: results are the record's own arrays, **overwritten by the next call**. True: fresh arrays at every call.

    Returns
    -------
    callable
        May be called from several threads and on any stream: it works on the current one. What a record holds on the GPU is given back
        with it.

    Raises
    ------
    TypeError
        `function` cannot be called; or, at a call, CuPy arrays come together with arrays of another library or with an object without
        a hash.
    RuntimeError
        While recording: the function reads a value (``.get()``, ``float``), waits, brings an array from the host, or needs what the first
        call did not prepare. Nothing is left behind, and the next call runs as it is.

    Notes
    -----
    - Python itself runs in the first two calls only: what it prints, counts or assigns to attributes does not happen later. What is to
      last from call to call has to be written in place (``w += ...``), as `nn.SGD` does.
    - The function works on the current stream: what it puts on streams of its own is not recorded.
    - Arrays that the function holds (globals, closures, attributes, layers) are used in place. One that is replaced by another is
      noticed where it is held in a dict, list, attribute, closure or global: the next call runs as it is, the one after records anew.
      Arrays that are written to, those in ``out=`` too, have to be held like this; arguments are copied, and never written to.
    - `nn`: a whole training step can be captured. Setting ``optimizer.lr``, ``momentum`` or ``weight_decay`` is heard by later
      calls. Return the gradients that you want to read.

    Examples
    --------
    >>> import numpy as np
    >>> import rectilinear
    >>> layer = rectilinear.capture(lambda x, w, b: rectilinear.affine_relu_forward(x, w, b)[0])
    >>> layer(np.array([[1.0, 2.0]]), np.eye(2), np.array([-1.5, 0.0]))  # NumPy arrays: an ordinary call
    array([[0., 2.]])
    """
    if not callable(function):
        raise TypeError(f"capture: function is of type {type(function).__name__}, which cannot be called; pass the function itself")
    return Captured(function, copies)


class Captured:
    """What `capture` returns."""

    def __init__(self, function: Callable[..., Any], copies: bool) -> None:
        functools.update_wrapper(self, function)
        self.__wrapped__ = function
        self._copies = copies
        self._seen: OrderedDict[Any, _First | _Graph] = OrderedDict()
        self._latest: _Graph | None = None
        self._without_arrays: Any = None  # signature of the latest call in which no CuPy array was met
        self._lock = threading.Lock()  # from the copies of the arguments to those of the results, other threads keep out

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self.__wrapped__
        if "cupy" not in sys.modules or cupy_scratch.is_recording():
            return function(*args, **kwargs)  # there can be no CuPy array, or this is a part of what is recorded
        given = _Arguments()
        for x in args:
            _look(x, given)
        if kwargs:
            _look(kwargs, given)
        signature = tuple(given.signature)
        if given.refused and given.arrays:
            raise TypeError(f"capture: {given.refused[0]}")
        if given.refused or not (given.arrays or signature in self._seen or self._holds_arrays(signature, given)):
            return function(*args, **kwargs)
        with self._lock:
            known = self._seen.get(signature)
            graph = known if isinstance(known, _Graph) else None
            if graph is not None and not graph.is_current():
                known = graph = None
            if known is not None:
                copying = None if graph is None else graph.to_copy(given)
                if graph is None or copying is None:
                    del self._seen[signature]  # should recording fail
                    graph = self._seen[signature] = _recorded(function, args, kwargs, given, known)
                    copying = graph.to_copy(given) or []
                elif graph is not self._latest:
                    self._seen.move_to_end(signature)
                self._latest = graph
                return graph.replay(copying, self._copies)
        result = function(*args, **kwargs)
        with self._lock:
            self._seen[signature] = _first(function, given)
            self._seen.move_to_end(signature)
            self._latest = None
            if len(self._seen) > _MOST_SIGNATURES:
                self._seen.popitem(last=False)
        return result

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method: the object is its first argument."""
        return self if instance is None else MethodType(self, instance)

    def _holds_arrays(self, signature: Any, given: _Arguments) -> bool:
        """Whether a function that is given no array holds CuPy's."""
        if signature == self._without_arrays:
            return False
        if arrays_in((self.__wrapped__, *given.objects), compat.is_cupy_array):
            return True
        self._without_arrays = signature
        return False

    def __reduce__(self) -> str | tuple[Any, ...]:
        """One that stands where its function's name leads, as a decorated one does, is that name; other copies begin without records."""
        name = getattr(self, "__qualname__", "")
        found: Any = sys.modules.get(self.__module__)
        for part in name.split("."):
            found = getattr(found, part, None)
        return name if found is self else (type(self), (self.__wrapped__, self._copies))

    def __repr__(self) -> str:
        return f"capture({self.__wrapped__!r}{', copies=True' if self._copies else ''})"


# ---------------------------------------------------------------- arguments


class _Arguments:
    """What there is in the arguments of a call."""

    __slots__ = ("arrays", "objects", "pointers", "refused", "signature")

    def __init__(self) -> None:
        self.signature: list[Any] = []
        """Equal for arguments that one record serves."""
        self.arrays: list[Array] = []
        self.pointers: list[int] = []  # of the arrays
        self.objects: list[Any] = []  # that may hold arrays themselves
        self.refused: list[str] = []  # what is not to come together with CuPy arrays


_array_types: set[type] = set()  # CuPy's, once met
_PLAIN = frozenset({int, bool, str, bytes, type(None)})


def _look(x: Any, given: _Arguments) -> None:
    kind = type(x)
    if kind in _array_types:
        at = x.data
        pointer = at.ptr
        given.arrays.append(x)
        given.pointers.append(pointer)
        given.signature += (kind, at.device_id, pointer % _ALIGNED, x.dtype, x.shape, x._c_contiguous or x.strides)
    elif kind in _PLAIN:
        given.signature += (kind, x)
    elif kind is float or kind is complex:
        given.signature += (kind, repr(x))  # 0.0 is equal to -0.0, and NaN not to itself
    elif kind is tuple or kind is list or (isinstance(x, tuple) and hasattr(x, "_fields")):
        given.signature += (kind, len(x))
        for each in x:
            _look(each, given)
    elif kind is dict:
        given.signature += (dict, len(x))
        for key, each in x.items():
            given.signature.append(key)
            _look(each, given)
    elif kind is KeepMask:
        given.signature += (KeepMask, x.shape)
        _look(x._bits, given)
    elif compat.is_cupy_array(x):
        _array_types.add(kind)
        _look(x, given)
    else:
        _look_closely(x, given)


def _look_closely(x: Any, given: _Arguments) -> None:
    kind = type(x)
    if isinstance(x, np.generic):
        given.signature += (kind, x.tobytes())
        return
    if compat.is_array_api_obj(x):
        given.refused.append(
            f"arrays of CuPy come together with {kind.__module__}.{kind.__name__}; bring all to the GPU, for example with cupy.asarray(x)"
        )
        return
    try:
        hash(x)
    except TypeError:
        given.refused.append(
            f"an argument is of type {kind.__name__}, which has no hash to tell it from another by; let the function hold it, or pass "
            "its arrays and numbers"
        )
        return
    given.objects.append(x)
    given.signature += (kind, x)


def _is_fixed(x: Any) -> bool:
    """Whether nobody can put other arrays in the place of those in x."""
    return all(map(_is_fixed, x)) if isinstance(x, tuple) else not isinstance(x, list | dict)


def _mapped(x: Any, each: Callable[[Array], Array]) -> Any:
    """x with `each` of its CuPy arrays, containers made anew."""
    kind = type(x)
    if kind is tuple or kind is list:
        return kind([_mapped(child, each) for child in x])
    if kind is dict:
        return {key: _mapped(child, each) for key, child in x.items()}
    if compat.is_cupy_array(x):
        return each(x)
    if kind is KeepMask:
        return unchecked(_mapped(x._bits, each), x.shape)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return kind(*[_mapped(child, each) for child in x])
    return x


class _Buffer(NamedTuple):
    """Where a record reads an argument."""

    array: Array
    pointer: int
    own: bool
    """Not the caller's array itself: others' values may be copied here."""

    def fill(self, given: Array) -> None:
        array, low, span = self.array, *_extent(given)
        if span == given.nbytes:  # the same layout without gaps: bytes, whatever their order
            (array.data + low).copy_from_device_async(given.data + low, span)
        else:
            array[...] = given


def _extent(x: Array) -> tuple[int, int]:
    """First byte of x counted from where its pointer points, and bytes from there to the end."""
    if x.flags.c_contiguous or not x.size:
        return 0, x.nbytes
    ends = [(extent - 1) * stride for extent, stride in zip(x.shape, x.strides, strict=True)]
    low = sum(end for end in ends if end < 0)
    return low, sum(end for end in ends if end > 0) - low + x.itemsize


def _like(x: Array, cp: Any) -> Array:
    """Fresh memory in x's layout, and as well aligned: products and kernels are chosen by that."""
    low, span = _extent(x)
    start = (x.data.ptr + low) % _ALIGNED
    memory = cp.empty((span + start,), np.uint8)
    return cp.ndarray(x.shape, x.dtype, memory.data + (start - low), x.strides)


# ---------------------------------------------------------------- recording


class _First(NamedTuple):
    """A kind of arguments that has been met once."""

    cp: Any
    device: int
    arrays: list[Array]
    """Kept until there is a record, so that no others come to lie where they are."""
    scratch: Scratch
    """Of the stream that the call was on."""


def _first(function: Callable[..., Any], given: _Arguments) -> _First:
    backend: Any = registry.serving("cupy")
    cp = backend.runtime.cp
    arrays = given.arrays or arrays_in((function, *given.objects), compat.is_cupy_array)
    device = arrays[0].data.device_id
    return _First(cp, device, given.arrays, backend.scratches.current(cp, device, cp.cuda.get_current_stream(device).ptr))


def _recorded(function: Callable[..., Any], args: Any, kwargs: Any, given: _Arguments, earlier: _First | _Graph) -> _Graph:
    """A graph of what the function does; nothing of it has been computed."""
    cp, device = earlier.cp, earlier.device
    roots = (function, *given.objects)
    before = edges_from(roots, compat.is_cupy_array)
    pool = _pool(cp)
    with _on_device(cp, device), cp.cuda.using_allocator(pool.malloc):
        buffers = [_buffer(cp, array, first) for array, first in zip(given.arrays, earlier.arrays, strict=True)]
        scratch = Scratch(cp)
        scratch.prepare(earlier.scratch)
        recorder = cp.cuda.Stream(non_blocking=True)  # a blocking one would have the null stream refuse work meanwhile
        replacements = iter(buffers)
        args, kwargs = _mapped((args, kwargs), lambda array: next(replacements).array)
        with recorder, cupy_scratch.recording(scratch), _explained():
            recorder.begin_capture()
            try:
                result = function(*args, **kwargs)
            except BaseException:
                with suppress(Exception):  # it may say once more what is being raised already
                    recorder.end_capture()
                raise
            graph = recorder.end_capture()
    kept = held(before, edges_from(roots, compat.is_cupy_array), compat.is_cupy_array)
    memory = _Memory(buffers, result, kept, scratch, pool)
    return _Graph(cp, device, graph, memory)


def _pool(cp: Any) -> Any:
    """A memory pool that never gives back what a record has used: where the GPU is full CuPy's would, in the midst of recording."""

    def allocate(size: int) -> Any:
        return cp.cuda.MemoryPointer(cp.cuda.Memory(size), 0)

    def allocate_after_others(size: int) -> Any:
        full = cp.cuda.runtime.CUDARuntimeError
        try:
            return allocate(size)
        except full:
            cp.get_default_memory_pool().free_all_blocks()
        try:
            return allocate(size)
        except full as error:  # another error than the one at which a pool frees what it can
            raise MemoryError(
                f"rectilinear.capture: the GPU has no {size} bytes left for a record; each kind of arguments has one, in memory of its own"
            ) from error

    return cp.cuda.MemoryPool(allocate_after_others)


def _buffer(cp: Any, given: Array, earlier: Array) -> _Buffer:
    """The very same memory as before is likely to come again, and is read where it is."""
    own = given.data.ptr != earlier.data.ptr
    array = _like(given, cp) if own else given
    return _Buffer(array, array.data.ptr, own)


@contextmanager
def _explained() -> Iterator[None]:
    """CuPy's and CUDA's refusals while a stream is captured, as an error that says what to do."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        if "captur" not in text.lower() or text.startswith("rectilinear.capture"):
            raise
        if "cublas" in text.lower():
            raise RuntimeError(
                f"rectilinear.capture: CuPy's own products cannot be recorded ({text}); {_PRODUCTS}; "
                "in place of cupy.matmul call rectilinear.affine_forward(x, w, None)"
            ) from error
        if isinstance(error, NotImplementedError):
            raise RuntimeError(f"rectilinear.capture: {text}; do this outside of the captured function") from error
        raise RuntimeError(
            f"rectilinear.capture: the function waits for the GPU or reads a value, which cannot be recorded ({text}); "
            "return the array, and read it (.get(), float(), rectilinear.to_numpy) outside of the captured function"
        ) from error


@contextmanager
def _on_device(cp: Any, device: int) -> Iterator[None]:
    if cp.cuda.runtime.getDevice() == device:
        yield
    else:
        with cp.cuda.Device(device):
            yield


# ---------------------------------------------------------------- replaying


class _Memory(NamedTuple):
    """All that lies behind the addresses in a graph."""

    buffers: list[_Buffer]
    result: Any
    held: Held
    scratch: Scratch
    pool: Any


class _Graph:
    """A record that can be replayed."""

    def __init__(self, cp: Any, device: int, graph: Any, memory: _Memory) -> None:
        self.cp, self.device = cp, device
        self._graph = graph  # given back before its memory
        self._memory = memory
        self.scratch = memory.scratch
        self.arrays = [buffer.array for buffer in memory.buffers]
        self._cuda, self._buffers, self._settings = cp.cuda, memory.buffers, memory.scratch.settings
        self._pointers = [buffer.pointer for buffer in memory.buffers]
        self._fixed = _is_fixed(memory.result)
        self._stream: Any = None  # of the latest replay
        self._done: Any = None  # event after it, where one was needed

    def is_current(self) -> bool:
        """Whether a replay would still do what the function does."""
        if not self._memory.held.in_place():
            return False
        return not self._settings or all(setting.fits() for setting in self._settings)

    def to_copy(self, given: _Arguments) -> list[tuple[_Buffer, Array]] | None:
        """Arrays that are not where the record reads them, and where to; None if one of those is the caller's."""
        copying: list[tuple[_Buffer, Array]] = []
        if given.pointers == self._pointers:
            return copying
        for buffer, array, pointer in zip(self._buffers, given.arrays, given.pointers, strict=True):
            if pointer != buffer.pointer:
                if not buffer.own:
                    return None
                copying.append((buffer, array))
        return copying

    def replay(self, copying: list[tuple[_Buffer, Array]], copies: bool) -> Any:
        cuda = self._cuda
        if cuda.runtime.getDevice() != self.device:
            with cuda.Device(self.device):
                return self.replay(copying, copies)
        stream = cuda.get_current_stream()
        if stream is not self._stream or stream.ptr == PER_THREAD:
            self._wait_for_the_latest(stream)
        for setting in self._settings:
            setting.refresh()
        for buffer, array in copying:
            buffer.fill(array)
        self._graph.launch(stream)
        result = self._memory.result
        if copies or not self._fixed:
            result = _mapped(result, _copy if copies else _itself)
        if stream.ptr == PER_THREAD:  # another stream in another thread, which could not record an event on this one
            self._done = cuda.Event(disable_timing=True)
            self._done.record(stream)
        return result

    def _wait_for_the_latest(self, stream: Any) -> None:
        """Have the stream wait for the latest replay, on another one: it reads the buffers that are to be filled now."""
        if self._stream is not None and self._stream.ptr != PER_THREAD:
            self._done = self._stream.record(self._cuda.Event(disable_timing=True))
        if self._done is not None:
            stream.wait_event(self._done)
        self._stream = stream


def _copy(x: Array) -> Array:
    return x.copy("K")


def _itself(x: Array) -> Array:
    return x
