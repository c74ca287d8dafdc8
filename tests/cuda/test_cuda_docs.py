"""docs/gpu.md says what the scripts say, and the roofline counts as one counts by hand."""

from __future__ import annotations

import json

import gpu_check
import gpu_roofline
import make_resources
import pytest

TEXT = gpu_roofline.DOCS.read_text(encoding="utf-8")


def test_the_tables_are_the_scripts() -> None:
    assert gpu_roofline.document(TEXT) == TEXT, "run tools/gpu_roofline.py --write"
    stored = json.loads((gpu_check.STORED / "resources.json").read_text())["kernels"]
    assert make_resources.markdown(stored) in TEXT, "run tests/cuda/make_resources.py"


def test_bytes_by_hand() -> None:
    """Float32, forward: read z 4, write y 4, mask 1/8; backward: read dout 4, mask 1/8, write dz 4. Plain: 8 + 8 + 5 + 9 + 4."""
    assert sum(each.bytes(4) for each in gpu_roofline.OWN) == 16.25
    assert sum(each.bytes(4) for each in gpu_roofline.PLAIN) == 34
    # bfloat16: z and the wide dx are float32. 4 + 2 + 1/8, 2 + 2 + 1/8; dx 4 + 2.
    assert [each.bytes(2) for each in (*gpu_roofline.OWN, gpu_roofline.ROUNDING)] == [6.125, 4.125, 6]


def test_a_large_square_step_by_hand() -> None:
    """4096^3, three products of 2 * 4096^3 FLOP at 50.25 TFLOP/s; 16.25 bytes for each of 4096^2 elements at 3.015 TB/s."""
    step = gpu_roofline.step(gpu_roofline.Gpu(), 4096, 4096, "float32")
    assert step.products == pytest.approx(3 * 137438953472 / 50.25e12 * 1e6)
    assert step.own == pytest.approx(16.25 * 16777216 / 3.015e12 * 1e6)
    assert step.bound == "products"
