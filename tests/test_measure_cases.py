"""What is measured: counts worked by hand, names, inputs, and the check of results."""

from dataclasses import replace

import numpy as np
import pytest

from rectilinear.measure import ours
from rectilinear.measure.cases import (
    AFFINE_SHAPES,
    ITEMSIZE,
    NET,
    NET_BATCHES,
    NETS,
    PASSES,
    ROW_SHAPES,
    STACKED_SHAPES,
    Case,
    full_grid,
    named,
    net_grid,
    quick_grid,
    small,
)
from rectilinear.measure.peers import cs231n
from rectilinear.measure.reference import LEARNING_RATE, check, expected, inputs, wrong

# N = 2, D = 3, M = 5, float32, 4 bytes. x 6 elements, w 15, b 5, out and dout 10.
#   affine forward   10 outputs, each 3 multiplications, 2 additions and the bias: 6 each, 60
#                    reads 26 elements = 104 bytes, writes 10 = 40
#   backward         dx 6 elements of 5 terms, 10 operations each: 60; dw 15 of 2 terms, 4 each: 60; db 5 of 2: 10; 130
#                    reads x, w, dout: 31 elements = 124 bytes, and 10 bits = 2 bytes; writes dx, dw, db: 26 = 104
#   step             60 + 130; reads x, w, b, dout: 36 elements = 144; writes out, dx, dw, db: 36 = 144
# Stacked, 7 groups of it: 7 times as much.
# ReLU over 2 x 5: no arithmetic; forward 10 in, 10 out; backward dout and x in, 10 out. db: 10 additions, 10 in, 5 out.
# Softmax over 2 x 5: 4 per element: 40; x 40 bytes and 2 labels of 8 bytes in; dx 40 bytes and the loss, 4, out.
COUNTS = [
    ("affine", (2, 3, 5), 60, 104, 40),
    ("forward", (2, 3, 5), 60, 104, 40),
    ("backward", (2, 3, 5), 130, 126, 104),
    ("step", (2, 3, 5), 190, 144, 144),
    ("stacked", (7, 2, 3, 5), 1330, 1008, 1008),
    ("relu_forward", (2, 5), 0, 40, 40),
    ("relu_backward", (2, 5), 0, 80, 40),
    ("db", (2, 5), 10, 40, 20),
    ("softmax", (2, 5), 40, 56, 44),
]


@pytest.mark.parametrize(("kind", "shape", "flops", "read", "written"), COUNTS)
def test_flops_and_bytes_by_hand(kind, shape, flops, read, written):
    case = Case(kind, shape, "float32")
    assert (case.flops, case.bytes_read, case.bytes_written) == (flops, read, written)


def test_training_step_counts_by_hand():
    # 784-512-256-10, N = 1. Weights 401408 + 131072 + 2560 = 535040, biases 778: P = 535818.
    # Forward 2 * 535040; dw the same; dx for layers two and three: 2 * 133632: 2407424 in all.
    # db: 778; softmax 4 * 10 = 40; the update, a product and a difference per parameter: 2 P = 1071636.
    # Reads 784 + P elements of 8 bytes and a label: 4292816 + 8; writes P: 4286544.
    case = Case("train", (1,), "float64")
    assert NET == (784, 512, 256, 10)
    assert case.flops == 2407424 + 778 + 40 + 1071636
    assert (case.bytes_read, case.bytes_written) == (4292824, 4286544)


def test_another_net_is_counted_by_its_own_widths():
    # 2-3-4: weights 6 + 12, biases 7, P = 25. N = 5: forward 2 * 5 * 18 = 180; dw the same, dx of layer two 2 * 5 * 12 = 120; db 5 * 7;
    # softmax 4 * 5 * 4 = 80; update 50. x 10 elements, labels 40 bytes, scores 20 elements.
    infer, train = (Case(kind, (5, 2, 3, 4), "float32") for kind in ("infer", "train"))
    assert infer.name == "infer-5x2x3x4-float32"
    assert (infer.flops, infer.bytes_read, infer.bytes_written) == (180, 35 * 4, 20 * 4)
    assert (train.flops, train.bytes_read, train.bytes_written) == (480 + 35 + 80 + 50, 35 * 4 + 40, 25 * 4)


