"""What a backend is: the primitives that `rectilinear.layers` calls, and what each may rely on.

The rules, for every primitive:

1. Operands arrive checked: extents fit together, every array is of this backend's library and on one device,
   and all have the same dtype T. T is float32 or float64; a backend with ``half = True`` is given float16 and
   bfloat16 as well and then computes in float32 and rounds once, for the others the caller converts.
2. Operands may have any strides (Fortran order, negative, 0), any alignment, and be read-only. They are never
   written to, and never kept.
3. n, d, m and the number of groups may be 0 or 1. Sums over nothing are 0.
4. ``out`` is None (the backend allocates a fresh array of dtype T) or a writable array of exactly the result's
   shape and T, of any strides, that shares no memory with an operand. The primitive fills and returns it.
   Results share no memory with the operands or with one another. A backend for another library than NumPy and
   CuPy is given None always, and the caller copies, for only those two say where their arrays lie.
5. Stacked form: every operand has one more leading axis, the groups; the same primitive serves both.
6. One predicate, ``keep = not (z < 0)``: NaN, -0.0 and +inf are kept, -inf is not. Where keep is false the
   result is exactly 0, also when the other operand is NaN or inf.
7. Primitives may be called from many threads at once and must give the same bits for the same values, shape,
   dtype and strides, whatever the number of threads, as far as the arithmetic is the backend's own.
8. What is lazy stays lazy: nothing but `to_numpy` and `synchronize` waits for values. An extent may be unknown then
   (None or NaN, as the library has it), and whether unknown extents fit together has not been checked.
9. Results lie on the device of the operands. Underflow is no error, whatever the caller's `np.errstate`.
10. What a primitive raises reaches the caller as it is, but for arrays of unknown extent: there it becomes a ShapeError.

``keep`` in backward is what a forward of any backend for the same library has returned: the pre-activations z
(an array of dtype T), or a `KeepMask`. A backend reads both.

A backend is an instance of a class with these attributes and methods. Built-in ones are listed in `registry`; others are
plug-ins, found through two groups of entry points, of which ``examples/backend_plugin`` is a complete example::

    [project.entry-points."rectilinear.backends"]
    tiny = "tiny_rectilinear:TinyBackend"  # called without arguments when first needed; returns the backend

    [project.entry-points."rectilinear.libraries"]
    tinyarray = "tiny"  # arrays whose class is defined in the package tinyarray are served by the backend tiny

The name in the first group is the one that users choose and tables show. With the first group alone the backend is for NumPy arrays,
where a user has chosen it; if its `library` is another one, NumPy operands are brought there by its `asarray` and results back by
`to_numpy`. With the second, it is the one that serves the arrays of its `library`, without being chosen, and is imported when the
first of them is met. Their class has to have ``__array_namespace__``, and the namespace a ``__name__``, as modules have. Dtypes are
promoted by that namespace's ``result_type``; it is asked for ``reshape``, ``astype`` and ``asarray``, as the array API standard
defines them. Two plug-ins that claim one library, or one that claims NumPy or a library of a built-in backend: those plug-ins do not
serve it. That, and whatever is wrong with a plug-in, is a row of `rectilinear.list_backends` and of ``python -m rectilinear info``,
and harms no one else. ``python -m rectilinear conform NAME`` tries a backend on every promise made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from rectilinear.keepmask import KeepMask

API_VERSION = 1

Array: TypeAlias = Any
"""An array of the backend's library."""

Keep: TypeAlias = Array | KeepMask
"""z, or the bits that say where z was kept."""

Wanted: TypeAlias = tuple[bool, bool, bool]
"""Which of dx, dw, db are to be computed."""


@dataclass(frozen=True)
class Probe:
    """What a backend found out about its own usability.

    `reason` says why it is not usable and what to do about it, in one line; when usable, what it has to do without, or None.
    `threads` is the number of threads it may use, `simd` the instruction set or BLAS kernel its products run on.
    """

    usable: bool
    reason: str | None = None
    version: str | None = None
    device: str | None = None
    threads: int | None = None
    simd: str | None = None


