"""The six types of vehicles as data, and drawing them from the side (front to the right), front and rear."""

from dataclasses import dataclass

import numpy as np

from clipret_training.synthetic.brush import Brush, Color, Point, mix, shade

__all__ = ["aspect", "draw_vehicle"]

_GLASS: tuple[tuple[float, Color], ...] = ((0.45, (50, 66, 86)), (1.0, (112, 140, 164)))
_TYRE: Color = (30, 30, 33)
_RIM: Color = (188, 192, 197)
_TRIM: Color = (46, 48, 53)
_HEADLAMP: Color = (246, 244, 228)
_LIT: Color = (255, 244, 190)
_TAIL: Color = (196, 26, 32)
_AMBER: Color = (255, 178, 52)

Polygon = tuple[Point, ...]


@dataclass(frozen=True)
class _Side:
    """The side of a vehicle in a box of 1 x 1, whose aspect ratio (width over height) is `aspect`."""

    aspect: float
    body: Polygon
    windows: tuple[Polygon, ...]
    wheels: tuple[float, ...]
    wheel: float  # radius, as a share of the height
    doors: tuple[float, ...] = ()
    handle: float = 0.55  # height of the handles
    nose: float = 0.42  # height of the lamps
    clad: bool = False  # dark plastic along the sill and round the wheels
    round_by: float = 0.05


@dataclass(frozen=True)
class _Face:
    """Front and rear of a vehicle: the right half of outline and panes, as distances from the middle."""

    aspect: float
    half: Polygon
    screen: Polygon
    rear: Polygon
    lamp: float  # height of the lamps
    upright: bool = False  # tall rear lamps


def _panes(left: float, right: float, low: float, high: float, count: int, gap: float) -> tuple[Polygon, ...]:
    """`count` upright panes between left and right."""
    width = (right - left - gap * (count - 1)) / count
    starts = [left + n * (width + gap) for n in range(count)]
    return tuple(((x, low), (x + width, low), (x + width, high), (x, high)) for x in starts)


