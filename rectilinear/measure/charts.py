"""Small charts as inline SVG: lines and dots over logarithmic axes, and bars. No script, no font, nothing fetched.

The view box is narrow, so that its text can still be read when a phone shrinks it; series differ in colour, marker and dash.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import ceil, floor, log10
from typing import NamedTuple

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7A6A00", "#8C2D9B")
"""Okabe and Ito's colours, which people with any common colour blindness tell apart, and two more; yellow is too pale on white."""
_MARKERS = ("circle", "square", "triangle", "diamond", "cross", "down", "plus", "hollow", "hollow-square")
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_WIDTH, _HEIGHT = 470, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 14, 44


class Series(NamedTuple):
    """A line of a chart; without points, its marks alone. `style` chooses colour and marker; None is a grey dashed line, for a ceiling."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int | None


def lines(series: Sequence[Series], x_label: str, y_label: str, title: str) -> str:
    """Lines on two logarithmic axes, and a legend."""
    points = [point for s in series for point in s.points]
    if not points:
        return ""
    x, y = _Axis([p[0] for p in points], _LEFT, _WIDTH - _RIGHT), _Axis([p[1] for p in points], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_grid(x, y, x_label, y_label)]
    for s in series:
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in s.points)
        colour = "#555" if s.style is None else PALETTE[s.style % len(PALETTE)]
        dash = "4 3" if s.style is None else _DASHES[s.style // len(PALETTE) % len(_DASHES)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3" stroke-dasharray="{dash}"/>')
        if s.style is not None:
            parts += [_marker(s.style, x.at(a), y.at(b), f"{s.name}: {b:.3g} {y_label} at {a:.3g}") for a, b in s.points]
    return _figure(parts, _HEIGHT, title, series)


def dots(rows: Sequence[tuple[str, Sequence[tuple[str, float, int]]]], x_label: str, even: str, title: str) -> str:
    """A row for each (label, marks), with a mark for each (name, ratio, style) on a logarithmic axis, and a line at 1, called `even`."""
    marks = [mark for _, given in rows for mark in given]
    if not marks:
        return ""
    row, top = 19, 22
    left, bottom = 14 + 8.0 * max(len(label) for label, _ in rows), top + row * len(rows)
    x = _Axis([1.0, *(value for _, value, _ in marks)], left, _WIDTH - _RIGHT, log10(4))
    parts = []
    for tick in x.ticks():
        parts.append(f'<path d="M{x.at(tick):.1f} {top}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x.at(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{_short(tick)}</text>')
    middles = [top + row * (i + 0.5) for i in range(len(rows))]
    parts += [f'<path d="M{left:.1f} {middle}H{_WIDTH - _RIGHT}" stroke="#eee"/>' for middle in middles]
    parts.append(f'<path d="M{x.at(1):.1f} {top - 4}V{bottom}" stroke="#333" stroke-width="2"/>')
    parts.append(f'<text x="{x.at(1):.1f}" y="{top - 9}" text-anchor="middle" font-weight="bold">{escape(even)}</text>')
    for middle, (label, given) in zip(middles, rows, strict=True):
        parts.append(f'<text x="{left - 8:.1f}" y="{middle + 4}" text-anchor="end">{escape(label)}</text>')
        parts += [_marker(style, x.at(value), middle, f"{label}: {name} {value:.2f}") for name, value, style in given]
    parts.append(f'<text x="{(left + _WIDTH - _RIGHT) / 2:.1f}" y="{bottom + 35}" text-anchor="middle">{escape(x_label)}</text>')
    legend = {name: Series(name, [], style) for name, _, style in marks}
    return _figure(parts, bottom + 42, title, list(legend.values()))


def bars(values: Sequence[tuple[str, float, int]], unit: str, title: str) -> str:
    """Horizontal bars from 0, each (name, value, style), the shortest first, with the value beside the bar."""
    row, left, right = 19, 104, 76
    largest = max(value for _, value, _ in values)
    parts = []
    for i, (name, value, style) in enumerate(sorted(values, key=lambda bar: bar[1])):
        top, length = row * i, max(1.0, (_WIDTH - left - right) * value / largest)
        parts.append(f'<text x="{left - 6}" y="{top + 14}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{top + 3}" width="{length:.1f}" height="{row - 5}" fill="{PALETTE[style % len(PALETTE)]}"/>')
        parts.append(f'<text x="{left + length + 4:.1f}" y="{top + 14}">{value:.3g} {escape(unit)}</text>')
    return _figure(parts, row * len(values), title, [])


def shade(value: float, extreme: float = 4.0) -> str:
    """A background for a ratio: white at 1, blue above, orange below, full at `extreme`; dark text stays readable on all of them."""
    share = max(-1.0, min(1.0, log10(value) / log10(extreme))) if value > 0 else -1.0
    end = (122, 182, 230) if share > 0 else (245, 172, 100)
    return "#" + "".join(f"{round(255 + (c - 255) * abs(share)):02x}" for c in end)


class _Axis:
    """A logarithmic axis from `start` to `end` in pixels; covers at least `least` powers of ten."""

    def __init__(self, values: Iterable[float], start: float, end: float, least: float = 1.0) -> None:
        logs = [log10(value) for value in values]
        low, high = min(logs), max(logs)
        pad = max(0.04 * (high - low), (least - (high - low)) / 2)
        self.low, self.high, self.start, self.end = low - pad, high + pad, start, end

    def at(self, value: float) -> float:
        return self.start + (log10(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten; thinned out on long axes, with more between on short ones."""
        span = self.high - self.low
        steps: tuple[float, ...] = (1, 1.5, 2, 3, 5, 7) if span < 0.9 else (1, 2, 5) if span < 2.5 else (1,)
        every = 1 if span < 7 else 2
        ticks = [s * 10.0**e for e in range(floor(self.low), ceil(self.high) + 1) if e % every == 0 for s in steps]
        return [tick for tick in ticks if self.low <= log10(tick) <= self.high]


