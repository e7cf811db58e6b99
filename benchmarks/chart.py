"""The chart of the page: bars on a logarithmic scale, as SVG, readable on a light and on a dark ground."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from benchmarks.results import Results
from benchmarks.sides import LIMIT, PREFORK
from benchmarks.table import shown

WIDTH, LEFT, RIGHT = 760, 110, 90
BAR, GAP, HEAD, FOOT = 16, 6, 34, 30
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 }
.title { font-weight: 600; font-size: 13px }
.grid { stroke: #888; stroke-opacity: .35 }
.spread { stroke: #333; stroke-width: 1.5 }
.prefork { fill: #1f77b4 }
.limit { fill: #9aa4ad }
.peer { fill: #d9a441 }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd }
  .spread { stroke: #ddd }
  .prefork { fill: #58a6e0 }
  .limit { fill: #6d767e }
  .peer { fill: #c08a2c }
}
"""
# row, key, key of what the line on the bar reaches to (nothing: from the least to the greatest round), title
PANELS = (
    ("throughput-2", "rate", "", "no-op tasks a second, concurrency 2 (more is better)"),
    ("throughput-10", "rate", "", "no-op tasks a second, concurrency 10 (more is better)"),
    ("latency-20", "p50", "p99", "start latency in ms, tasks 20 ms apart: median, line to the 99th percentile"),
    ("latency-200", "p50", "p99", "start latency in ms, tasks 200 ms apart: median, line to the 99th percentile"),
    ("enqueue", "one", "", "tasks enqueued a second, one by one, one producer (more is better)"),
)


@dataclass(frozen=True)
class Bar:
    """One side's value, and the line on it."""

    name: str
    value: float
    low: float
    high: float
    label: str

    @property
    def kind(self) -> str:
        return PREFORK if self.name.startswith(PREFORK) else LIMIT if self.name == LIMIT else "peer"


def svg(everything: Sequence[Results]) -> str:
    """The chart of all that was measured for more than one side; nothing if there is none."""
    by_name = {results.row.name: results for results in everything}
    parts: list[str] = []
    top = 0
    for row, key, to, title in PANELS:
        bars = _bars(by_name[row], key, to) if row in by_name else []
        if len(bars) > 1:
            parts.append(f'<g transform="translate(0 {top})">\n{_panel(title, bars)}</g>\n')
            top += HEAD + len(bars) * (BAR + GAP) + FOOT
    if not parts:
        return ""
    size = f'viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return f"{head}\n<style>{STYLE}</style>\n{''.join(parts)}</svg>\n"


def _bars(results: Results, key: str, to: str) -> list[Bar]:
    bars = []
    for name in results.rounds:
        values = [value for value in results.values(name, key) if value > 0]
        ends = [value for value in results.values(name, to) if value > 0] if to else values
        if values and ends:
            median = statistics.median(values)
            low, high = (median, statistics.median(ends)) if to else (min(values), max(values))
            label = f"{shown(median)} / {shown(high)}" if to else shown(median)
            bars.append(Bar(name, median, low, high, label))
    return sorted(bars, key=lambda bar: bar.value, reverse=not to)


def _panel(title: str, bars: list[Bar]) -> str:
    first = math.floor(math.log10(min(bar.value for bar in bars)) - 0.3)
    last = math.log10(max(max(bar.value, bar.high) for bar in bars))
    scale = (WIDTH - LEFT - RIGHT) / (last - first)

    def x(value: float) -> float:
        return round(LEFT + (math.log10(value) - first) * scale, 1)

    bottom = HEAD + len(bars) * (BAR + GAP)
    lines = [f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>']
    for power in range(first, math.floor(last) + 1):
        at = x(10.0**power)
        lines.append(f'<line class="grid" x1="{at}" y1="{HEAD - 4}" x2="{at}" y2="{bottom}"/>')
        lines.append(f'<text x="{at}" y="{bottom + 14}" text-anchor="middle">{10.0**power:,g}</text>')
    for number, bar in enumerate(bars):
        y, middle = HEAD + number * (BAR + GAP), HEAD + number * (BAR + GAP) + BAR / 2
        lines.append(f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end">{escape(bar.name)}</text>')
        width = round(x(bar.value) - LEFT, 1)
        lines.append(f'<rect class="{bar.kind}" x="{LEFT}" y="{y}" width="{width}" height="{BAR}" rx="2"/>')
        lines.append(f'<line class="spread" x1="{x(bar.low)}" y1="{middle}" x2="{x(bar.high)}" y2="{middle}"/>')
        lines.append(f'<text x="{x(max(bar.value, bar.high)) + 6}" y="{middle + 4}">{bar.label}</text>')
    return "\n".join(lines) + "\n"
