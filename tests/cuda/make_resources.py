"""Writes resources.json, what NVRTC makes of each kernel, and the table of it in docs/gpu.md.

Run it with a new NVRTC or new kernels. It compiles for every architecture, which the tests of a change do not.
"""

from __future__ import annotations

import json
from pathlib import Path

import conftest  # noqa: F401 - the search path
import gpu_cases
from test_cuda_nvrtc import ARCHITECTURES, SHOWN, TABLE

DOCS = Path(__file__).parents[2] / "docs" / "gpu.md"
MARKS = ("<!-- resources -->\n", "<!-- end of resources -->\n")


def markdown(kernels: dict[str, dict[str, list[int]]]) -> str:
    """The rows of float32 and bfloat16, whose widths differ most."""
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in SHOWN) + " | shared |", "|---" * (len(SHOWN) + 2) + "|"]
    for key, row in kernels.items():
        if key.split()[0] in ("float32", "bfloat16"):
            lines.append(f"| {key} | " + " | ".join(str(row[str(arch)][0]) for arch in SHOWN) + f" | {row[str(SHOWN[0])][1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    import nvrtc

    compiled = {(dtype, arch): nvrtc.compile_cubin(dtype, arch) for dtype in gpu_cases.DTYPES for arch in ARCHITECTURES}
    kernels = nvrtc.table(compiled, SHOWN)
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in kernels.items())
    TABLE.write_text(f'{{"nvrtc": "{nvrtc.version()}", "source": "{nvrtc.digest(ARCHITECTURES)}", "kernels": {{\n{rows}\n}}}}\n')
    if DOCS.exists():
        before, _, rest = DOCS.read_text().partition(MARKS[0])
        DOCS.write_text(before + MARKS[0] + markdown(kernels) + MARKS[1] + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    main()
