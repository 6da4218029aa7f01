"""Charts of an evaluation as pieces of a page: drawings in SVG with their numbers in a table beneath, and matrices.

No script and no library: colours come from the page's style sheet, so that they follow its light and its dark. What a
drawing shows is said in words to those who cannot see it, and series differ in more than their colour.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

__all__ = ["STYLE", "charts", "curve", "histogram", "matrix", "shares"]

_WIDTH, _HEIGHT = 480, 270
_WIDE = 5  # columns of a matrix that do not fit beside another chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 40  # of the drawing's edges, for the axes


def charts(pieces: Sequence[str]) -> str:
    """Several charts side by side, as far as the page is wide."""
    return f'<div class="charts">{"".join(pieces)}</div>' if pieces else ""


def curve(title: str, note: str, points: Sequence[tuple[int, float]], marked: Sequence[int]) -> str:
    """Shares of 0 to 1 over a whole number k >= 1 on a logarithmic axis, k ascending from 1.

    `marked` are those k that have a dot with its value, and a row of the table.
    """
    last = max(points[-1][0], 2)

    def at(k: int, share: float) -> tuple[float, float]:
        return _across(math.log(k) / math.log(last)), _up(share)

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(k, share) for k, share in points))
    levels = (line for share in (0, 0.25, 0.5, 0.75, 1) for line in _level(share, f"{share:.0%}"))
    drawn = [*levels, *_marks_of_k(last, at)]
    drawn.append(f'<polyline class="line" points="{path}"/>')
    value = dict(points)
    for k in marked:
        x, y = at(k, value[k])
        drawn.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{k}: {value[k]:.2%}</title></circle>'
        )
    rows = [(f"{k}", f"{value[k]:.2%}") for k in marked]
    return _figure(title, note, "".join(drawn), ("k", "recall@k"), rows)


def histogram(
    title: str, note: str, edges: Sequence[float], right: Sequence[int], wrong: Sequence[int], names: tuple[str, str]
) -> str:
    """Two series of counts in the same bins, `edges` being one more; each is drawn in shares of its own total."""
    shares_of = [[count / max(sum(counts), 1) for count in counts] for counts in (right, wrong)]
    most = max(*shares_of[0], *shares_of[1], 1e-9)
    low, high = edges[0], edges[-1]

    def x(value: float) -> float:
        return _across((value - low) / ((high - low) or 1.0))

    drawn = [line for share in (0.0, 0.5, 1.0) for line in _level(share, f"{most * share:.1%}")]
    for part in range(5):
        value = low + (high - low) * part / 4
        drawn.append(_tick(x(value), f"{value:.2f}"))
    drawn.append(_axis_name("score"))
    for kind, series in (("wrong", shares_of[1]), ("right", shares_of[0])):
        steps = "".join(
            f"V{_up(share / most):.1f}H{x(edge):.1f}" for share, edge in zip(series, edges[1:], strict=True)
        )
        drawn.append(f'<path class="{kind}" d="M{x(low):.1f} {_up(0):.1f}{steps}V{_up(0):.1f}Z"/>')
    key = '<svg width="22" height="12" aria-hidden="true"><rect class="{}" x="1" y="1" width="20" height="10"/></svg>'
    kinds = "".join(
        f"<span>{key.format(kind)} {escape(name)}</span>" for kind, name in zip(("right", "wrong"), names, strict=True)
    )
    legend = f'<p class="legend">{kinds}</p>'
    rows = [
        (f"{start:.3f} to {end:.3f}", f"{one}", f"{other}")
        for start, end, one, other in zip(edges, edges[1:], right, wrong, strict=False)
    ]
    return _figure(title, note, "".join(drawn), ("score", *names), rows, legend)


def matrix(
    title: str,
    note: str,
    wanted: Sequence[str],
    found: Sequence[str],
    counts: Sequence[Sequence[int]],
    among: Sequence[float],
) -> str:
    """Counts by what was wanted (rows) and what was found (columns), and a last column of shares, 0 to 1.

    The shade of a cell is its share of its row. Where the two names are equal the cell is framed.
    """
    head = "".join(f'<th scope="col" lang="" dir="auto">{escape(name)}</th>' for name in found)
    lines = []
    for name, row, share in zip(wanted, counts, among, strict=True):
        total = max(sum(row), 1)
        cells = "".join(
            f'<td{" class=same" if other == name else ""} style="--share:{count / total:.3f}">{count or "·"}</td>'
            for other, count in zip(found, row, strict=True)
        )
        lines.append(
            f'<tr><th scope="row" lang="" dir="auto">{escape(name)}</th>{cells}<td class="among">{share:.1%}</td></tr>'
        )
    kind = "matrix wide" if len(found) > _WIDE else "matrix"
    table = (
        f'<table class="{kind}"><thead><tr><th scope="col">wanted ↓ found →</th>{head}'
        f'<th scope="col">of the first 10</th></tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )
    return _framed(
        title, note, f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{table}</div>'
    )


def shares(title: str, note: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: names in the first column, figures in the others."""
    return _framed(title, note, _table(head, rows))


