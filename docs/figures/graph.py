"""Draw the computational graph of affine and ReLU, forward and backward: `python docs/figures/graph.py` writes graph.svg."""

from __future__ import annotations

import math
from pathlib import Path

WIDTH, HEIGHT = 1000, 400
RADIUS, GAP = 32, 5  # of a node; half the distance between an edge's two arrows
FORWARD, BACKWARD = "#1f3552", "#c2410c"

NODES = {
    "x": (45, 55),
    "w": (45, 235),
    "b": (45, 335),
    "matmul": (335, 145),
    "repeat": (335, 335),
    "+": (520, 240),
    "relu": (745, 240),
    "y": (955, 240),
}
INPUTS = ("x", "w", "b", "y")

# From, to, what flows forward, what flows back, and where the two words stand.
EDGES = [
    ("x", "matmul", "x  (N, D)", (215, 80), "dx = dz wᵀ", (150, 130)),
    ("w", "matmul", "w  (D, M)", (150, 174), "dw = xᵀ dz", (225, 224)),
    ("b", "repeat", "b  (M,)", (190, 320), "db = dz summed over rows", (190, 364)),
    ("matmul", "+", "x w  (N, M)", (475, 173), "dz", (400, 212)),
    ("repeat", "+", "b in every row  (N, M)", (312, 280), "dz", (465, 306)),
    ("+", "relu", "z  (N, M)", (632, 225), "dz = dy where z ≥ 0, else 0", (640, 292)),
    ("relu", "y", "y  (N, M)", (850, 225), "dy  (N, M)", (850, 267)),
]


def arrow(start: tuple[float, float], end: tuple[float, float], kind: str) -> str:
    """A line between the rims of two nodes, moved to the left of its direction so that both directions fit."""
    (x1, y1), (x2, y2) = start, end
    length = math.dist(start, end)
    dx, dy = (x2 - x1) / length, (y2 - y1) / length
    x1, y1 = x1 + RADIUS * dx + GAP * dy, y1 + RADIUS * dy - GAP * dx
    x2, y2 = x2 - (RADIUS + 6) * dx + GAP * dy, y2 - (RADIUS + 6) * dy - GAP * dx
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" marker-end="url(#{kind})"/>'


def word(text: str, place: tuple[float, float], kind: str) -> str:
    return f'<text class="{kind}" x="{place[0]}" y="{place[1]}">{text}</text>'


def node(name: str) -> str:
    x, y = NODES[name]
    circle = f'<circle class="{"value" if name in INPUTS else "operation"}" cx="{x}" cy="{y}" r="{RADIUS}"/>'
    return circle + word(name, (x, y + 5), "name")


def marker(kind: str, colour: str) -> str:
    return (
        f'<marker id="{kind}" viewBox="0 0 10 10" refX="4" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 10 5 0 10Z" fill="{colour}"/></marker>'
    )


def draw() -> str:
    style = (
        "text{font:15px sans-serif;text-anchor:middle}"
        f"line.forward{{stroke:{FORWARD};stroke-width:1.8}}text.forward,text.name{{fill:{FORWARD}}}"
        f"line.backward{{stroke:{BACKWARD};stroke-width:1.8;stroke-dasharray:6 4}}text.backward{{fill:{BACKWARD}}}"
        f"circle{{stroke:{FORWARD};stroke-width:1.5}}.value{{fill:#fff}}.operation{{fill:#dbe7f5}}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f"<style>{style}</style>",
        f"<defs>{marker('forward', FORWARD)}{marker('backward', BACKWARD)}</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        word("forward: what each node computes", (690, 50), "forward"),
        word("backward: the gradient of the loss with respect to it", (690, 76), "backward"),
    ]
    for start, end, forward, forward_place, backward, backward_place in EDGES:
        parts.append(arrow(NODES[start], NODES[end], "forward"))
        parts.append(arrow(NODES[end], NODES[start], "backward"))
        parts.append(word(forward, forward_place, "forward"))
        parts.append(word(backward, backward_place, "backward"))
    parts += [node(name) for name in NODES]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