def test_the_grid_of_nets_has_every_batch_of_both():
    assert {case.widths for case in net_grid()} == {(784, 512, 256, 10), (1024, 1024, 1024, 10)}
    assert len(net_grid()) == len({case.name for case in net_grid()}) == 2 * 2 * len(NET_BATCHES)


def test_float64_moves_twice_the_bytes():
    narrow, wide = (Case("affine", (2, 3, 5), dtype) for dtype in ("float32", "float64"))
    assert (wide.bytes_read, wide.bytes_written, wide.flops) == (208, 80, narrow.flops)


def test_names_are_unique_and_select():
    cases = full_grid()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.kind for case in cases} == {case.kind for case in quick_grid()} == set(PASSES)
    assert [c.name for c in named(cases, ["step-128x784x256-*"])] == ["step-128x784x256-float32", "step-128x784x256-float64"]
    assert named(cases, []) == cases
    with pytest.raises(ValueError, match="no case is named 'stepp-\\*'"):
        named(cases, ["step-*", "stepp-*"])


def test_quick_cases_are_cases_of_the_full_grid():
    assert set(quick_grid()) <= set(full_grid())
    assert len(set(quick_grid())) == len(quick_grid())


def test_a_quick_run_that_is_cut_short_has_seen_every_pass():
    assert {case.kind for case in quick_grid()[: len(PASSES)]} == set(PASSES)


def test_the_grid_reaches_what_it_has_to():
    assert (1, 64, 64) in AFFINE_SHAPES
    assert (4096, 4096, 1024) in AFFINE_SHAPES
    assert len(AFFINE_SHAPES) == 15
    assert len(STACKED_SHAPES) == 3
    assert [n * m for n, m in ROW_SHAPES] == [10**3, 10**4, 10**5, 10**6, 10**7, 10**8]
    assert small(Case("relu_forward", (10**4, 100), "float64"))
    assert not small(Case("relu_forward", (10**5, 100), "float32"))
    assert not small(Case("step", (512, 512, 512), "float32"))


@pytest.mark.parametrize("shape", [(1, 64, 64), (128, 784, 256), (333, 777, 111), (100, 3072, 100), (8, 33, 31, 64)])
def test_the_sign_of_z_is_exact_in_float32(shape):
    data = inputs(Case("stacked" if len(shape) == 4 else "step", shape, "float32"))
    narrow = data["x"] @ data["w"] + data["b"][..., None, :]
    wide = data["x"].astype("f8") @ data["w"].astype("f8") + data["b"].astype("f8")[..., None, :]
    assert np.array_equal(narrow, wide)
    assert np.abs(wide).min() > 0


@pytest.mark.parametrize("net", NETS)
def test_the_hidden_layers_of_the_nets_are_exact_in_float32(net):
    data = inputs(Case("train", (128, *net), "float32"))
    narrow, wide = data["x"], data["x"].astype("f8")
    for i in range(len(net) - 2):
        w, b = data[f"w{i}"], data[f"b{i}"]
        narrow, wide = narrow @ w + b, wide @ w.astype("f8") + b
        assert np.array_equal(narrow, wide)
        assert np.abs(wide).min() > 0
        narrow, wide = np.maximum(narrow, 0), np.maximum(wide, 0)


FORTRAN = Case("step_fortran", (16, 24, 8), "float32")


@pytest.mark.parametrize("build", [ours.build, ours.build_out, cs231n.build])
def test_dw_has_the_layout_of_w(build):
    data = inputs(FORTRAN)
    assert data["w"].flags.f_contiguous
    dw = build(FORTRAN, data).call()[2]
    assert dw.shape == data["w"].shape
    assert dw.flags.f_contiguous


def test_fortran_order_counts_and_is_measured_like_c_order():
    grid = full_grid()
    for case in grid:
        if case.kind == "step":
            twin = replace(case, kind="step_fortran")
            assert grid[grid.index(case) + 1] == twin
            assert (twin.flops, twin.bytes_read, twin.bytes_written) == (case.flops, case.bytes_read, case.bytes_written)
    assert sum(case.kind == "step_fortran" for case in grid) == len(AFFINE_SHAPES) * len(ITEMSIZE)


def test_inputs_do_not_repeat_by_row():
    x = inputs(Case("relu_forward", (10**5, 100), "float32"))["x"]
    assert len(np.unique(x[:, 0])) > 0.99 * 10**5


