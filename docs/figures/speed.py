"""Draw how fast the numba backend is beside the best other library: `python docs/figures/speed.py` writes speed.svg from speed.csv.

    python docs/figures/speed.py --from rectilinear-bench/run.json --host 'Zen 4'

first puts the whole steps of a run of the benchmark (made with --peers) in the place of the rows that this host and instruction set have.
"""

from __future__ import annotations

import argparse
import csv
import math
import subprocess
from dataclasses import asdict, dataclass, fields
from html import escape
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).parent
PEERS = ("cs231n", "torch", "torch-lean", "jax")

LABELS, PANEL, GAP, TOP, ROW = 132, 234, 10, 62, 26  # widths of the column of shapes and of a panel, and so on
LOWEST, HIGHEST, TICKS = 0.8, 4.6, (0.8, 1, 1.5, 2, 3, 4)
COLOURS = {"float32": "#3949ab", "float64": "#9fa8da"}
BEHIND, INK, GRID = "#d84315", "#263238", "#cfd8dc"


@dataclass(frozen=True)
class Bar:
    """One shape on one host. `ratio` is how many times as fast as the best peer we are; `groups` is 1 but for stacked layers.

    `peer` is empty where it was not noted.
    """

    host: str
    isa: str
    date: str
    commit: str
    dtype: str
    groups: int
    n: int
    d: int
    m: int
    peer: str
    ratio: float

    @property
    def panel(self) -> tuple[str, str, str, str]:
        return self.host, self.isa, self.date, self.commit

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.groups, self.n, self.d, self.m


def read() -> list[Bar]:
    with (HERE / "speed.csv").open(encoding="utf-8") as file:
        return [
            Bar(**{f.name: {"int": int, "float": float}.get(str(f.type), str)(row[f.name]) for f in fields(Bar)})
            for row in csv.DictReader(file)
        ]


def write(bars: list[Bar]) -> None:
    with (HERE / "speed.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, [f.name for f in fields(Bar)], lineterminator="\n")
        rows.writeheader()
        rows.writerows(asdict(bar) for bar in bars)


def measured(path: Path, host: str, commit: str) -> list[Bar]:
    """The whole steps of a run."""
    from rectilinear.measure.figures import best_peer, ratio
    from rectilinear.measure.record import load

    record = load(path)
    bars = []
    for figure in record.figures:
        peer = best_peer(figure, PEERS)
        if figure.kind in ("step", "stacked") and "numba" in figure.seconds and peer:
            *groups, n, d, m = figure.shape
            isa = record.machine["simd"] if record.isa == "host" else record.isa
            about = (host, {"avx512f": "AVX-512", "avx2": "AVX2"}.get(isa, isa), record.started[:10], commit)
            bars.append(Bar(*about, figure.dtype, *(groups or [1]), n, d, m, peer, round(ratio(figure, "numba", peer).mid, 2)))
    return bars


# ---------------------------------------------------------------- the picture


def draw(bars: list[Bar]) -> str:
    shapes = list(dict.fromkeys(bar.shape for bar in bars))
    panels = {panel: list(each) for panel, each in groupby(bars, key=lambda bar: bar.panel)}
    width, bottom = LABELS + len(panels) * (PANEL + GAP), TOP + len(shapes) * ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 44}" width="{width}" '
        f'font-family="sans-serif" font-size="11" fill="{INK}">',
        "<title>Speed of the numba backend, as a multiple of the speed of the best other library, for each shape and host</title>",
        f'<rect width="{width}" height="{bottom + 44}" fill="#fff"/>',
        _text(8, TOP - 10, "N, D, M", weight="bold"),
    ]
    for row, shape in enumerate(shapes):
        parts.append(_text(8, TOP + row * ROW + 17, _named(shape)))
    for number, (panel, each) in enumerate(panels.items()):
        parts += _panel(LABELS + number * (PANEL + GAP), bottom, panel, each, shapes)
    x = 8.0
    for label, colour in (*COLOURS.items(), ("slower than the best other library", BEHIND)):
        parts += [f'<rect x="{x:.0f}" y="{bottom + 26}" width="10" height="10" fill="{colour}"/>', _text(x + 14, bottom + 35, label)]
        x += 30 + 6 * len(label)
    parts.append(_text(width - GAP, bottom + 35, "times as fast as the best of NumPy, PyTorch and JAX (log axis)", anchor="end"))
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: int, bottom: int, panel: tuple[str, str, str, str], bars: list[Bar], shapes: list[tuple[int, ...]]) -> list[str]:
    host, isa, date, commit = panel
    parts = [_text(left, 16, f"{host}, {isa}", weight="bold"), _text(left, 32, f"{date}, commit {commit}")]
    for tick in TICKS:
        x = left + _x(tick)
        parts.append(f'<path d="M{x:.1f} {TOP - 4}V{bottom}" stroke="{INK if tick == 1 else GRID}"/>')
        parts.append(_text(x, bottom + 13, f"{tick:g}", anchor="middle", size=10))
    for bar in bars:
        top = TOP + shapes.index(bar.shape) * ROW + 3 + 10 * (bar.dtype == "float64")
        start, end = sorted((_x(1), _x(bar.ratio)))
        colour = COLOURS[bar.dtype] if bar.ratio >= 1 else BEHIND
        parts.append(f'<rect x="{left + start:.1f}" y="{top}" width="{max(end - start, 1):.1f}" height="9" fill="{colour}"/>')
        parts.append(_text(left + max(end, _x(1)) + 3, top + 8, f"{bar.ratio:.2f}", size=9))
    return parts


def _x(ratio: float) -> float:
    return PANEL * math.log(ratio / LOWEST) / math.log(HIGHEST / LOWEST)


def _named(shape: tuple[int, int, int, int]) -> str:
    groups, *extents = shape
    return (f"{groups} \u00d7 " if groups > 1 else "") + ", ".join(map(str, extents))


def _text(x: float, y: float, text: str, *, weight: str = "", anchor: str = "", size: int = 0) -> str:
    given = {"font-weight": weight, "text-anchor": anchor, "font-size": size or ""}
    return (
        f'<text x="{x:.1f}" y="{y}"' + "".join(f' {name}="{value}"' for name, value in given.items() if value) + f">{escape(text)}</text>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="run", type=Path, metavar="JSON", help="a run of the benchmark, to replace what this host has")
    parser.add_argument("--host", help="what to call it, for example 'Zen 4'")
    parser.add_argument("--commit", help="what was measured (default: the checkout's)")
    options = parser.parse_args()
    bars = read()
    if options.run:
        if not options.host:
            parser.error("--from needs --host")
        commit = options.commit or subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, text=True).strip()
        new = measured(options.run, options.host, commit)
        if not new:
            parser.error(f"{options.run} has no whole steps of numba beside one of {', '.join(PEERS)}")
        bars = [*new, *(bar for bar in bars if (bar.host, bar.isa) != (new[0].host, new[0].isa))]
        write(bars)
    (HERE / "speed.svg").write_text(draw(bars), encoding="utf-8")


if __name__ == "__main__":
    main()
