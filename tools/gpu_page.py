"""The page of tools/gpu_check.py: what one report says, as HTML that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from gpu_measure import COMPILED_SHAPES, LARGE_SHAPES, SMALL_SHAPES, STEP_DTYPES

from rectilinear.measure.page import Cell, Section, Table
from rectilinear.measure.page import html as page

OURS, CAPTURED = "cupy", "cupy-captured"
PLAIN, EAGER, LEAN, GRAPH = "cs231n-cupy", "torch-cuda", "torch-lean-cuda", "torch-graph-cuda"
NAMES = {
    OURS: "ours",
    "cupy-out": "ours, out=",
    CAPTURED: "ours, captured",
    PLAIN: "plain CuPy",
    EAGER: "torch eager",
    LEAN: "torch leanest",
    GRAPH: "torch graph",
    "torch-compile-cuda": "torch.compile",
    "jax-cuda": "JAX jit",
}
HALF = ("bfloat16", "float16")


def correctness_rows(report: dict[str, Any]) -> dict[str, Any]:
    """The steps of the correctness; reports from before there were parts have nothing else."""
    return dict(report["steps"] if "steps" in report else _rows(report, "correctness"))


def html(report: dict[str, Any]) -> str:
    title = f"The cupy backend on {report['gpu'] or 'a GPU'}"
    state = "every number right" if report["passed"] else "NOT RIGHT"
    subtitle = f"{report['date']}, commit {report.get('commit') or 'unknown'}, {report.get('seconds', 0):.0f} s: {state}."
    sections = [_wrong(report), _summary(report), _parts(report), _correctness(report), _host(report), _tests(report)]
    return page(title, subtitle, [s for s in (*sections, _bandwidth(report), _steps(report)) if s.tables])


def _rows(report: dict[str, Any], part: str) -> dict[str, Any]:
    return dict(report.get("parts", {}).get(part, {}).get("rows", {}))


def _wrong(report: dict[str, Any]) -> Section:
    parts = report.get("parts", {"correctness": {"state": "ended", "rows": correctness_rows(report)}})
    rows = [[name, "", part["why"]] for name, part in parts.items() if part["state"] != "ended"]
    for name, part in parts.items():
        for row, entry in part["rows"].items():
            rows += [[name, row, words] for words in entry["wrong"]]
            if entry["state"] in ("broke off", "cut"):
                rows.append([name, row, f"{entry['state']}: {entry['why']}"])
    section = Section("What is wrong, broke off or was cut", alarm=True)
    section.tables += [Table(["part", "row", "what"], rows)] if rows else []
    return section


def _parts(report: dict[str, Any]) -> Section:
    section = Section("The parts")
    rows = [
        [name, part["state"], f"{part['seconds']:.1f}", str(part.get("limit", "")), str(len(part["rows"])), part["why"] or ""]
        for name, part in report.get("parts", {}).items()
    ]
    section.tables += [Table(["part", "how it went", "seconds", "at most", "rows", "why"], rows)] if rows else []
    return section


def _correctness(report: dict[str, Any]) -> Section:
    section = Section("Correctness")
    rows = [[n, e["state"], f"{e['seconds']:.1f}", e["why"] or _facts(e["found"])] for n, e in correctness_rows(report).items()]
    section.tables += [Table(["step", "how it went", "seconds", "what it found"], rows)] if rows else []
    return section


def _facts(found: dict[str, Any]) -> str:
    """In one line; what does not fit is in the JSON."""
    return "; ".join(f"{name}: {_number(value)}" for name, value in found.items() if not isinstance(value, dict) or name != "differ")[:300]


def _number(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_number(each)}" for name, each in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- what it comes to


def _summary(report: dict[str, Any]) -> Section:
    section = Section("What it comes to")
    section.text = (
        "Steps: the other's time over ours, above 1 is faster; the geometric mean over the shapes of this run that both have. "
        "Kernels: the least share of a device copy's GB/s over the shapes."
    )
    rows: list[list[Cell | str]] = [
        [name, Cell(figure, float(figure) / float(aim)), Cell(aim)] for name, figure, aim in summary(report) if figure
    ]
    section.tables += [Table(["figure", "this run", "aim"], rows)] if rows else []
    return section


def summary(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Figure, what this run gave ("" if it has none), and what is aimed at."""
    made = [
        ("float32, small shapes, eager, against PyTorch's leanest", _mean(report, ("float32",), SMALL_SHAPES, OURS, (LEAN,)), "1.1"),
        ("the same against PyTorch eager", _mean(report, ("float32",), SMALL_SHAPES, OURS, (EAGER,)), "3"),
        ("the same against plain CuPy", _mean(report, ("float32",), SMALL_SHAPES, OURS, (PLAIN,)), "2.5"),
        ("the same, captured, against PyTorch's CUDA graph", _mean(report, ("float32",), SMALL_SHAPES, CAPTURED, (GRAPH,)), "0.98"),
        ("16 bits, large shapes, against the best other", _mean(report, HALF, LARGE_SHAPES, OURS, _others()), "0.98"),
        ("float32, large shapes, against the best other", _mean(report, ("float32",), LARGE_SHAPES, OURS, _others()), "0.98"),
    ]
    for kernel in ("bias reduction", "select + bias reduction"):
        for name, dtypes in (("float32", ("float32",)), ("16 bits", HALF)):
            shares = [
                entry["found"]["of a copy"][kernel]
                for row, entry in _rows(report, "bandwidth").items()
                if row.endswith(dtypes) and kernel in entry["found"].get("of a copy", {})
            ]
            made.append((f"{kernel} of a device copy, {name}", min(shares, default=None), "0.92"))
    return [(name, "" if figure is None else f"{figure:.2f}", aim) for name, figure, aim in made]


