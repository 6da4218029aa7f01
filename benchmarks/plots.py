"""Bars and lines as SVG by matplotlib, to stand in a page that needs nothing else."""

import io
from collections.abc import Mapping, Sequence

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

__all__ = ["bars", "lines"]

_PEER, _OURS = "#9ca3af", "#2563eb"
# Texts stay texts, of the page's own font, whatever signs they have.
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def bars(title: str, values: Mapping[str, float], peers: set[str]) -> Markup:
    """A bar for each value, in their order; peers in grey."""
    with rc_context(_STYLE):
        figure, axes = _drawing(6.8, 0.24 * len(values) + 0.5, title)
        drawn = axes.barh(
            range(len(values)), list(values.values()), color=[_PEER if name in peers else _OURS for name in values]
        )
        axes.bar_label(drawn, fmt="{:,.4g}", padding=4)
        axes.set_yticks(range(len(values)), [name[-32:] for name in values])
        axes.tick_params(left=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.xaxis.set_visible(False)
        axes.invert_yaxis()
        axes.margins(x=0.15, y=0.02)
        return _svg(figure)


def lines(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Sequence[float]]]) -> Markup:
    """Points joined by lines on two logarithmic axes; nothing where no point is on them."""
    seen = {name: [point for point in some if min(point[0], point[1]) > 0] for name, some in series.items()}
    if not any(seen.values()):
        return Markup()
    with rc_context(_STYLE):
        figure, axes = _drawing(7.2, 3.4, title)
        for name, some in seen.items():
            axes.loglog([point[0] for point in some], [point[1] for point in some], marker="o", label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", frameon=False)
        return _svg(figure)


def _drawing(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """An empty drawing of this size in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _svg(figure: Figure) -> Markup:
    """The drawing as an element of a page: without a head of its own, and without when and by what it was made."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])
