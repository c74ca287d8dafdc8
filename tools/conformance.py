"""Write the two tables of docs/backends.md: which backend keeps which promise, and which planted fault is found by which test.

Usage: python tools/conformance.py [--only NAME ...]   (ten minutes; a column that is not run anew is as it was, in out/conformance.json)

The columns run `python -m rectilinear conform` in processes of their own: numba, numpy, the generic backend on array_api_strict, torch and
JAX, dask, the plug-in of examples/, and cupy on the stand-in, which needs .venv-cuda (make test-cuda makes it) and g++.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rectilinear.backends import registry  # noqa: E402
from rectilinear.testing import PROMISES, conform, numpy_libs  # noqa: E402
from tests.faults import FAULTS  # noqa: E402

PAGE = ROOT / "docs" / "backends.md"
PLUG_IN = ROOT / "examples" / "backend_plugin"
STORED = ROOT / "out" / "conformance.json"
"""What was found before, so that a column can be run by itself."""


@dataclass(frozen=True)
class Column:
    """A backend: its heading, and what `conform` is asked."""

    heading: str
    arguments: tuple[str, ...] = ()


COLUMNS = {
    "numba": Column("numba", ("numba",)),
    "numpy": Column("numpy", ("numpy",)),
    "strict": Column("generic on strict", ("generic", "--library", "array_api_strict")),
    "torch": Column("generic on torch", ("generic", "--library", "torch")),
    "jax": Column("generic on JAX", ("generic", "--library", "jax")),
    "dask": Column("dask", ("dask",)),
    "plug-in": Column("the example plug-in", ("strict",)),
    "cupy": Column("cupy on the stand-in"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[*COLUMNS, "faults"], help="may be given again")
    parser.add_argument("--promise", action="append", choices=[promise.name for promise in PROMISES], help="these rows alone, of columns")
    arguments = parser.parse_args()
    asked = arguments.only or [*COLUMNS, "faults"]
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    for name in asked:
        print(name, flush=True)
        found = faults() if name == "faults" else column(name, arguments.promise or ())
        stored[name] = stored.get(name, {}) | found if arguments.promise else found
        STORED.parent.mkdir(exist_ok=True)
        STORED.write_text(json.dumps(stored, indent=1), encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    for mark, table in (("promises", promise_table(stored)), ("faults", fault_table(stored.get("faults", {})))):
        start, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
        before, _, rest = text.partition(start)
        text = before + start + "\n" + table + "\n" + end + rest.partition(end)[2]
    PAGE.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- running


def column(name: str, promises: Sequence[str]) -> dict[str, Any]:
    """Promise -> [state, tests, failed tests, why it does not apply]."""
    python = sys.executable
    command = ["-m", "rectilinear", "conform", *COLUMNS[name].arguments, "--json"]
    command += [word for promise in promises for word in ("--only", promise)]
    if name == "cupy":
        python, command = str(ROOT / ".venv-cuda" / "bin" / "python"), ["tests/cuda/conform_standin.py", *promises]
    with plug_in() as folder:
        path = os.pathsep.join([str(ROOT), *([str(PLUG_IN), str(folder)] if name == "plug-in" else [])])
        done = subprocess.run(
            [python, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=False
        )
    if done.returncode not in (0, 1) or not done.stdout:
        sys.exit(f"{name}: conform ended with status {done.returncode}")
    rows = json.loads(done.stdout)["promises"]
    return {row["name"]: [row["state"], row["tests"], [each["test"] for each in row["failures"]], row["reason"]] for row in rows}


@contextmanager
def plug_in() -> Iterator[Path]:
    """A folder on the path that says of the example what its installation would."""
    with tempfile.TemporaryDirectory() as name:
        project = tomllib.loads((PLUG_IN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        info = Path(name, f"{project['name'].replace('-', '_')}-{project['version']}.dist-info")
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
        groups = project["entry-points"].items()
        (info / "entry_points.txt").write_text("".join(f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in each.items()) for g, each in groups))
        yield Path(name)


def faults() -> dict[str, Any]:
    """Words -> [promise, the test that fails first, or None]."""
    found = {}
    for fault in FAULTS:
        registry.register("planted", fault.backend)
        (outcome,) = conform(numpy_libs("planted"), [fault.breaks], first_failure=True)
        registry.unregister("planted")
        found[fault.words] = [fault.breaks, outcome.failures[0].test.partition("[")[0] if outcome.failures else None]
    return found


# ---------------------------------------------------------------- showing


def promise_table(stored: dict[str, Any]) -> str:
    shown = [name for name in COLUMNS if name in stored]
    lines = ["| promise | " + " | ".join(COLUMNS[name].heading for name in shown) + " |", "|---|" + "---|" * len(shown)]
    for promise in PROMISES:
        cells = [_cell(stored[name].get(promise.name)) for name in shown]
        lines.append(f"| `{promise.name}`: {promise.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(found: list[Any] | None) -> str:
    if found is None:
        return "not tried"
    state, tests, failed, _ = found
    return {"holds": f"{tests}", "does not apply": "—"}.get(state, f"**{len(failed)} of {tests} fail**")


def fault_table(found: dict[str, Any]) -> str:
    lines = ["| fault | breaks | found first by |", "|---|---|---|"]
    lines += [f"| {words} | `{promise}` | {f'`{test}`' if test else '**nothing**'} |" for words, (promise, test) in found.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