def _others() -> tuple[str, ...]:
    return tuple(name for name in NAMES if not name.startswith("cupy"))


def _mean(
    report: dict[str, Any], dtypes: Iterable[str], shapes: Iterable[tuple[int, ...]], ours: str, others: tuple[str, ...]
) -> float | None:
    """Geometric mean of the time of the fastest of the others over ours, None where no shape has both."""
    logs = []
    for dtype in dtypes:
        for shape in shapes:
            us = _us(report, shape, dtype)
            there = [us[name] for name in others if name in us]
            if ours in us and there:
                logs.append(math.log(min(there) / us[ours]))
    return math.exp(sum(logs) / len(logs)) if logs else None


def _us(report: dict[str, Any], shape: tuple[int, ...], dtype: str) -> dict[str, float]:
    name = f"step-{'x'.join(map(str, shape))}-{dtype}"
    return dict(_rows(report, "steps").get(name, {}).get("found", {}).get("us", {}))


# ---------------------------------------------------------------- the measurements


def _host(report: dict[str, Any]) -> Section:
    section = Section("The host's cost of a call", "Microseconds until the call returns, on an idle device; nothing is waited for.")
    rows = _rows(report, "host_cost")
    columns = {
        name.removeprefix("host us "): entry["found"] for name, entry in rows.items() if name.startswith("host us") and entry["found"]
    }
    section.tables += [_table("call", columns, lambda value: value if isinstance(value, str) else f"{value:.1f}")] if columns else []
    profile = rows.get("profile of a step", {}).get("found", {})
    lines = [[name, Cell(f"{each['calls']:g}"), Cell(f"{each['us']:.1f}")] for name, each in profile.items()]
    title = "Own time by function, one step of 128x784x256, by cProfile, which adds to each call"
    section.tables += [Table(["function", "calls a step", "us a step"], lines, title)] if lines else []
    return section


def _tests(report: dict[str, Any]) -> Section:
    section = Section("The project's tests on CuPy arrays")
    for entry in _rows(report, "tests").values():
        found = entry["found"]
        rows = [[entry["state"], str(found.get("passed", 0)), str(len(found.get("failed", []))), str(len(found.get("skipped", [])))]]
        section.tables.append(Table(["how it went", "passed", "failed", "skipped"], rows, entry["why"] or ""))
        left = [[line] for line in found.get("left out", [])]
        section.tables += [Table(["left out: tests, why"], left)] if left else []
    return section


def _bandwidth(report: dict[str, Any]) -> Section:
    text = "GB/s of the bytes that must move, by CUDA events, and the share of a device copy of the same array."
    section = Section("The kernels' bandwidth", text)
    rows = _rows(report, "bandwidth")
    for dtype in STEP_DTYPES:
        columns = {}
        for name, entry in rows.items():
            if name.endswith(f" {dtype}") and entry["found"]:
                shares = entry["found"]["of a copy"]
                columns[name.split()[1]] = {
                    kernel: f"{rate} ({shares[kernel]:.2f})" if kernel in shares else str(rate)
                    for kernel, rate in entry["found"]["GB/s"].items()
                }
        section.tables += [_table("kernel", columns, str, dtype)] if columns else []
    return section


def _table(first: str, columns: dict[str, dict[str, Any]], shown: Callable[[Any], str], title: str = "") -> Table:
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [[name, *(Cell(shown(column[name])) if name in column else "" for column in columns.values())] for name in names]
    return Table([first, *columns], lines, title)


def _steps(report: dict[str, Any]) -> Section:
    section = Section("Whole steps, side by side")
    section.text = (
        "Microseconds of a forward and a backward in a loop that waits once at its end; medians of turns. Each subject has a process of "
        "its own. Our cells are coloured by the fastest other's time over ours. * not compared with float64, as the same code is at other "
        f"shapes. torch.compile takes part in {len(COMPILED_SHAPES)} shapes, JAX in float32 in these and the large ones."
    )
    rows = _rows(report, "steps")
    seen = {name for entry in rows.values() for name in entry["found"].get("us", {})}
    names = [name for name in NAMES if name in seen] + sorted(seen - set(NAMES))
    for dtype in STEP_DTYPES:
        lines = [
            [name.split("-")[1] + ("" if entry["found"]["checked against float64"] else " *"), *_step_cells(entry["found"]["us"], names)]
            for name, entry in rows.items()
            if name.endswith(f"-{dtype}") and entry["found"].get("us")
        ]
        section.tables += [Table(["N x D x M", *(NAMES.get(name, name) for name in names)], lines, dtype)] if lines else []
    missing = rows.get("subjects", {}).get("found", {}).get("missing", {})
    out = [[NAMES.get(name, name), why] for name, why in missing.items()]
    for row, entry in rows.items():
        for kind in ("refused", "failed"):
            out += [[NAMES.get(name, name), f"{row}: {kind}: {why}"] for name, why in entry["found"].get(kind, {}).items()]
    section.tables += [Table(["who took no part", "why"], out)] if out else []
    return section


def _step_cells(us: dict[str, float], names: list[str]) -> list[Cell | str]:
    best = min((us[name] for name in us if not name.startswith("cupy")), default=None)
    return [
        "" if name not in us else Cell(f"{us[name]:.4g}", best / us[name] if best and name.startswith("cupy") else None) for name in names
    ]
