"""A check as an HTML page: one file, nothing loaded from anywhere, plots as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from po.prep.findings import SHOWN, Finding

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1a2330; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .25rem .8rem; text-align: left; }
th { border-bottom: 2px solid #9fb0c3; } td { border-bottom: 1px solid #dde5ee; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } .no { color: #b3261e; font-weight: 600; }
.yes { color: #1b6b3a; } .plots { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; }
figcaption { font-weight: 600; }
svg { background: #f5f8fb; } rect { fill: #3b6ea5; } text { font-size: 11px; fill: #1a2330; }
code { font-size: 13px; } small { color: #55657a; }
"""
_WIDTH, _HEIGHT = 420, 160


def page(title: str, findings: Sequence[Finding], figures: Mapping[str, Any], bars: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        _findings(findings),
        "<div class='plots'>",
        *(plot(name, values) for name, values in bars.items()),
        "</div>",
        *(_section(name, value) for name, value in figures.items() if value),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _findings(findings: Sequence[Finding]) -> str:
    rows = []
    for f in findings:
        mark = "<span class='yes'>fine</span>" if f.fine else "<span class='no'>too many</span>"
        lines = "<br>".join(f"<code>{escape(line)}</code>" for line in f.examples[:SHOWN])
        cells = f"<td>{escape(f.says)}<br><small>{escape(f.name)}</small></td><td class='n'>{f.count}</td>"
        cells += f"<td class='n'>{f.share:.2%}</td><td class='n'>{f.limit:.2%}</td><td>{mark}</td><td>{lines}</td>"
        rows.append(f"<tr>{cells}</tr>")
    head = "<tr><th>what</th><th>count</th><th>share</th><th>allowed</th><th></th><th>first ones</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def plot(name: str, bars: Sequence[tuple[float, float, int]]) -> str:
    """A histogram."""
    top, width = max(n for _, _, n in bars) or 1, _WIDTH / len(bars)
    shapes = [
        f"<rect x='{i * width:.1f}' y='{_HEIGHT - n / top * (_HEIGHT - 20):.1f}' width='{max(width - 1, 1):.1f}' "
        f"height='{n / top * (_HEIGHT - 20):.1f}'><title>{low:g} to {high:g}: {n}</title></rect>"
        for i, (low, high, n) in enumerate(bars)
    ]
    ends = (
        f"<text x='2' y='{_HEIGHT + 14}'>{bars[0][0]:g}</text>"
        f"<text x='{_WIDTH - 2}' y='{_HEIGHT + 14}' text-anchor='end'>{bars[-1][1]:g}</text>"
        f"<text x='2' y='12'>{top}</text>"
    )
    size = f"width='{_WIDTH}' height='{_HEIGHT + 20}' role='img'"
    return f"<figure><figcaption>{escape(name)}</figcaption><svg {size}>{''.join(shapes)}{ends}</svg></figure>"


def _section(name: str, value: Any) -> str:
    return f"<h2>{escape(name.replace('_', ' '))}</h2>{_value(value)}"


def _value(value: Any) -> str:
    """Objects of objects and lists of objects as tables with a column per key, other objects as a line per key."""
    if isinstance(value, Mapping) and value and all(isinstance(v, Mapping) for v in value.values()):
        return _table([{"": k, **v} for k, v in value.items()])
    if isinstance(value, Mapping):
        lines = (f"<tr><td>{escape(k.replace('_', ' '))}</td><td>{_value(v)}</td></tr>" for k, v in value.items())
        return f"<table>{''.join(lines)}</table>"
    if isinstance(value, list):
        return _table(value)
    if isinstance(value, int | float):
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
    return escape(str(value))


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    head = "".join(f"<th>{escape(str(c))}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_value(row.get(c, str()))}</td>' for c in columns)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
