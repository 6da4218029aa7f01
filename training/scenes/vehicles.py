"""The six types of vehicles as silhouettes, seen from the side, front to the right."""

from dataclasses import dataclass, field

import numpy as np

from clipret.training.scenes.brush import Brush, Color, Point, mix, shade

__all__ = ["ASPECTS", "draw_vehicle"]

GLASS: Color = (58, 74, 92)
TYRE: Color = (28, 28, 30)
RIM: Color = (176, 180, 184)


@dataclass(frozen=True)
class _Shape:
    """A silhouette in a box of 1 x 1. `aspect` is the box's width over its height. Windows are polygons."""

    aspect: float
    body: tuple[Point, ...]
    windows: tuple[tuple[Point, ...], ...]
    wheels: tuple[float, ...]
    wheel: float  # radius, as a share of the height
    doors: tuple[float, ...] = ()
    sill: float = 0.46  # height of the handles' line
    extra: tuple[tuple[Point, ...], ...] = field(default=())  # parts in a lighter shade of the body's colour


def _panes(left: float, right: float, low: float, high: float, count: int, gap: float) -> tuple[tuple[Point, ...], ...]:
    """`count` upright panes between left and right."""
    width = (right - left - gap * (count - 1)) / count
    starts = [left + n * (width + gap) for n in range(count)]
    return tuple(((x, low), (x + width, low), (x + width, high), (x, high)) for x in starts)


_SHAPES = {
    "Sedan": _Shape(
        2.75,
        ((0.01, 0.2), (0.0, 0.5), (0.04, 0.58), (0.18, 0.62), (0.3, 0.97), (0.36, 1.0), (0.58, 1.0), (0.64, 0.96),
         (0.76, 0.63), (0.95, 0.53), (0.995, 0.44), (1.0, 0.22), (0.97, 0.17), (0.03, 0.17)),
        (((0.23, 0.64), (0.325, 0.92), (0.445, 0.93), (0.445, 0.64)),
         ((0.47, 0.64), (0.47, 0.93), (0.59, 0.92), (0.7, 0.64))),
        (0.2, 0.79), 0.19, (0.235, 0.457, 0.69), 0.55,
    ),
    "SUV": _Shape(
        2.05,
        ((0.01, 0.24), (0.0, 0.6), (0.02, 0.68), (0.09, 0.96), (0.14, 1.0), (0.6, 1.0), (0.66, 0.96), (0.76, 0.68),
         (0.94, 0.62), (0.99, 0.54), (1.0, 0.28), (0.97, 0.2), (0.03, 0.2)),
        (((0.09, 0.68), (0.14, 0.92), (0.25, 0.92), (0.25, 0.68)),
         ((0.275, 0.68), (0.275, 0.92), (0.44, 0.92), (0.44, 0.68)),
         ((0.465, 0.68), (0.465, 0.92), (0.6, 0.92), (0.7, 0.68))),
        (0.2, 0.79), 0.2, (0.26, 0.453, 0.68), 0.6,
        (((0.12, 1.0), (0.12, 1.05), (0.58, 1.05), (0.58, 1.0)),),
    ),
    "Minivan": _Shape(
        2.2,
        ((0.01, 0.2), (0.0, 0.55), (0.03, 0.9), (0.07, 0.98), (0.14, 1.0), (0.55, 1.0), (0.64, 0.96), (0.84, 0.6),
         (0.97, 0.48), (1.0, 0.38), (1.0, 0.22), (0.97, 0.16), (0.03, 0.16)),
        (((0.05, 0.62), (0.07, 0.89), (0.26, 0.91), (0.26, 0.62)),
         ((0.28, 0.62), (0.28, 0.91), (0.46, 0.91), (0.46, 0.62)),
         ((0.48, 0.62), (0.48, 0.91), (0.58, 0.91), (0.62, 0.88), (0.765, 0.62))),
        (0.19, 0.81), 0.165, (0.27, 0.47, 0.7), 0.54,
    ),
    "Microbus": _Shape(
        1.95,
        ((0.01, 0.16), (0.0, 0.4), (0.01, 0.92), (0.04, 0.99), (0.1, 1.0), (0.82, 1.0), (0.88, 0.96), (0.95, 0.56),
         (0.99, 0.48), (1.0, 0.2), (0.98, 0.14), (0.03, 0.14)),
        (*_panes(0.04, 0.72, 0.6, 0.88, 4, 0.022), ((0.745, 0.6), (0.745, 0.88), (0.85, 0.88), (0.905, 0.6))),
        (0.18, 0.82), 0.15, (0.735, 0.92, 0.56), 0.5,
    ),
    "Bus": _Shape(
        3.1,
        ((0.0, 0.1), (0.0, 0.93), (0.015, 1.0), (0.97, 1.0), (0.99, 0.95), (1.0, 0.5), (1.0, 0.12), (0.99, 0.09),
         (0.01, 0.09)),
        (*_panes(0.025, 0.84, 0.52, 0.86, 8, 0.014), ((0.865, 0.2), (0.865, 0.86), (0.915, 0.86), (0.915, 0.2)),
         ((0.935, 0.5), (0.935, 0.88), (0.98, 0.88), (0.99, 0.5))),
        (0.2, 0.74), 0.13, (), 0.4,
    ),
    "Truck": _Shape(
        2.55,
        ((0.7, 0.16), (0.7, 0.86), (0.73, 0.9), (0.86, 0.9), (0.9, 0.86), (0.96, 0.56), (1.0, 0.5), (1.0, 0.2),
         (0.98, 0.16)),
        (((0.79, 0.54), (0.79, 0.82), (0.86, 0.82), (0.925, 0.54)),),
        (0.13, 0.27, 0.84), 0.135, (0.775, 0.93), 0.48,
        (((0.0, 0.27), (0.0, 1.0), (0.68, 1.0), (0.68, 0.27)),),
    ),
}  # fmt: skip