_SIDES = {
    "Sedan": _Side(
        2.95,
        ((0.015, 0.17), (0.0, 0.5), (0.03, 0.61), (0.2, 0.65), (0.31, 0.96), (0.37, 1.0), (0.56, 1.0), (0.62, 0.97),
         (0.75, 0.64), (0.95, 0.55), (0.995, 0.42), (0.99, 0.17)),
        (((0.235, 0.65), (0.335, 0.93), (0.445, 0.94), (0.445, 0.65)),
         ((0.465, 0.65), (0.465, 0.94), (0.59, 0.93), (0.705, 0.65))),
        (0.2, 0.8), 0.2, (0.28, 0.455, 0.69), 0.56, 0.44,
    ),
    "SUV": _Side(
        2.05,
        ((0.03, 0.22), (0.025, 0.62), (0.05, 0.72), (0.09, 0.97), (0.13, 1.0), (0.6, 1.0), (0.65, 0.98), (0.745, 0.7),
         (0.95, 0.65), (0.99, 0.56), (0.99, 0.22)),
        (((0.1, 0.7), (0.135, 0.92), (0.27, 0.92), (0.27, 0.7)),
         ((0.29, 0.7), (0.29, 0.92), (0.445, 0.92), (0.445, 0.7)),
         ((0.465, 0.7), (0.465, 0.92), (0.61, 0.92), (0.69, 0.7))),
        (0.2, 0.8), 0.205, (0.28, 0.455, 0.68), 0.6, 0.53, clad=True,
    ),
    "Minivan": _Side(
        2.3,
        ((0.01, 0.16), (0.0, 0.5), (0.02, 0.88), (0.06, 0.98), (0.14, 1.0), (0.54, 1.0), (0.64, 0.96), (0.86, 0.58),
         (0.97, 0.47), (1.0, 0.36), (0.99, 0.16)),
        (((0.045, 0.6), (0.06, 0.86), (0.09, 0.9), (0.25, 0.91), (0.25, 0.6)),
         ((0.268, 0.6), (0.268, 0.91), (0.455, 0.91), (0.455, 0.6)),
         ((0.473, 0.6), (0.473, 0.91), (0.575, 0.91), (0.625, 0.87), (0.785, 0.6))),
        (0.19, 0.815), 0.165, (0.262, 0.464, 0.71), 0.52, 0.4, round_by=0.09,
    ),
    "Microbus": _Side(
        1.9,
        ((0.015, 0.13), (0.0, 0.5), (0.005, 0.93), (0.04, 1.0), (0.85, 1.0), (0.91, 0.94), (0.965, 0.58),
         (1.0, 0.48), (1.0, 0.13)),
        (*_panes(0.045, 0.71, 0.6, 0.88, 4, 0.02), ((0.735, 0.6), (0.735, 0.88), (0.855, 0.88), (0.915, 0.6))),
        (0.18, 0.83), 0.145, (0.545, 0.722, 0.92), 0.5, 0.36, round_by=0.1,
    ),
    "Bus": _Side(
        3.05,
        ((0.0, 0.09), (0.0, 0.97), (0.02, 1.0), (0.98, 1.0), (0.995, 0.95), (1.0, 0.45), (1.0, 0.09)),
        (*_panes(0.02, 0.835, 0.5, 0.84, 7, 0.012), ((0.935, 0.46), (0.935, 0.84), (0.988, 0.84), (0.992, 0.46))),
        (0.2, 0.74), 0.13, (), 0.4, 0.25,
    ),
    "Truck": _Side(
        2.45,
        ((0.705, 0.16), (0.705, 0.84), (0.73, 0.9), (0.88, 0.9), (0.905, 0.86), (0.965, 0.56), (1.0, 0.5), (1.0, 0.16)),
        (((0.785, 0.54), (0.785, 0.82), (0.87, 0.82), (0.935, 0.54)),),
        (0.13, 0.265, 0.85), 0.135, (0.77, 0.955), 0.46, 0.3,
    ),
}  # fmt: skip

_FACES = {
    "Sedan": _Face(
        1.3, ((0.46, 0.14), (0.5, 0.3), (0.49, 0.52), (0.43, 0.62), (0.34, 0.96), (0.26, 1.0)),
        ((0.4, 0.62), (0.31, 0.93)), ((0.385, 0.66), (0.305, 0.92)), 0.46,
    ),
    "SUV": _Face(
        1.05, ((0.46, 0.2), (0.5, 0.34), (0.49, 0.62), (0.44, 0.7), (0.38, 0.97), (0.33, 1.0)),
        ((0.405, 0.7), (0.35, 0.93)), ((0.39, 0.72), (0.345, 0.93)), 0.54,
    ),
    "Minivan": _Face(
        1.08, ((0.45, 0.13), (0.5, 0.26), (0.49, 0.5), (0.45, 0.62), (0.38, 0.95), (0.28, 1.0)),
        ((0.425, 0.57), (0.34, 0.92)), ((0.41, 0.64), (0.345, 0.9)), 0.42, upright=True,
    ),
    "Microbus": _Face(
        0.88, ((0.47, 0.12), (0.5, 0.2), (0.5, 0.56), (0.44, 0.94), (0.37, 1.0)),
        ((0.445, 0.56), (0.39, 0.88)), ((0.42, 0.6), (0.39, 0.87)), 0.36, upright=True,
    ),
    "Bus": _Face(
        0.84, ((0.47, 0.08), (0.5, 0.12), (0.5, 0.94), (0.47, 1.0)),
        ((0.46, 0.4), (0.455, 0.83)), ((0.4, 0.56), (0.4, 0.84)), 0.25, upright=True,
    ),
    "Truck": _Face(
        0.82, ((0.4, 0.13), (0.44, 0.2), (0.44, 0.56), (0.4, 0.82), (0.34, 0.86)),
        ((0.4, 0.5), (0.36, 0.77)), (), 0.3,
    ),
}  # fmt: skip


