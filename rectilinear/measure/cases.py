"""What is measured: passes, shapes and dtypes, with the FLOPs and the minimal bytes of each pass.

FLOPs: a product (n, d) by (d, m) counts 2 n d m, its bias included (d multiplications, d - 1 additions and the bias per
element); a sum over rows counts one per element; comparing and selecting (ReLU) counts none; softmax loss counts four per
element (subtract, exponentiate, add up, scale).

Bytes are compulsory traffic: every argument read once and every result written once, whatever a library reads again. A ReLU's
keep-set that backward is given counts one bit per element.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod

ITEMSIZE = {"float32": 4, "float64": 8}
"""The dtypes of the grids."""
HALF_ITEMSIZE = {"float16": 2, "bfloat16": 2}
"""The dtypes that only subjects on a GPU are asked for, by tools/gpu_check.py. bfloat16 needs ml_dtypes."""
NET = (784, 512, 256, 10)
"""Widths of the net of `infer` and `train`, where a case names no other: 784 features, 10 classes."""
NETS = (NET, (1024, 1024, 1024, 10))
"""The nets of `net_grid`: of equally many layers, which the subjects rely on."""
NET_BATCHES = (1, 8, 32, 128, 512, 1024, 4096)

PASSES = {
    "affine": "affine forward",
    "forward": "affine+ReLU forward",
    "backward": "affine+ReLU backward (dx, dw, db)",
    "step": "affine+ReLU forward and backward",
    "step_fortran": "affine+ReLU forward and backward, w and dw in Fortran order",
    "stacked": "stacked affine+ReLU forward and backward",
    "relu_forward": "ReLU forward",
    "relu_backward": "ReLU backward",
    "db": "bias reduction, db = dout.sum(0)",
    "softmax": "softmax loss and its gradient",
    "infer": "inference, a net of three layers",
    "train": "one SGD training step, a net of three layers",
}

AFFINE_SHAPES = (
    (1, 64, 64),
    (16, 128, 128),
    (100, 3072, 100),
    (128, 784, 256),
    (256, 512, 10),
    (256, 784, 512),
    (333, 777, 111),
    (512, 512, 512),
    (1024, 1024, 1024),
    (8, 1024, 1024),
    (32768, 32, 128),
    (65536, 64, 64),
    (16384, 256, 256),
    (2048, 2048, 2048),
    (4096, 4096, 1024),
)
PARTS_UP_TO = 1024**3
"""N D M beyond which only whole steps are measured: a call takes a second there, and the parts would take ten minutes of thirty."""
STACKED_SHAPES = ((64, 128, 64, 64), (8, 512, 256, 256), (256, 32, 32, 32))
ROW_SHAPES = tuple((10**e // 100, 100) for e in range(3, 9))
"""Bias reduction and ReLU: 1e3 to 1e8 elements in rows of 100, the width of CS231n's hidden layer."""
SOFTMAX_SHAPES = ((128, 10), (16384, 10), (4096, 1024))
TRAIN_SHAPES = ((32,), (128,), (1024,))


@dataclass(frozen=True)
class Case:
    """One pass at one shape and dtype.

    `shape` is (N, D, M) for the affine passes, (B, N, D, M) stacked, (N, M) for `db` and ReLU, (N, C) for `softmax`; for `infer` and
    `train` (N,), which means the net `NET`, or (N, D, ..., C), the widths of another one.

    Examples
    --------
    >>> case = Case("step", (128, 784, 256), "float32")
    >>> case.name, case.flops
    ('step-128x784x256-float32', 154173440)
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.size}-{self.dtype}"

    @property
    def size(self) -> str:
        """The shape as text, ``128x784x256``."""
        return "x".join(map(str, self.shape))

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the net of `infer` and `train`, from the features to the classes."""
        return self.shape[1:] or NET

    @property
    def itemsize(self) -> int:
        return (ITEMSIZE | HALF_ITEMSIZE)[self.dtype]

    @property
    def elements(self) -> int:
        """The number of elements of the largest array, roughly what sets the memory needed."""
        n = self.shape
        return prod(n) if self.kind in ("db", "relu_forward", "relu_backward", "softmax") else max(*self._operands(), 1)

    @property
    def flops(self) -> int:
        return _net_flops(self) if self.kind in _OF_A_NET else _flops(self.kind, self.shape)

    @property
    def bytes_read(self) -> int:
        return self._traffic[0]

    @property
    def bytes_written(self) -> int:
        return self._traffic[1]

    @property
    def _traffic(self) -> tuple[int, int]:
        return _net_traffic(self) if self.kind in _OF_A_NET else _traffic(self.kind, self.shape, self.itemsize)

    def _operands(self) -> tuple[int, ...]:
        if self.kind in _OF_A_NET:
            return (self.shape[0] * max(self.widths), parameters(self.widths))
        g, n, d, m = (1, *self.shape)[-4:]
        return g * n * d, g * d * m, g * n * m


_OF_A_NET = ("infer", "train")


def parameters(widths: tuple[int, ...] = NET) -> int:
    """The number of weights and biases of a net."""
    return sum(d * m + m for d, m in itertools.pairwise(widths))


def _net_flops(case: Case) -> int:
    n, widths = case.shape[0], case.widths
    layers = list(itertools.pairwise(widths))
    if case.kind == "infer":
        return sum(2 * n * d * m for d, m in layers)
    products = sum(2 * n * d * m * (2 if i == 0 else 3) for i, (d, m) in enumerate(layers))  # the first layer needs no dx
    return products + n * sum(widths[1:]) + 4 * n * widths[-1] + 2 * parameters(widths)


