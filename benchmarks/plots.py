"""Bars and lines as SVG, with what a report needs and no more."""

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["bars", "lines"]

_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563")
_PEER, _OURS = "#9ca3af", "#2563eb"
_STYLE = 'font-family="system-ui,sans-serif" font-size="12" fill="currentColor"'


def bars(title: str, values: Mapping[str, float], peers: set[str]) -> str:
    """A bar for each value, longest 360 pixels; peers in grey."""
    most = max((abs(value) for value in values.values()), default=0.0) or 1.0
    height = 20 * len(values) + 26
    parts = [f'<text x="0" y="14" font-weight="600" {_STYLE}>{escape(title)}</text>']
    for number, (name, value) in enumerate(values.items()):
        y, wide = 24 + 20 * number, max(1.0, 360 * abs(value) / most)
        parts.append(f'<text x="216" y="{y + 12}" text-anchor="end" {_STYLE}>{escape(name[-32:])}</text>')
        colour = _PEER if name in peers else _OURS
        parts.append(f'<rect x="222" y="{y}" width="{wide:.1f}" height="15" rx="2" fill="{colour}"/>')
        parts.append(f'<text x="{228 + wide:.1f}" y="{y + 12}" {_STYLE}>{value:,.4g}</text>')
    return _svg(680, height, parts, title)


def lines(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Points joined by lines on two logarithmic axes."""
    points = [point for some in series.values() for point in some if min(point[0], point[1]) > 0]
    if not points:
        return ""
    low_x, high_x = _decades([point[0] for point in points])
    low_y, high_y = _decades([point[1] for point in points])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - low_x) / (high_x - low_x)
        up = (math.log10(y) - low_y) / (high_y - low_y)
        return 70 + 400 * across, 290 - 240 * up

    parts = [f'<text x="0" y="14" font-weight="600" {_STYLE}>{escape(title)}</text>']
    for power in range(low_x, high_x + 1):
        x, _ = at(10.0**power, 10.0**low_y)
        parts.append(f'<path d="M{x:.1f} 50V290" stroke="currentColor" stroke-opacity="0.15"/>')
        parts.append(f'<text x="{x:.1f}" y="306" text-anchor="middle" {_STYLE}>{_power(power)}</text>')
    for power in range(low_y, high_y + 1):
        _, y = at(10.0**low_x, 10.0**power)
        parts.append(f'<path d="M70 {y:.1f}H470" stroke="currentColor" stroke-opacity="0.15"/>')
        parts.append(f'<text x="64" y="{y + 4:.1f}" text-anchor="end" {_STYLE}>{_power(power)}</text>')
    parts.append(f'<text x="270" y="324" text-anchor="middle" {_STYLE}>{escape(x_label)}</text>')
    parts.append(f'<text x="0" y="36" {_STYLE}>{escape(y_label)}</text>')
    for number, (name, some) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        drawn = [at(x, y) for x, y in some if min(x, y) > 0]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in drawn)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in drawn]
        parts.append(f'<rect x="486" y="{52 + 20 * number}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="504" y="{63 + 20 * number}" {_STYLE}>{escape(name)}</text>')
    return _svg(760, 332, parts, title)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)
    return low, max(high, low + 1)


def _power(power: int) -> str:
    return f"{10.0**power:,.{max(0, -power)}f}" if -4 < power < 7 else f"1e{power}"


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