def aspect(kind: str, view: str) -> float:
    """Return the aspect ratio (width over height) of a vehicle."""
    return _SIDES[kind].aspect if view == "side" else _FACES[kind].aspect


def draw_vehicle(brush: Brush, kind: str, view: str, color: Color, rng: np.random.Generator, lamps: bool) -> None:
    """Draw a vehicle.

    Args:
        brush: A box with the aspect ratio of `aspect`. The wheels stand on its lower side.
        kind: The type.
        view: side, front or rear.
        color: The colour of the body.
        rng: Random numbers.
        lamps: Whether the lamps are on.
    """
    brush.glow(0.5, 0.01, (0.66, 0.17), (12, 12, 18), 1.0)  # its shadow
    if view == "side":
        _draw_side(brush, kind, color, rng, lamps)
    else:
        _draw_face(brush, kind, color, view == "front", lamps)


def _paint(brush: Brush, outline: Polygon, color: Color, round_by: float) -> None:
    """A panel of the body, lighter at the top and darker at the bottom."""
    foot = -0.26 if sum(color) < 680 else -0.15  # a darker white would be grey
    stops = ((0.1, shade(color, foot)), (0.34, shade(color, -0.06)), (0.5, color), (1.0, shade(color, 0.13)))
    brush.gradient(outline, stops, round_by)


def _seam(color: Color) -> Color:
    """The colour of a line on the body, visible on black too."""
    return shade(color, -0.32) if sum(color) > 150 else shade(color, 0.17)


def _pane(brush: Brush, pane: Polygon) -> None:
    brush.gradient(pane, _GLASS, 0.03)
    (left, low), (right, high) = (tuple(f(axis) for axis in zip(*pane, strict=True)) for f in (min, max))
    if right - left > 0.08:
        x, gloss = left + (right - left) * 0.42, (150, 174, 194)
        lean = 0.18 * (high - low) / (brush.width / brush.height)
        brush.polygon(((x, low), (x + 0.03, low), (x + 0.03 + lean, high), (x + lean, high)), gloss)


def _draw_side(brush: Brush, kind: str, color: Color, rng: np.random.Generator, lamps: bool) -> None:
    shape, seam = _SIDES[kind], _seam(color)
    low = min(y for _, y in shape.body)
    if kind == "Truck":
        _load(brush, color, tipper=bool(rng.random() < 0.3))
    elif kind == "SUV":  # roof rails, and the spare wheel at the back
        brush.box(0.13, 0.99, 0.57, 1.035, _TRIM, 0.02)
        brush.box(-0.02, 0.4, 0.035, 0.7, _TYRE, 0.04)
    elif kind == "Bus":
        brush.box(0.3, 0.99, 0.52, 1.045, mix(color, (150, 152, 156), 0.5), 0.02)
    _paint(brush, shape.body, color, shape.round_by)
    if kind == "Bus":
        brush.box(0.008, 0.46, 0.99, 0.87, _TRIM, 0.03)
        brush.box(0.85, 0.13, 0.922, 0.85, (82, 98, 114), 0.02)
        brush.line(((0.886, 0.14), (0.886, 0.84)), _TRIM, 0.02)
        brush.box(0.006, 0.36, 0.84, 0.39, shade(color, 0.4 if sum(color) < 560 else -0.22))
        brush.box(0.62, 0.9, 0.83, 0.97, (34, 34, 36), 0.01)
        brush.box(0.64, 0.92, 0.81, 0.95, _AMBER, 0.01)
    for pane in shape.windows:
        _pane(brush, pane)
    if shape.clad:
        brush.box(0.03, low, 0.985, low + 0.09, _TRIM, 0.04)
    elif kind != "Truck":
        brush.box(0.02, low, 0.985, low + 0.05, mix(color, _TRIM, 0.65), 0.03)
    if kind == "Microbus":
        brush.box(0.006, 0.545, 0.965, 0.565, shade(color, 0.4 if sum(color) < 560 else -0.22))
    for x in shape.doors:
        brush.line(((x, low + 0.09), (x, shape.handle + 0.07)), seam, 0.012)
        brush.box(x - 0.055, shape.handle - 0.012, x - 0.02, shape.handle + 0.016, seam, 0.01)
    if kind == "Minivan":  # the rail of the sliding door
        brush.line(((0.06, 0.555), (0.44, 0.555)), seam, 0.014)
    if kind != "Truck":
        brush.box(0.0, shape.nose + 0.02, 0.03, shape.nose + 0.15, _TAIL, 0.03)
    brush.box(0.945, shape.nose - 0.04, 0.995, shape.nose + 0.05, _LIT if lamps else _HEADLAMP, 0.03)
    pillar = max(x for x, _ in shape.windows[-1])
    if kind in ("Sedan", "SUV", "Minivan"):
        brush.box(
            pillar - 0.055, shape.windows[-1][0][1] - 0.02, pillar - 0.01, shape.windows[-1][0][1] + 0.07, seam, 0.03
        )
    for x in shape.wheels:
        _wheel(brush, x, shape.wheel, _TRIM if shape.clad else shade(color, -0.62))
    if lamps:
        brush.glow(0.98, shape.nose, (0.26 / shape.aspect, 0.26), _LIT, 0.8)
        brush.glow(1.0 + 0.45 / shape.aspect, 0.0, (1.0 / shape.aspect, 0.16), _LIT, 0.55)
        brush.glow(0.01, shape.nose + 0.08, (0.13 / shape.aspect, 0.13), _TAIL, 0.6)