def _grid(x: _Axis, y: _Axis, x_label: str, y_label: str) -> Iterable[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for tick in x.ticks():
        yield f'<path d="M{x.at(tick):.1f} {_TOP}V{bottom}" stroke="#ddd"/>'
        yield f'<text x="{x.at(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{_short(tick)}</text>'
    for tick in y.ticks():
        yield f'<path d="M{_LEFT} {y.at(tick):.1f}H{right}" stroke="#ddd"/>'
        yield f'<text x="{_LEFT - 5}" y="{y.at(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
    yield f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#333"/>'
    yield f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    middle = (_TOP + bottom) / 2
    yield f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{escape(y_label)}</text>'


def _short(value: float) -> str:
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{letter}"
    return f"{value:g}"


def _marker(style: int, x: float, y: float, title: str = "") -> str:
    colour, kind, r = PALETTE[style % len(PALETTE)], _MARKERS[style % len(_MARKERS)], 3.6
    paths = {
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        "hollow-square": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        "triangle": f"M{x:.1f} {y - r:.1f}l{r} {2 * r}h{-2 * r}z",
        "down": f"M{x:.1f} {y + r:.1f}l{r} {-2 * r}h{-2 * r}z",
        "diamond": f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
        "cross": f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}",
        "plus": f"M{x - r:.1f} {y:.1f}h{2 * r}m{-r} {-r}v{2 * r}",
    }
    fill = "none" if kind in ("cross", "plus") else "#fff" if kind.startswith("hollow") else colour
    about = f"<title>{escape(title)}</title>" if title else ""
    style_attributes = f'fill="{fill}" stroke="{colour}" stroke-width="1.4"'
    if kind in paths:
        return f'<path d="{paths[kind]}" {style_attributes}>{about}</path>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {style_attributes}>{about}</circle>'


def _figure(parts: Iterable[str], height: float, title: str, series: Sequence[Series]) -> str:
    swatches = []
    for s in series:
        if s.style is None:
            line = '<path d="M0 6H22" stroke="#555" stroke-width="1.6" stroke-dasharray="4 3"/>'
        else:
            stroke = f'<path d="M0 6H22" stroke="{PALETTE[s.style % len(PALETTE)]}" stroke-width="1.6"/>' if s.points else ""
            line = stroke + _marker(s.style, 11, 6)
        swatches.append(f'<span><svg class="swatch" viewBox="0 0 22 12" aria-hidden="true">{line}</svg>{escape(s.name)}</span>')
    legend = f'<div class="legend">{" ".join(swatches)}</div>' if swatches else ""
    drawing = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}{legend}</figure>"
