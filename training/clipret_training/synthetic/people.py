"""Drawing a pedestrian from simple parts. All lengths are shares of the height of an adult."""

from dataclasses import replace

from clipret_training.synthetic.brush import Brush, Color, Point, mix, shade
from clipret_training.synthetic.scene import COLORS, Person

__all__ = ["HALF_WIDTH", "draw_person"]

HALF_WIDTH = 0.21  # of a person with arms and bags

_SKINS: tuple[Color, ...] = ((250, 214, 184), (232, 182, 142), (180, 124, 88), (124, 84, 60))
_HAIR: dict[str, tuple[Color, ...]] = {
    "child": ((66, 44, 30), (160, 108, 56), (38, 30, 28)),
    "adult": ((38, 30, 28), (92, 58, 36), (168, 118, 66)),
    "elder": ((208, 208, 210), (182, 182, 186), (226, 224, 220)),
}
_HATS: tuple[Color, ...] = ((224, 196, 142), (54, 62, 92), (120, 92, 70))
_LEATHER: Color = (126, 82, 50)
_SHOES: Color = (44, 42, 46)
_NECK = 0.81  # height of the neck's foot


def draw_person(brush: Brush, person: Person, tone: int) -> None:
    """Draw a person.

    Args:
        brush: A square box. The person stands in the middle of its lower side.
        person: The attributes of the person.
        tone: Selects the colours of skin and hair.
    """
    skin, hat = _SKINS[tone % len(_SKINS)], _HATS[tone // 2 % len(_HATS)]
    hair = _HAIR[person.age][tone % len(_HAIR[person.age])]
    brush.glow(0.5, 0.01, (0.2, 0.035), (16, 16, 22), 0.9)
    # Children have a smaller body and a larger head.
    body, head = (0.9, 1.42) if person.age == "child" else (1.0, 1.14)
    _draw_body(_scaled(brush, body, 0.0), person, skin)
    _draw_head(_scaled(brush, head, _NECK * (body - head)), person, skin, hair, hat)


def _scaled(brush: Brush, scale: float, lift: float) -> Brush:
    """The box enlarged around the middle of its lower side, and raised."""
    size = brush.height * scale
    left = brush.left + (brush.width - size) / 2
    return replace(brush, left=left, ground=brush.ground - lift * brush.height, width=size, height=size)


def _draw_body(brush: Brush, person: Person, skin: Color) -> None:
    upper, lower = COLORS[person.upper], COLORS[person.lower]
    side = person.view == "side"
    shoulder = (0.075 if side else 0.12) * (0.92 if person.female else 1.0)
    if person.bag == "backpack" and side:
        brush.box(0.35, 0.53, 0.47, 0.8, _LEATHER, 0.05)
        brush.box(0.345, 0.55, 0.39, 0.65, shade(_LEATHER, 0.2), 0.03)
    elif person.bag == "backpack" and person.view == "front":
        brush.box(0.36, 0.55, 0.64, 0.83, _LEATHER, 0.06)
    if side:
        _arm(brush, person, ((0.5, 0.77), (0.56, 0.62), (0.61, 0.5)), shade(upper, -0.28), skin)
    _legs(brush, person, lower, skin)
    if not side:
        for sign in (-1, 1):
            x = 0.5 + sign * (shoulder + 0.004)
            _arm(brush, person, ((x, 0.775), (x + sign * 0.03, 0.62), (x + sign * 0.026, 0.48)), _dim(upper), skin)
    brush.box(0.475, 0.76, 0.525, 0.86, shade(skin, -0.1), 0.02)
    _torso(brush, person, upper, shoulder)
    if side:
        _arm(brush, person, ((0.49, 0.77), (0.465, 0.62), (0.5, 0.49)), _dim(upper), skin)
    _bag(brush, person, shoulder)


def _dim(color: Color) -> Color:
    """The colour a little darker, or lighter if it is black, so that a limb stands out from the trunk."""
    return shade(color, -0.13) if sum(color) > 150 else shade(color, 0.09)


def _arm(brush: Brush, person: Person, points: tuple[Point, Point, Point], cloth: Color, skin: Color) -> None:
    brush.limb(points, skin, 0.046)
    top, elbow, hand = points
    short = (top[0] * 0.35 + elbow[0] * 0.65, top[1] * 0.35 + elbow[1] * 0.65)
    wrist = (hand[0], hand[1] + 0.03)
    brush.limb((top, short) if person.sleeves == "short" else (top, elbow, wrist), cloth, 0.06)


def _legs(brush: Brush, person: Person, lower: Color, skin: Color) -> None:
    bare = person.garment in ("skirt", "dress")
    if person.view == "side":  # a stride
        legs: tuple[tuple[Point, ...], ...] = (
            ((0.49, 0.47), (0.455, 0.25), (0.39, 0.06)),
            ((0.51, 0.47), (0.56, 0.26), (0.575, 0.04)),
        )
    else:
        legs = (((0.456, 0.47), (0.446, 0.04)), ((0.544, 0.47), (0.554, 0.04)))
    for number, leg in enumerate(legs):
        x, y = leg[-1]
        if person.view == "side":
            brush.box(x - 0.03, y - 0.04, x + 0.065, y + 0.005, _SHOES, 0.02)
        else:
            brush.box(x - 0.037, 0.0, x + 0.037, 0.045, _SHOES, 0.02)
        cloth = _dim(lower) if number == 0 and person.view == "side" else lower
        brush.limb(leg, skin if bare else cloth, 0.05 if bare else 0.07)
        if y < 0.05:
            brush.box(x - 0.034, y - 0.034, x + (0.062 if person.view == "side" else 0.034), y - 0.008, _SHOES, 0.02)


def _torso(brush: Brush, person: Person, upper: Color, shoulder: float) -> None:
    lower = COLORS[person.lower]
    waist, hip = shoulder * (0.74 if person.female else 0.86), shoulder * 0.9

    def panel(widths: tuple[tuple[float, float], ...], color: Color) -> None:
        """A symmetrical shape from (height, half width) pairs, top to bottom."""
        right = tuple((0.5 + half, y) for y, half in widths)
        left = tuple((0.5 - half, y) for y, half in reversed(widths))
        brush.gradient((*right, *left), ((0.25, _dim(color)), (0.6, color), (0.85, shade(color, 0.06))), 0.03)

    if person.garment == "trousers":
        panel(((0.56, waist), (0.43, hip)), lower)
    elif person.garment == "skirt":
        panel(((0.57, waist), (0.47, hip), (0.27, hip + 0.045)), lower)
    if person.garment == "dress":
        panel(((0.82, shoulder * 0.8), (0.79, shoulder), (0.6, waist), (0.25, hip + 0.065)), upper)
        brush.box(0.5 - waist, 0.585, 0.5 + waist, 0.61, _seam(upper), 0.01)
    elif person.garment == "coat":
        panel(((0.83, shoulder * 0.8), (0.79, shoulder + 0.008), (0.6, hip), (0.24, hip + 0.035)), upper)
    else:
        panel(((0.82, shoulder * 0.8), (0.79, shoulder), (0.6, waist), (0.48, hip)), upper)
    _pattern(brush, person, upper, waist)
    if person.garment == "coat":
        if person.view == "front":
            brush.polygon(((0.46, 0.83), (0.54, 0.83), (0.5, 0.7)), mix(lower, (255, 255, 255), 0.6))
            brush.line(((0.5, 0.7), (0.5, 0.25)), _seam(upper), 0.008)
            for y in (0.64, 0.56, 0.48):
                brush.disc(0.525, y, 0.009, _seam(upper))
        brush.box(0.5 - hip, 0.575, 0.5 + hip, 0.6, _seam(upper), 0.005)


def _seam(color: Color) -> Color:
    return shade(color, -0.35) if sum(color) > 200 else shade(color, 0.25)


def _pattern(brush: Brush, person: Person, upper: Color, waist: float) -> None:
    contrast = shade(upper, 0.6) if sum(upper) < 420 else shade(upper, -0.4)
    half = waist * 0.98
    if person.pattern in ("stripes", "plaid"):
        for y in (0.755, 0.7, 0.645, 0.59, 0.535):
            if person.garment != "dress" or y > 0.6:
                brush.box(0.5 - half, y - 0.011, 0.5 + half, y + 0.011, contrast)
    if person.pattern == "plaid":
        for x in (-0.62, 0.0, 0.62):
            brush.box(
                0.5 + x * half - 0.009,
                0.62 if person.garment == "dress" else 0.5,
                0.5 + x * half + 0.009,
                0.8,
                contrast,
            )
    if person.pattern == "logo":
        brush.disc(0.5, 0.69, 0.042, contrast)
        brush.disc(0.5, 0.69, 0.02, upper)


def _bag(brush: Brush, person: Person, shoulder: float) -> None:
    flap = shade(_LEATHER, 0.2)
    if person.bag == "backpack" and person.view == "back":
        brush.box(0.415, 0.52, 0.585, 0.81, _LEATHER, 0.06)
        brush.box(0.435, 0.54, 0.565, 0.64, flap, 0.03)
        brush.line(((0.44, 0.73), (0.56, 0.73)), flap, 0.01)
    elif person.bag == "backpack" and person.view == "front":
        for sign in (-1, 1):
            x = 0.5 + sign * shoulder * 0.68
            brush.line(((x, 0.815), (x, 0.66), (x + sign * 0.02, 0.58)), _LEATHER, 0.026)
    elif person.bag == "backpack":
        brush.line(((0.47, 0.81), (0.53, 0.75), (0.5, 0.62)), _LEATHER, 0.022)
    elif person.bag == "hand bag":
        x = 0.5 if person.view == "side" else 0.5 + shoulder + 0.03
        brush.line(((x - 0.03, 0.4), (x - 0.015, 0.465), (x + 0.015, 0.465), (x + 0.03, 0.4)), _LEATHER, 0.012)
        brush.box(x - 0.065, 0.3, x + 0.065, 0.41, _LEATHER, 0.02)
        brush.box(x - 0.065, 0.37, x + 0.065, 0.41, flap, 0.02)
    elif person.bag == "shoulder bag":
        brush.line(((0.5 - shoulder * 0.75, 0.815), (0.5 + shoulder * 0.95, 0.53)), _LEATHER, 0.018)
        x = 0.53 if person.view == "side" else 0.5 + shoulder * 0.95
        brush.box(x - 0.06, 0.43, x + 0.06, 0.54, _LEATHER, 0.02)
        brush.box(x - 0.06, 0.5, x + 0.06, 0.54, flap, 0.02)


def _draw_head(brush: Brush, person: Person, skin: Color, hair: Color, hat: Color) -> None:
    y, turn = 0.905, 0.022 if person.view == "side" else 0.0  # turned to the right
    if person.female:  # long hair
        brush.box(0.425 - turn, 0.78, 0.575 - 2 * turn, 0.95, hair, 0.06)
    brush.disc(0.5, y + 0.008, 0.072, hair, 1.1)
    if person.view != "back":
        brush.box(0.477, 0.785, 0.523, 0.87, shade(skin, -0.1), 0.02)  # the neck, between the hair
        brush.disc(0.5 + turn, y - 0.014, 0.06, skin, 1.1)
        if person.view == "side":
            brush.disc(0.5 + 0.078, y - 0.018, 0.011, skin)  # the nose
            brush.disc(0.49, y - 0.012, 0.015, shade(skin, -0.1))  # the ear
        for x in (0.545,) if person.view == "side" else (0.474, 0.526):
            if person.glasses:
                brush.disc(x, y - 0.006, 0.023, (30, 30, 34))
                brush.disc(x, y - 0.006, 0.016, (196, 216, 228))
            brush.disc(x, y - 0.006, 0.0085, (36, 30, 30))
        if person.glasses:
            reach = (0.49, 0.525) if person.view == "side" else (0.494, 0.506)
            brush.line(((reach[0], y - 0.004), (reach[1], y - 0.004)), (30, 30, 34), 0.008)
        middle = 0.5 + 2.2 * turn
        brush.line(((middle - 0.014, y - 0.044), (middle + 0.014, y - 0.044)), mix(skin, (170, 50, 50), 0.55), 0.009)
    elif person.female:
        brush.line(((0.5, 0.93), (0.5, 0.79)), shade(hair, -0.15), 0.008)
    if person.hat:
        brush.box(0.43, 0.935, 0.57, 1.01, hat, 0.05)
        brush.box(0.43, 0.935, 0.57, 0.952, shade(hat, -0.4))
        brim = (0.42, 0.625) if person.view == "side" else (0.395, 0.605)
        brush.box(brim[0], 0.925, brim[1], 0.943, shade(hat, -0.08), 0.01)