class SGDStep(Protocol):
    """The method ``sgd_step``, which a backend may have: a step of `rectilinear.nn.SGD` over all parameters, in place."""

    def __call__(
        self,
        w: tuple[Any, ...],
        dw: tuple[Any, ...],
        v: tuple[Any, ...],
        decayed: int,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> bool | None:
        """v = momentum v - lr (dw + weight_decay w) and w = w + v, for each parameter; only the first `decayed` of them decay.

        w and dw are equally long, not empty; so is v, which is empty where momentum is 0. What is in them has not been checked and may be
        anything. The backend chooses what it serves, which is never what is read-only where it is to be written, shares memory with
        anything else in the tuples, or differs in dtype or shape. For the rest it returns None, before it has changed anything, and
        the caller computes by itself. Else it returns whether a value that is not finite came of finite ones, or False where nobody
        looks. The rates are floats; for the cupy backend, in a step that is recorded, 0.0 or arrays without axes, of the dtype that
        is computed in (float32 for 16 bits).
        """
        ...


class Backend(Protocol):
    """The primitives. Shapes: x (n, d), w (d, m), b (m,), dout (n, m); stacked (g, n, d), (g, d, m), (g, m), (g, n, m).

    Where the number of threads depends on more than the machine, a method ``threads()`` gives the number of a call made here and now;
    `rectilinear.list_backends` asks it, if there is one, instead of showing the probe's. A backend may also have a method ``sgd_step``,
    as `SGDStep` says.

    Two more attributes are for libraries that compute elsewhere, and may be left out. ``numpy_operands`` is a set of names out of ``w``
    and ``b``: these may come as NumPy arrays beside operands of this library. ``any_keep = True``: an integer `keep` comes as it is,
    not as an array of dtype T.
    """

    api_version: int
    """`API_VERSION` that the backend was written for, as a number of its own: another one is refused before anything else is asked."""
    name: str
    library: str
    """Import name of the array library it computes in: ``"numpy"``, ``"cupy"``. NumPy operands are moved there and back."""
    half: bool
    """Takes float16 and bfloat16 operands itself, rather than float32 ones that the caller has made of them."""

    def probe(self) -> Probe:
        """Say whether this backend can work here, running something small where that is the only honest way.

        Called once per process and the answer kept. Never raises for a missing or broken installation. It must not call rectilinear's
        functions on arrays of its own library, which would ask for this very answer.
        """
        ...

    def affine_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> Array:
        """x w + b, (n, m)."""
        ...

    def affine_relu_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> tuple[Array, Keep]:
        """relu(x w + b), (n, m), and what backward needs to know of z."""
        ...

    def affine_backward(
        self,
        dout: Array,
        x: Array,
        w: Array,
        keep: Keep | None,
        wanted: Wanted,
        out: tuple[Array | None, Array | None, Array | None],
    ) -> tuple[Array | None, Array | None, Array | None]:
        """dx = dz w^T (n, d), dw = x^T dz (d, m), db = sum of dz over rows (m,), where dz is dout with ReLU's gradient applied.

        keep is None for a plain affine layer (dz is dout). What is not wanted is not computed and returned as None; its `out` is None.
        """
        ...

    def bias_backward(self, dout: Array, out: Array | None) -> Array:
        """db alone: the sum of dout (n, m) over rows, (m,). Relative error under 1e-5 for 10**6 float32 rows of one sign."""
        ...

    def relu_forward(self, x: Array, out: Array | None) -> Array:
        """x where keep, else 0; any shape, 0-d too."""
        ...

    def relu_backward(self, dout: Array, keep: Keep, out: Array | None) -> Array:
        """dout where keep, else 0; any shape. Here `out` may be dout itself."""
        ...

    def softmax_loss(self, x: Array, y: Array, out: Array | None) -> tuple[Array, Array]:
        """Mean cross-entropy of softmax(x) at the labels, and its gradient.

        x (n, c), c >= 1; y (n,) integers of any dtype. Returns a 0-d value (NumPy: scalar) of dtype T and dx (n, c). A label outside
        0..c-1 (possible only where reading values would mean waiting) gives a NaN loss and a NaN row. n = 0: NaN, without a warning.
        """
        ...

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        """x as an array of this backend's library on its device; no copy if it is one.

        x is a NumPy array of any layout (rectilinear makes one of lists, scalars and other libraries' arrays), or an array of this
        backend's library. dtype is None (x's own), a name such as ``"float32"``, or a dtype of NumPy or of this library. Where
        the library is not NumPy, x may also be a `KeepMask` over NumPy bits, without a dtype: a cache of another backend. What is
        wanted then is a KeepMask over this library's.
        """
        ...

    def to_numpy(self, x: Array) -> Any:
        """An array of this backend's library as a NumPy array on the host; a `KeepMask` over its bits as one over NumPy's.

        Waits for the values. float16 and bfloat16 keep their bits (the latter as `ml_dtypes`' type).
        """
        ...

    def synchronize(self) -> None:
        """Wait until everything asked of the backend's device has been done; where nothing is pending, return."""
        ...
