"""How a report is written down: sections of tables and charts as one HTML page that needs nothing else, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

from rectilinear.measure import charts


class Cell(NamedTuple):
    """What a cell says, and the ratio that colours it."""

    text: str
    ratio: float | None = None


@dataclass
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    title: str = ""


@dataclass
class Section:
    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    charts: list[str] = field(default_factory=list)
    folded: dict[str, list[Table]] = field(default_factory=dict)
    """Tables that most readers can do without, by the line that unfolds them."""
    alarm: bool = False


_STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff }
body { max-width: 70rem; margin: 0 auto; padding: 1rem }
h1 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 2px solid #0072B2 }
.scroll { overflow-x: auto; margin: .6rem 0 1.4rem } caption { text-align: left; font-weight: bold; padding: .3rem 0 }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { border: 1px solid #ccc; padding: .2rem .5rem; text-align: left; vertical-align: top; white-space: nowrap }
td.long { white-space: normal; min-width: 14rem } th { background: #f2f2f2 }
td.number { text-align: right; print-color-adjust: exact; -webkit-print-color-adjust: exact }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem }
figure { margin: 0; flex: 1 1 min(100%, 26rem); max-width: 36rem }
figure svg { width: 100%; height: auto; font: 12.5px system-ui, sans-serif } figcaption { font-weight: bold }
.legend { font-size: .86rem } .legend span { white-space: nowrap; margin-right: 1rem }
svg.swatch { width: 22px; height: 12px; margin-right: .3rem }
summary { cursor: pointer; color: #005a8c; padding: .3rem 0 }
.alarm { border: 3px solid #D55E00; padding: 0 1rem } .alarm h2 { border: 0; margin-top: .6rem }
@media (max-width: 40rem) { body { padding: .6rem } table { font-size: .76rem } th, td { padding: .15rem .3rem } }
@media print { body { max-width: none; font-size: 11px } .scroll { overflow: visible } table { font-size: 8px }
  th, td, td.number { white-space: normal; min-width: 0 !important; padding: 1px 3px }
  tr, figure { break-inside: avoid } h2 { break-after: avoid } }
"""
LONG = 42
"""Characters from which on a cell is wrapped."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The browser is told to fetch nothing, whatever the page says."""


def html(title: str, subtitle: str, sections: Iterable[Section]) -> str:
    """One page that needs no network."""
    parts = [f"<h1>{escape(title)}</h1><p>{escape(subtitle)}</p>"]
    for section in sections:
        parts.append(f"<section{' class=alarm' if section.alarm else ''}><h2>{escape(section.title)}</h2>")
        parts.append(f"<p>{escape(section.text)}</p>" if section.text else "")
        parts.append(f'<div class="charts">{"".join(section.charts)}</div>' if section.charts else "")
        parts += [_html_table(table) for table in section.tables]
        for summary, tables in section.folded.items():
            parts.append(f"<details><summary>{escape(summary)}</summary>{''.join(map(_html_table, tables))}</details>")
        parts.append("</section>")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body>{"".join(parts)}</body></html>
"""


def _html_table(table: Table) -> str:
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    body = "".join(f"<tr>{''.join(_html_cell(cell) for cell in row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return f"<td{' class=long' if len(cell) > LONG else ''}>{escape(cell)}</td>"
    return f'<td class="number" style="background:{charts.shade(cell.ratio or 1.0)}">{escape(cell.text)}</td>'


def markdown(title: str, subtitle: str, sections: Iterable[Section]) -> str:
    """The tables of the page."""
    parts = [f"# {title}", subtitle]
    for section in sections:
        parts += [f"## {section.title}"] + ([section.text.strip()] if section.text else [])
        parts += _markdown_tables(section.tables)
        for summary, tables in section.folded.items():
            parts += [f"<details><summary>{escape(summary)}</summary>", *_markdown_tables(tables), "</details>"]
    return "\n\n".join(parts) + "\n"


def _markdown_tables(tables: Iterable[Table]) -> list[str]:
    return [text for table in tables for text in ([f"**{table.title}**"] if table.title else []) + [_markdown_table(table)]]


def _markdown_table(table: Table) -> str:
    def line(cells: Iterable[Cell | str]) -> str:
        return "| " + " | ".join((c if isinstance(c, str) else c.text).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(table.header), line(["---"] * len(table.header)), *map(line, table.rows)])