ASPECTS = {name: shape.aspect for name, shape in _SHAPES.items()}


def draw_vehicle(brush: Brush, kind: str, color: Color, rng: np.random.Generator, lamps: bool) -> None:
    """Draw a vehicle of type `kind`, its wheels on the ground; `lamps` when it is dark."""
    shape = _SHAPES[kind]
    dark, light = shade(color, -0.28), shade(color, 0.14)
    brush.polygon(((0.02, -0.02), (0.98, -0.02), (0.94, 0.05), (0.06, 0.05)), (40, 40, 44))  # its shadow
    if kind == "Truck":
        brush.box(0.02, 0.16, 0.98, 0.27, (52, 54, 58))
    for part in shape.extra:
        brush.polygon(part, light if kind == "Truck" else shade(color, -0.45))
    brush.polygon(shape.body, color)
    # The lower third lies in shade, the upper edge of the flank catches light.
    low, right, front = min(y for _, y in shape.body), 0.99, 0.7 if kind == "Truck" else 0.01
    brush.box(front, low, right, low + 0.1, dark, 0.03)
    if kind == "Truck":
        for x in np.linspace(0.06, 0.62, 8):
            brush.line(((x, 0.29), (x, 0.98)), shade(color, 0.02), 0.008)
        brush.line(((0.0, 0.97), (0.68, 0.97)), shade(color, 0.3), 0.018)
    else:
        brush.line(((0.03, shape.sill - 0.03), (0.96, shape.sill - 0.05)), light, 0.022)
    if kind == "Bus" and rng.random() < 0.5:
        brush.box(0.0, 0.34, 0.86, 0.4, shade(color, 0.45 if sum(color) < 560 else -0.2))
    for pane in shape.windows:
        brush.polygon(pane, GLASS)
        xs, ys = [x for x, _ in pane], [y for _, y in pane]
        middle, top, bottom = (min(xs) + max(xs)) / 2, max(ys), min(ys)
        streak = ((middle - 0.02, bottom), (middle, bottom), (middle + 0.02, top), (middle, top))
        if max(xs) - min(xs) > 0.07:
            brush.polygon(streak, mix(GLASS, (255, 255, 255), 0.22))
    if kind != "Bus":
        for x in shape.doors:
            brush.line(((x, low + 0.1), (x, shape.sill + 0.06)), dark, 0.012)
            brush.box(x - 0.055, shape.sill - 0.02, x - 0.02, shape.sill + 0.012, dark)
    nose = 0.3 if kind in ("Bus", "Truck", "Microbus") else 0.42
    brush.box(0.955, nose - 0.04, 0.998, nose + 0.04, (255, 246, 200) if lamps else (236, 236, 224), 0.03)
    if kind != "Truck":
        brush.box(0.0, nose + 0.02, 0.025, nose + 0.14, (190, 30, 34), 0.02)
    for x in shape.wheels:
        brush.disc(x, shape.wheel - 0.02, shape.wheel * 1.14, shade(color, -0.6))
        brush.disc(x, shape.wheel - 0.03, shape.wheel, TYRE)
        brush.disc(x, shape.wheel - 0.03, shape.wheel * 0.58, RIM)
        brush.disc(x, shape.wheel - 0.03, shape.wheel * 0.2, (96, 100, 104))