def _load(brush: Brush, color: Color, tipper: bool) -> None:
    """The load of a truck: a box, or an open tipper with earth."""
    brush.box(0.02, 0.16, 0.98, 0.27, _TRIM)
    if tipper:
        brush.polygon(((0.06, 0.7), (0.2, 0.84), (0.42, 0.88), (0.64, 0.7)), (128, 104, 82), 0.1)
        outline: Polygon = (
            (0.0, 0.72),
            (0.03, 0.29),
            (0.66, 0.29),
            (0.69, 0.72),
            (0.69, 0.9),
            (0.64, 0.9),
            (0.64, 0.72),
        )
    else:
        outline = ((0.0, 0.28), (0.0, 1.0), (0.685, 1.0), (0.685, 0.28))
    _paint(brush, outline, shade(color, 0.06), 0.02)
    for x in np.linspace(0.08, 0.6, 7):
        brush.line(((x, 0.31), (x, 0.7 if tipper else 0.97)), mix(color, _seam(color), 0.45), 0.01)
    if not tipper:
        brush.box(0.0, 0.965, 0.685, 1.0, shade(color, 0.25 if sum(color) < 640 else -0.12), 0.01)
    brush.box(0.0, 0.28, 0.03, 0.34, _TAIL, 0.01)


def _wheel(brush: Brush, x: float, radius: float, arch: Color) -> None:
    y = radius - 0.03
    brush.disc(x, y + radius * 0.06, radius * 1.16, arch)
    brush.disc(x, y, radius, _TYRE)
    brush.disc(x, y, radius * 0.62, _RIM)
    brush.disc(x, y, radius * 0.5, (150, 154, 160))
    for angle in np.arange(5) * 2 * np.pi / 5:
        dx = np.cos(angle) * radius * 0.5 * brush.height / brush.width
        brush.line(((x, y), (x + float(dx), y + float(np.sin(angle)) * radius * 0.5)), _RIM, radius * 0.16)
    brush.disc(x, y, radius * 0.16, (92, 96, 102))


def _whole(half: Polygon) -> Polygon:
    """Both halves of an outline, from distances from the middle."""
    return (*((0.5 + x, y) for x, y in half), *((0.5 - x, y) for x, y in reversed(half)))


