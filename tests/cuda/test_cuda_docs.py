"""docs/gpu.md says what the scripts say."""

from __future__ import annotations

import json

import gpu_check
import make_resources


def test_the_table_is_the_scripts() -> None:
    stored = json.loads((gpu_check.STORED / "resources.json").read_text())["kernels"]
    assert make_resources.markdown(stored) in make_resources.DOCS.read_text(encoding="utf-8"), "run tests/cuda/make_resources.py"