def plain(case, data, dtype=None):
    """The pass in NumPy, in the case's dtype or in another one, rounded to it."""
    x, w, b, dout = (data[k].astype(dtype or case.dtype) for k in ("x", "w", "b", "dout"))
    z = x @ w + b
    dz = np.where(z < 0, 0, dout)
    return tuple(a.astype(case.dtype) for a in (np.where(z < 0, 0, z), dz @ w.T, x.T @ dz, dz.sum(axis=0)))


STEP = Case("step", (128, 300, 50), "float32")


@pytest.mark.smoke
def test_a_correct_step_passes():
    data = inputs(STEP)
    assert check(STEP, data, plain(STEP, data)) is None
    assert check(STEP, data, plain(STEP, data, "float64")) is None


@pytest.mark.parametrize("which", range(4))
def test_one_wrong_element_is_found(which):
    data = inputs(STEP)
    got = plain(STEP, data)
    got[which].flat[7] += 0.01 * np.abs(got[which]).max()
    assert f"result {which} is off" in check(STEP, data, got)


def test_an_error_too_small_for_the_mean_is_found_in_its_element():
    data = inputs(STEP)
    got = plain(STEP, data)
    want = expected(STEP, data)[0][0]
    allowed = np.sqrt(300 + 16) * np.finfo("f4").eps * np.sqrt(np.mean(want**2))
    got[0].flat[7] += 50 * allowed  # over the root of 6400 elements: 0.6 of what is allowed
    assert "result 0 is off" in check(STEP, data, got)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_found(value):
    data = inputs(STEP)
    got = plain(STEP, data)
    got[0][3, 4] = value
    assert "result 0 is off" in check(STEP, data, got)


def test_computing_in_half_precision_is_found():
    data = inputs(STEP)
    assert "is off" in check(STEP, data, plain(STEP, data, "float16"))


def test_computing_float64_in_float32_is_found():
    case = Case("step", STEP.shape, "float64")
    data = inputs(case)
    assert "is off" in check(case, data, plain(case, data, "float32"))


def test_a_forgotten_bias_and_a_forgotten_relu_are_found():
    data = inputs(STEP)
    out, *grads = plain(STEP, data)
    z = data["x"] @ data["w"]
    assert "result 0" in check(STEP, data, (np.maximum(z, 0), *grads))
    assert "result 1" in check(STEP, data, (out, data["dout"] @ data["w"].T, *grads[1:]))


def test_wrong_shapes_dtypes_and_counts_are_found():
    data = inputs(STEP)
    got = plain(STEP, data)
    want, terms = expected(STEP, data)
    assert "3 results, not 4" in wrong(STEP, got[:3], want, terms)
    assert "float64" in wrong(STEP, (got[0].astype("f8"), *got[1:]), want, terms)
    assert "(128, 50)" in wrong(STEP, (got[0][:, :49], *got[1:]), want, terms)


def test_relu_has_to_be_equal():
    case = Case("relu_backward", (10, 100), "float32")
    data = inputs(case)
    got = np.where(data["x"] < 0, 0, data["dout"])
    assert check(case, data, (got,)) is None
    got[2, 3] = np.nextafter(got[2, 3], 9, dtype="f4")
    assert "differs in 1 of 1000" in check(case, data, (got,))


def test_the_training_reference_agrees_with_finite_differences():
    data = inputs(Case("train", (4,), "float64"))

    def loss(params):
        h = data["x"]
        for i in range(len(NET) - 1):
            h = h @ params[f"w{i}"] + params[f"b{i}"]
            h = np.maximum(h, 0) if i < len(NET) - 2 else h
        e = np.exp(h - h.max(axis=1, keepdims=True))
        return -np.log((e / e.sum(axis=1, keepdims=True))[np.arange(4), data["y"]]).mean()

    after = dict(zip([f"{k}{i}" for i in range(3) for k in "wb"], expected(Case("train", (4,), "float64"), data)[0], strict=True))
    for name, place in (("w0", (5, 6)), ("b0", (7,)), ("w1", (8, 9)), ("b1", (1,)), ("w2", (2, 3)), ("b2", (4,))):
        up, down = ({**data, name: data[name].copy()} for _ in range(2))
        up[name][place] += 1e-6
        down[name][place] -= 1e-6
        slope = (loss(up) - loss(down)) / 2e-6
        assert (data[name] - after[name])[place] / LEARNING_RATE == pytest.approx(slope, rel=1e-4, abs=1e-8)