def _draw_face(brush: Brush, kind: str, color: Color, front: bool, lamps: bool) -> None:
    face, seam = _FACES[kind], _seam(color)
    low = face.half[0][1]
    for x in (0.1, 0.78):
        brush.box(x, -0.02, x + 0.12, low + 0.12, _TYRE, 0.03)
    if kind == "Truck":
        brush.box(0.06, 0.14, 0.94, 0.28, _TRIM)
        _paint(brush, ((0.0, 0.27), (0.0, 1.0), (1.0, 1.0), (1.0, 0.27)), shade(color, -0.16 if front else 0.05), 0.02)
    if kind == "SUV":
        for x in (0.18, 0.82):
            brush.box(x - 0.03, 0.96, x + 0.03, 1.03, _TRIM, 0.02)
    if kind == "Truck" and not front:
        brush.box(0.0, 0.955, 1.0, 1.0, shade(color, 0.25 if sum(color) < 640 else -0.12), 0.01)
        brush.line(((0.5, 0.3), (0.5, 0.95)), seam, 0.014)
        for x in (0.2, 0.42, 0.58, 0.8):
            brush.line(((x, 0.3), (x, 0.95)), mix(color, _RIM, 0.6), 0.014)
    else:
        if front:
            for x in (-0.045, 1.0):  # rear-view mirrors
                brush.box(x, face.screen[0][1] + 0.02, x + 0.045, face.screen[0][1] + 0.12, _TRIM, 0.02)
        _paint(brush, _whole(face.half), color, 0.07)
        _pane(brush, _whole(face.screen if front else face.rear))
        if kind == "Bus":
            brush.box(0.16, 0.875, 0.84, 0.965, (34, 34, 36), 0.02)
            brush.box(0.26, 0.9, 0.74, 0.94, _AMBER, 0.01)
    _fittings(brush, kind, face, color, front, lamps)


def _fittings(brush: Brush, kind: str, face: _Face, color: Color, front: bool, lamps: bool) -> None:
    """Lamps, grille, number plate, bumper."""
    low, lamp, seam = face.half[0][1], face.lamp, _seam(color)
    truck_rear = kind == "Truck" and not front
    bumper = _TRIM if kind in ("SUV", "Truck") else mix(color, _TRIM, 0.6)
    brush.box(0.06, low, 0.94, low + 0.09, bumper, 0.04)
    brush.box(0.37, low + 0.015, 0.63, low + 0.085, (228, 230, 226), 0.01)
    if front:
        tall = 0.06 if kind == "Bus" else 0.12
        brush.box(0.3, lamp - tall, 0.7, lamp + 0.04, _TRIM, 0.03)
        for y in (lamp - 0.05, lamp):
            brush.line(((0.32, y), (0.68, y)), (120, 124, 130), 0.012)
    elif not truck_rear:
        brush.line(((0.12, lamp - 0.09), (0.88, lamp - 0.09)), seam, 0.012)
        if kind == "SUV":
            brush.disc(0.5, lamp + 0.02, 0.17, _TYRE)
            brush.disc(0.5, lamp + 0.02, 0.11, mix(color, _TRIM, 0.35))
    for side in (-1, 1):
        x = 0.5 + side * (0.36 if front else 0.42 if face.upright else 0.38)
        if front and kind in ("Microbus", "SUV"):
            brush.disc(x, lamp, 0.068, _RIM)
            brush.disc(x, lamp, 0.054, _LIT if lamps else _HEADLAMP)
        elif front:
            brush.box(x - 0.08, lamp - 0.045, x + 0.08, lamp + 0.045, _LIT if lamps else _HEADLAMP, 0.04)
        elif truck_rear:
            brush.box(x - 0.06, 0.2, x + 0.06, 0.26, _TAIL, 0.01)
        elif face.upright:
            brush.box(x - 0.04, lamp - 0.07, x + 0.04, lamp + 0.12, _TAIL, 0.03)
        else:
            brush.box(x - 0.09, lamp - 0.05, x + 0.09, lamp + 0.05, _TAIL, 0.03)
        if lamps:
            reach = 0.26 if front else 0.15
            brush.glow(x, lamp, (reach / face.aspect, reach), _LIT if front else _TAIL, 0.7 if front else 0.45)