def _net_traffic(case: Case) -> tuple[int, int]:
    """(bytes read, bytes written). What lies between the layers is nobody's argument nor result."""
    n, widths, itemsize = case.shape[0], case.widths, case.itemsize
    read = (n * widths[0] + parameters(widths)) * itemsize
    return (read, n * widths[-1] * itemsize) if case.kind == "infer" else (read + n * 8, parameters(widths) * itemsize)


def _flops(kind: str, shape: tuple[int, ...]) -> int:
    if kind in ("relu_forward", "relu_backward"):
        return 0
    if kind == "db":
        return prod(shape)
    if kind == "softmax":
        return 4 * prod(shape)
    gemm = 2 * prod(shape)
    db = prod(shape) // shape[-2]
    return {"affine": gemm, "forward": gemm, "backward": 2 * gemm + db}.get(kind, 3 * gemm + db)


def _traffic(kind: str, shape: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """(bytes read, bytes written)."""
    size = prod(shape)
    if kind == "relu_forward":
        return size * itemsize, size * itemsize
    if kind == "relu_backward":  # the cache is x itself, and all of it has to be looked at
        return 2 * size * itemsize, size * itemsize
    if kind == "db":
        return size * itemsize, shape[-1] * itemsize
    if kind == "softmax":
        return size * itemsize + shape[0] * 8, (size + 1) * itemsize
    g, n, d, m = (1, *shape)[-4:]
    x, w, b, out = g * n * d, g * d * m, g * m, g * n * m
    if kind in ("affine", "forward"):
        return (x + w + b) * itemsize, out * itemsize
    if kind == "backward":
        return (x + w + out) * itemsize + -(-out // 8), (x + w + b) * itemsize
    return (x + w + b + out) * itemsize, (out + x + w + b) * itemsize


def full_grid() -> list[Case]:
    """Every case, small and telling ones first, so that a run that is cut short has the most of use."""
    cases = []
    for dtype in ITEMSIZE:
        cases += [
            Case(kind, shape, dtype)
            for shape in AFFINE_SHAPES
            for kind in ("step", "step_fortran", "forward", "backward", "affine")
            if kind.startswith("step") or prod(shape) <= PARTS_UP_TO
        ]
        cases += [Case("stacked", shape, dtype) for shape in STACKED_SHAPES]
        cases += [Case(kind, shape, dtype) for shape in TRAIN_SHAPES for kind in _OF_A_NET]
        cases += [Case("softmax", shape, dtype) for shape in SOFTMAX_SHAPES]
        cases += [Case(kind, shape, dtype) for shape in ROW_SHAPES for kind in ("db", "relu_forward", "relu_backward")]
    return cases


_QUICK = {
    "step": ((1, 64, 64), (16, 128, 128), (128, 784, 256), (256, 784, 512), (1024, 1024, 1024), (65536, 64, 64), (32768, 32, 128)),
    "forward": ((1, 64, 64), (128, 784, 256), (65536, 64, 64)),
    "backward": ((128, 784, 256), (65536, 64, 64)),
    "affine": ((128, 784, 256),),
    "step_fortran": ((128, 784, 256),),
    "stacked": ((64, 128, 64, 64),),
    "train": ((128,),),
    "infer": ((128,),),
    "softmax": ((16384, 10),),
    "db": ((100, 100), (10000, 100), (100000, 100)),
    "relu_forward": ((10000, 100), (100000, 100)),
    "relu_backward": ((100000, 100),),
}
_QUICK_FLOAT64 = {"step": ((128, 784, 256), (1024, 1024, 1024)), "db": ((10000, 100),)}


def quick_grid() -> list[Case]:
    """A few cases of every pass, in under three minutes with all peers on two cores; the first of each pass before the second of any."""
    return [
        Case(kind, shapes[i], dtype)
        for dtype, grid in (("float32", _QUICK), ("float64", _QUICK_FLOAT64))
        for i in range(max(map(len, grid.values())))
        for kind, shapes in grid.items()
        if i < len(shapes)
    ]


def net_grid() -> list[Case]:
    """Inference and training of whole nets in float32, as users of PyTorch and scikit-learn have them."""
    return [Case(kind, (n,) if widths == NET else (n, *widths), "float32") for kind in _OF_A_NET for widths in NETS for n in NET_BATCHES]


def named(cases: Iterable[Case], patterns: Iterable[str]) -> list[Case]:
    """The cases whose name fits one of the patterns (``step*``, ``*-float64``, ``db-1000x100-*``); no pattern: all.

    Raises
    ------
    ValueError
        A pattern fits no case.
    """
    cases, patterns = list(cases), list(patterns)
    for pattern in patterns:
        if not any(fnmatch(case.name, pattern) for case in cases):
            kinds = ", ".join(PASSES)
            raise ValueError(
                f"no case is named {pattern!r}; names are PASS-SHAPE-DTYPE, e.g. 'step-128x784x256-float32' or 'db-*', of {kinds}"
            )
    return [case for case in cases if not patterns or any(fnmatch(case.name, pattern) for pattern in patterns)]


def small(case: Case) -> bool:
    """Whether a case is small enough to run once in an ordinary test run."""
    return case.flops <= 10**8 and case.elements <= 10**6
