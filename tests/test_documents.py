"""Every code block of README, CONTRIBUTING and docs/ runs, and every link within the project leads somewhere. See documents.py."""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rectilinear

from .conftest import on_cupy
from .documents import LANGUAGES, PRELUDE, ROOT, Block, blocks, fences, needs_large_library, pages

ARRAYS = "cupy" if on_cupy() else "numpy"
"""Its name tells conftest.py to keep these tests where only those of CuPy run."""


def parameters(wanted) -> list:
    """Pages with such blocks; on a GPU those that have a block for it, whose others then run there as well."""
    chosen = [page for page in pages() if any(wanted(block) and block.on_gpu >= on_cupy() for block in blocks(page))]
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.libraries] if needs_large_library(page) else [])
        for page in chosen
    ]


def is_python(block: Block) -> bool:
    return block.runs and block.is_python and (on_cupy() or not block.on_gpu)


def is_shell(block: Block) -> bool:
    return block.runs and block.language == "sh" and block.on_gpu == on_cupy()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with all that the checkout has, where a block may write beside it."""
    for entry in ROOT.iterdir():
        if entry.name[0] != "." or entry.name == ".ci":
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "out").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def choices_undone():
    yield
    rectilinear.set_backend(None)
    rectilinear.set_num_threads(None)


def run_python(block: Block, names: dict) -> None:
    if ">>>" not in block.code:
        exec(compile("\n" * block.line + block.code, str(block.page), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(block.code, names, str(block), str(block.page), block.line)
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append, clear_globs=False).failed
    names.update(test.globs)
    assert not failed, "".join(said)


@pytest.mark.usefixtures("checkout", "choices_undone")
@pytest.mark.parametrize("arrays", [ARRAYS])
@pytest.mark.parametrize("page", parameters(is_python))
def test_python_blocks_run(page, arrays):
    names = {"__name__": "__main__"}
    for block in filter(is_python, blocks(page)):
        run_python(block, names)


@pytest.mark.parametrize("arrays", [ARRAYS])
@pytest.mark.parametrize("page", parameters(is_shell))
def test_shell_blocks_run(page, arrays, checkout):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for block in filter(is_shell, blocks(page)):
        done = subprocess.run(
            ["bash", "-c", PRELUDE + block.code],
            cwd=checkout,
            env=os.environ | {"PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_say_their_language_and_links_lead_somewhere(page):
    found = list(blocks(page))
    assert len(found) == fences(page)
    assert [str(block) for block in found if block.language not in LANGUAGES] == []
    assert [block.note for block in found if block.note not in ("", "GPU") and not re.match("not run: .{10}", block.note)] == []
    for block in found:
        if block.language == "toml":
            tomllib.loads(block.code)
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    near = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match("https?:", link)]
    assert [link for link in near if not _leads(page, link)] == []


def _leads(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    if not target.exists():
        return False
    # As GitHub makes them: lower case, punctuation dropped, blanks to hyphens.
    headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if anchor else []
    return not anchor or anchor in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]


def test_a_block_that_fails_is_seen(tmp_path):
    """The checks above can fail."""
    page = tmp_path / "page.md"
    page.write_text("```python\n>>> 1 + 1\n3\n```\n\n<!-- GPU -->\n```python\nx = 1\n```\n```sh\nfalse\ntrue\n```\n")
    wrong, on_gpu, shell = blocks(page)
    assert (on_gpu.on_gpu, on_gpu.line, wrong.on_gpu) == (True, 7, False)
    with pytest.raises(AssertionError, match="Expected"):
        run_python(Block(ROOT / "page.md", wrong.line, wrong.language, "", wrong.code), {})
    assert subprocess.run(["bash", "-c", PRELUDE + shell.code], cwd=tmp_path).returncode != 0


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    "line", ["make no-such-target", "pip install '.[no-such-extra]'", "python -m rectilinear bench --only no-such-case"]
)
def test_commands_that_do_not_run_are_still_checked(line, checkout):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-c", PRELUDE + line]
    done = subprocess.run(command, cwd=checkout, env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode != 0


def test_the_picture_of_speed_is_what_its_script_draws_of_its_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "figures")
    import speed

    bars = speed.read()
    assert (ROOT / "docs" / "figures" / "speed.svg").read_text(encoding="utf-8") == speed.draw(bars)
    behind = sum(bar.ratio < 1 for bar in bars)
    assert speed.draw(bars).count(f'fill="{speed.BEHIND}"') == behind + 1  # and the legend


def test_the_figures_of_speed_are_those_of_a_run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "docs" / "figures")
    import speed

    from rectilinear.measure.record import Figure, Record

    record = Record("2026-01-02T03:04:05", {"isa": "avx2"}, {"simd": "avx512f"})
    seconds = {"numba": [1.0, 1.0], "numba-out": [0.1, 0.1], "cs231n": [3.0, 3.0], "torch": [2.0, 1.0], "sklearn": [0.5, 0.5]}
    record.figures = [Figure("step", (1, 64, 64), "float32", seconds), Figure("db", (1, 64), "float32", seconds)]
    record.save(tmp_path / "run.json")
    (bar,) = speed.measured(tmp_path / "run.json", "host", "abc")
    assert bar == speed.Bar("host", "AVX2", "2026-01-02", "abc", "float32", 1, 1, 64, 64, "torch", 1.5)
