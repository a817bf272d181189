"""What is made of the page: the chart, and the figures that other documents quote between their markers."""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import ceil

from benchmarking.loads import LOADS, SERVICE
from benchmarking.report import COSTS, table

DOCUMENTS = ("README.md", "docs/scaling.md")
"""Those that quote figures, below the project's root."""

_LOADS = [LOADS[load].title for load in ("hot", "exhausted", "rows")]
_STYLE = """
    svg { background: #fff; font: 13px sans-serif }
    text { fill: #1f2328 }
    .head, .ours { font-weight: bold }
    rect { fill: #8fa8cc }
    rect.ours { fill: #1a7f5a }
    line { stroke: #1f2328 }
    polyline { fill: none; stroke: #1a7f5a; stroke-width: 1.5 }
    @media (prefers-color-scheme: dark) {
        svg { background: #0d1117 }
        text { fill: #e6edf3 }
        rect { fill: #4a6590 }
        rect.ours { fill: #2ea87a }
        line { stroke: #e6edf3 }
    }
"""
_WIDTH, _LEFT, _RIGHT, _ROW, _GAP = 860, 230, 80, 22, 24
_MARGIN, _PANEL = 70, 160


def rows_of(page: str, heading: str) -> Sequence[Mapping[str, str]]:
    """The first table under a heading of the page: its rows, by the names of the columns; none if it is not there."""
    lines = page.partition(f"# {heading}\n")[2].partition("\n#")[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def chart(page: str) -> str:
    """An SVG with a bar for each contender under each load, and a line from its least to its greatest round."""
    panels = {load: rates for load in _LOADS if (rates := _rates(page, load))}
    most = max((max(rate) for rates in panels.values() for rate in rates.values()), default=1)
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    y, parts = 0.0, []
    for load, rates in panels.items():
        y += _GAP + _ROW
        parts.append(f'<text x="8" y="{y - 8}" class="head">{load}: requests per second, 256 connections</text>')
        for who, rate in rates.items():
            middle, least, greatest = (_LEFT + figure * scale for figure in rate)
            kind = "ours" if who.startswith(SERVICE) else "other"
            parts += [
                f'<text x="{_LEFT - 8}" y="{y + 15}" class="{kind}" text-anchor="end">{escape(who)}</text>',
                f'<rect x="{_LEFT}" y="{y + 2}" width="{middle - _LEFT:.1f}" height="{_ROW - 4}" class="{kind}"/>',
                f'<line x1="{least:.1f}" x2="{greatest:.1f}" y1="{y + 11}" y2="{y + 11}"/>',
                f'<text x="{greatest + 6:.1f}" y="{y + 15}">{rate[0]:,.0f}</text>',
            ]
            y += _ROW
    return _svg(y + _GAP, parts)


def lines(minutes: Sequence[float], panels: Mapping[str, Sequence[float]], marks: Sequence[float]) -> str:
    """An SVG with a line over time for each panel, from zero; `marks`: when something happened, in each of them."""
    across = (_WIDTH - _MARGIN - _RIGHT) / minutes[-1]
    y, parts = 0.0, []
    for name, values in panels.items():
        y += _GAP + _ROW
        down = _PANEL / (max(values) or 1)
        points = " ".join(
            f"{_MARGIN + minute * across:.1f},{y + _PANEL - value * down:.1f}"
            for minute, value in zip(minutes, values, strict=True)
        )
        parts.append(f'<text x="8" y="{y - 8}" class="head">{escape(name)} (dashed: a checkpoint begins)</text>')
        parts += (
            f'<line x1="{_MARGIN + mark * across:.1f}" x2="{_MARGIN + mark * across:.1f}" y1="{y}" y2="{y + _PANEL}" '
            'stroke-dasharray="2 4"/>'
            for mark in marks
        )
        parts += [
            f'<line x1="{_MARGIN}" x2="{_WIDTH - _RIGHT}" y1="{y + _PANEL}" y2="{y + _PANEL}"/>',
            f'<polyline points="{points}"/>',
            f'<text x="{_MARGIN - 6}" y="{y + 12}" text-anchor="end">{max(values):,.0f}</text>',
            f'<text x="{_MARGIN - 6}" y="{y + _PANEL}" text-anchor="end">0</text>',
            f'<text x="{_WIDTH - _RIGHT}" y="{y + _PANEL + 16}" text-anchor="end">{minutes[-1]:.0f} minutes</text>',
        ]
        y += _PANEL
    return _svg(y + _GAP, parts)


def _svg(height: float, parts: Sequence[str]) -> str:
    size = f'width="{_WIDTH}" height="{height:.0f}" viewBox="0 0 {_WIDTH} {height:.0f}"'
    body = "\n".join([f"<style>{_STYLE}</style>", *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def quoted(document: str, page: str) -> str:
    """A document with the figures of the page between its markers, `<!-- figures: NAME -->` and `<!-- end -->`."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{_QUOTES[found[2]](page)}\n\n{found[3]}"

    return re.sub(r"(<!-- figures: (\w+) -->)\n.*?(<!-- end -->)", block, document, flags=re.DOTALL)


def _rates(page: str, load: str) -> Mapping[str, Sequence[float]]:
    """Requests per second of each contender, 256 connections: the median, the least, the greatest."""
    rows = [row for row in rows_of(page, load) if row["connections"] == "256"]
    found = {row[""].strip("*"): re.findall(r"[\d,]+", row["requests/s"]) for row in rows}
    return {who: [_number(figure) for figure in figures * 3][:3] for who, figures in found.items()}


def _number(cell: str) -> float:
    return float(cell.replace(",", ""))


def _speed(page: str) -> str:
    """The medians of the chart."""
    rates = {load: _rates(page, load) for load in _LOADS}
    rows = [[who, *(f"{of[who][0]:,.0f}" if who in of else "-" for of in rates.values())] for who in rates[_LOADS[0]]]
    bold = ([f"**{cell}**" for cell in row] if row[0] == SERVICE else row for row in rows)
    return table(["requests per second", *_LOADS], bold)


def _costs(page: str) -> str:
    """What a change costs, without what is explained on the page alone."""
    rows = rows_of(page, COSTS)
    shown = [name for name in rows[0] if name not in ("predicted", "p99 ms", "load µs")]
    return table(shown, ([row[name] for name in shown] for row in rows))


def _example(page: str) -> str:
    """How many processes, cores and bytes a load takes, by the costs of 1,000 rows and two workers."""
    (row,) = [row for row in rows_of(page, COSTS) if [*row.values()][:3] == ["1,000 rows", "256", "2"]]
    service_us, store_us = _number(row["service µs"]), _number(row["store µs"])
    disk, wal = _number(row["disk bytes"]), _number(row["WAL bytes"])
    processes, cores = (15_000 * cpu_us / 1e6 / 0.7 for cpu_us in (service_us, store_us))
    return f"""\
    processes       15,000 x {service_us:.0f} µs / 0.7 = {processes:.2f}, so {ceil(processes)}
    database cores  15,000 x {store_us:.0f} µs / 0.7 = {cores:.2f}, so {ceil(cores)}
    connections     {ceil(processes)} x (4 + 10) = {ceil(processes) * 14}
    disk a day      2,000 x 86,400 x {disk:.0f} bytes = {2_000 * 86_400 * disk / 1e9:.1f} GB
    WAL a day       2,000 x 86,400 x {wal:.0f} bytes = {2_000 * 86_400 * wal / 1e9:.1f} GB"""


_QUOTES: Mapping[str, Callable[[str], str]] = {"speed": _speed, "costs": _costs, "example": _example}
