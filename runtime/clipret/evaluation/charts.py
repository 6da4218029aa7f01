"""Charts of an evaluation as SVG with a table of its numbers, drawn by a template.

matplotlib is larger than the rest of the lean runtime, and its colours would not follow the light and dark themes of
the page. Each drawing has a text alternative, and series differ in more than colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

__all__ = ["Chart", "Matrix", "Plot", "Table", "curve", "histogram"]

_WIDTH, _HEIGHT = 480, 270  # of a drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 40  # margins of a drawing, for the axes


@dataclass(frozen=True)
class Chart:
    """A chart with a heading and a note. `kind` names the macro of charts.html.j2 that draws it."""

    kind: ClassVar[str]
    title: str
    note: str


@dataclass(frozen=True)
class Table(Chart):
    """A table with names in the first column and figures in the others."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Matrix(Chart):
    """Counts by wanted value (rows) and found value (columns), and a share from 0 to 1 of each row, `among`."""

    kind: ClassVar[str] = "matrix"
    wanted: Sequence[str]
    found: Sequence[str]
    counts: Sequence[Sequence[int]]
    among: Sequence[float]


@dataclass(frozen=True)
class Plot(Table):
    """A drawing, with a table of its numbers.

    Attributes:
        axis: The quantity on the x axis.
        levels: Horizontal lines: y and label.
        ticks: Ticks of the x axis: x and label.
        line: The points of a line.
        dots: Dots: x, y and label.
        areas: Filled areas: CSS class, path and name.
    """

    kind: ClassVar[str] = "plot"
    size: ClassVar[tuple[int, int]] = (_WIDTH, _HEIGHT)
    left: ClassVar[int] = _LEFT
    right: ClassVar[int] = _WIDTH - _RIGHT
    bottom: ClassVar[int] = _HEIGHT - _BOTTOM
    axis: str
    levels: Sequence[tuple[str, str]]
    ticks: Sequence[tuple[str, str]]
    line: str = ""
    dots: Sequence[tuple[str, str, str]] = ()
    areas: Sequence[tuple[str, str, str]] = ()


def curve(title: str, note: str, points: Sequence[tuple[int, float]], marked: Sequence[int]) -> Plot:
    """Plot shares from 0 to 1 over a whole number k >= 1 on a logarithmic axis.

    Args:
        title: The heading.
        note: The text below it.
        points: k, ascending from 1, and the share.
        marked: The values of k that have a dot and a row in the table.
    """
    last, value = max(points[-1][0], 2), dict(points)

    def x(k: int) -> str:
        return _across(math.log(k) / math.log(last))

    powers = [10**power for power in range(int(math.log10(last)) + 1)]
    ticks = powers if len(powers) > 3 else [k for power in powers for k in (power, 2 * power, 5 * power) if k <= last]
    return Plot(
        title,
        note,
        head=("k", "recall@k"),
        rows=[(f"{k}", f"{value[k]:.2%}") for k in marked],
        axis="k",
        levels=[(_up(share), f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)],
        ticks=[(x(k), f"{k:,}") for k in ticks],
        line=" ".join(f"{x(k)},{_up(share)}" for k, share in points),
        dots=[(x(k), _up(value[k]), f"{k}: {value[k]:.2%}") for k in marked],
    )


def histogram(
    title: str, note: str, edges: Sequence[float], right: Sequence[int], wrong: Sequence[int], names: tuple[str, str]
) -> Plot:
    """Plot two series of counts over the same bins, each as shares of its total.

    Args:
        title: The heading.
        note: The text below it.
        edges: Edges of the bins, one more than bins.
        right: Counts of the first series.
        wrong: Counts of the second series.
        names: Names of the two series.
    """
    shares = [[count / max(sum(counts), 1) for count in counts] for counts in (right, wrong)]
    largest = max(*shares[0], *shares[1], 1e-9)
    low, high = edges[0], edges[-1]

    def x(value: float) -> str:
        return _across((value - low) / ((high - low) or 1.0))

    def path(series: Sequence[float]) -> str:
        steps = "".join(f"V{_up(share / largest)}H{x(edge)}" for share, edge in zip(series, edges[1:], strict=True))
        return f"M{x(low)} {_up(0)}{steps}V{_up(0)}Z"

    rows = [
        (f"{start:.3f} to {end:.3f}", f"{right_count}", f"{wrong_count}")
        for start, end, right_count, wrong_count in zip(edges, edges[1:], right, wrong, strict=False)
    ]
    quarters = [low + (high - low) * part / 4 for part in range(5)]
    return Plot(
        title,
        note,
        head=("score", *names),
        rows=rows,
        axis="score",
        levels=[(_up(share), f"{largest * share:.1%}") for share in (0.0, 0.5, 1.0)],
        ticks=[(x(value), f"{value:.2f}") for value in quarters],
        areas=[("right", path(shares[0]), names[0]), ("wrong", path(shares[1]), names[1])],
    )


def _across(share: float) -> str:
    return f"{_LEFT + share * (_WIDTH - _LEFT - _RIGHT):.1f}"


def _up(share: float) -> str:
    return f"{_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM):.1f}"