def _figure(
    title: str, note: str, drawn: str, head: Sequence[str], rows: Sequence[Sequence[str]], legend: str = ""
) -> str:
    svg = (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{title}. {note}")}">'
        f"<title>{escape(title)}</title>{drawn}</svg>"
    )
    return _framed(title, note, f"{svg}{legend}<details><summary>Table</summary>{_table(head, rows)}</details>")


def _framed(title: str, note: str, content: str) -> str:
    caption = f"<figcaption><h2>{escape(title)}</h2><p>{escape(note)}</p></figcaption>"
    return f'<figure class="chart">{caption}{content}</figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = [
        f'<tr><th scope="row" lang="" dir="auto">{escape(name)}</th>'
        f"{''.join(f'<td>{escape(value)}</td>' for value in more)}</tr>"
        for name, *more in rows
    ]
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _across(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _up(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _level(share: float, text: str) -> tuple[str, str]:
    y = f"{_up(share):.1f}"
    return (
        f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>',
        f'<text class="tick" x="{_LEFT - 6}" y="{y}" dy=".32em" text-anchor="end">{text}</text>',
    )


def _marks_of_k(last: int, at: Callable[[int, float], tuple[float, float]]) -> list[str]:
    powers = [10**power for power in range(int(math.log10(last)) + 1)]
    wanted = powers if len(powers) > 3 else [k for power in powers for k in (power, 2 * power, 5 * power) if k <= last]
    return [*(_tick(at(k, 0)[0], f"{k:,}") for k in wanted), _axis_name("k")]


def _tick(x: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{text}</text>'


def _axis_name(text: str) -> str:
    return f'<text class="tick" x="{_across(0.5):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{text}</text>'


STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 26px 40px; }
.chart { min-width: 0; max-width: 720px; }
.chart figcaption { padding: 0 0 8px; font-size: .82rem; }
.chart h2 { font-size: 1.08rem; font-weight: 600; color: var(--ink); }
.plot { display: block; width: 100%; height: auto; overflow: visible; }
.tick { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); fill: none; }
.line { fill: none; stroke: var(--link); stroke-width: 2; stroke-linejoin: round; }
.dot { fill: var(--link); stroke: var(--paper); stroke-width: 1.5; }
svg .right { fill: var(--right); fill-opacity: .3; stroke: var(--right); stroke-width: 1.5; }
svg .wrong { fill: var(--soft); fill-opacity: .18; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 4 3; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; padding: 2px 0 6px; color: var(--soft); font-size: .82rem; }
.legend svg { vertical-align: -1px; }
.chart details { font-size: .82rem; }
.chart summary { color: var(--soft); cursor: pointer; border-radius: 6px; width: max-content; padding: 2px 4px; }
.chart table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
.chart th { text-align: left; font-weight: 600; padding: 3px 10px 3px 0; }
.chart thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
.chart td { text-align: right; padding: 3px 10px; }
.chart thead th:not(:first-child) { text-align: right; padding: 3px 10px; }
.scroll { overflow: auto; max-width: 100%; }
.chart:has(.wide) { grid-column: 1 / -1; max-width: none; }
.matrix { min-width: max-content; }
.matrix tbody th { position: sticky; left: 0; background: var(--paper); }
.chart .matrix td, .chart .matrix thead th:not(:first-child) { padding: 3px 8px; }
.shown { color: var(--soft); }
.matrix td { background: rgb(from var(--link) r g b / calc(var(--share, 0) * .45)); border: 1px solid var(--paper); }
.matrix td.same { outline: 2px solid var(--right); outline-offset: -2px; }
"""
