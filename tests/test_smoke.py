"""The part of the smoke subset that an installed wheel is tried with, outside of the checkout: NumPy and pytest are all it needs."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

import rectilinear as r

pytestmark = [pytest.mark.smoke, pytest.mark.filterwarnings("error")]


def test_a_training_step() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 5)), rng.integers(0, 3, 20)
    w1, b1, w2, b2 = rng.standard_normal((5, 8)), np.zeros(8), rng.standard_normal((8, 3)), np.zeros(3)
    losses = []
    for _ in range(50):
        hidden, first = r.affine_relu_forward(x, w1, b1)
        scores, second = r.affine_forward(hidden, w2, b2)
        loss, dscores = r.softmax_loss(scores, y)
        dhidden, dw2, db2 = r.affine_backward(dscores, second)
        _, dw1, db1 = r.affine_relu_backward(dhidden, first, needs=(False, True, True))
        for parameter, gradient in ((w1, dw1), (b1, db1), (w2, dw2), (b2, db2)):
            parameter -= 0.5 * gradient
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2


def test_the_choice_of_backend() -> None:
    with r.use_backend("numpy"):
        assert r.get_backend() == "numpy"
    with pytest.raises(r.BackendError, match="did you mean 'numpy'"):
        r.set_backend("nmupy")


def test_errors_speak() -> None:
    with pytest.raises(r.ShapeError, match="affine_forward: x has 3 features per sample"):
        r.affine_forward(np.ones((2, 3)), np.ones((4, 5)), None)


def test_the_command_line() -> None:
    done = subprocess.run((sys.executable, "-m", "rectilinear", "info", "--json"), capture_output=True, text=True, check=True, timeout=120)
    assert '"numpy"' in done.stdout


WITHOUT_EXTRAS = """
import contextlib, sys
sys.modules |= dict.fromkeys(("numba", "rich", "safetensors", "threadpoolctl"))
import numpy, rectilinear
from rectilinear import nn
from rectilinear.__main__ import main
assert main(["info"]) == 0
print("refusals")
layer = nn.Affine(2, 3, rng=numpy.random.default_rng(0))
for call in (lambda: nn.save(layer, "net"), rectilinear.warmup, lambda: main(["tune"]), lambda: main(["bench"])):
    with contextlib.redirect_stderr(sys.stdout):
        try:
            call()
        except (ImportError, rectilinear.BackendError, SystemExit) as error:
            print(error)
"""


def test_what_is_not_installed_says_what_to_install() -> None:
    """With none of the extras `info` shows what there is, and each part that needs one names it."""
    done = subprocess.run((sys.executable, "-c", WITHOUT_EXTRAS), capture_output=True, text=True, check=True, timeout=120)
    info, _, refusals = done.stdout.partition("refusals\n")
    how = "pip install 'rectilinear[{0}]', or '.[{0}]' in a checkout".format
    assert re.search(r"^numpy +active, by auto", info, re.MULTILINE)
    assert f"BLAS kernel and threads are not known without threadpoolctl: {how('bench')}" in info
    said = [line for line in refusals.splitlines() if "pip install" in line]
    for wanted, line in zip(("files", "numba", "numba", "bench"), said, strict=True):
        assert line.endswith(how(wanted)), line


def test_type_hints_are_shipped() -> None:
    from importlib.resources import files

    assert (files("rectilinear") / "py.typed").is_file()
