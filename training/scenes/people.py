"""A pedestrian, put together from simple parts, as the Person says."""

from clipret.training.scenes.brush import Brush, Color, shade
from clipret.training.scenes.scene import COLORS, Person

__all__ = ["draw_person"]

_SKINS: tuple[Color, ...] = ((244, 208, 178), (222, 172, 134), (168, 116, 82), (112, 76, 54))
_HAIR: dict[str, tuple[Color, ...]] = {
    "child": ((60, 40, 26), (150, 100, 50)),
    "adult": ((34, 26, 22), (88, 56, 32), (160, 110, 60)),
    "elder": ((206, 206, 206), (176, 176, 178)),
}


def draw_person(brush: Brush, person: Person, tone: int) -> None:
    """Draw into the box, feet on the ground; `tone` picks skin and hair."""
    skin = _SKINS[tone % len(_SKINS)]
    hair = _HAIR[person.age][tone % len(_HAIR[person.age])]
    upper, lower = COLORS[person.upper], COLORS[person.lower]
    side = person.view == "side"
    half = 0.15 if side else 0.25  # half the width of the shoulders
    brush.polygon(((0.15, -0.012), (0.85, -0.012), (0.8, 0.012), (0.2, 0.012)), (50, 50, 54))

    if person.bag == "backpack" and person.view == "front":
        brush.box(0.5 - half - 0.05, 0.5, 0.5 + half + 0.05, 0.8, shade(COLORS["brown"], -0.1), 0.04)
    _legs(brush, person, lower, skin, side)
    arm = (0.5 - half - 0.04, 0.5 + half + 0.04) if not side else (0.5, 0.5)
    for x in arm if not side else ():
        _arm(brush, x, upper, skin, person.sleeves == "short")
    bottom = 0.3 if person.garment == "coat" else 0.47
    flare = 0.05 if person.garment == "coat" else 0.0
    brush.polygon(
        ((0.5 - half, 0.83), (0.5 + half, 0.83), (0.5 + half + flare, bottom), (0.5 - half - flare, bottom)), upper
    )
    _pattern(brush, person, upper, half, bottom)
    if side:
        _arm(brush, 0.5, shade(upper, -0.12), skin, person.sleeves == "short")
    if person.garment == "coat" and person.view != "back":
        brush.line(((0.5, 0.83), (0.5, bottom)), shade(upper, -0.3 if sum(upper) > 200 else 0.25), 0.008)
    _bag(brush, person, half)
    _head(brush, person, skin, hair)


def _legs(brush: Brush, person: Person, lower: Color, skin: Color, side: bool) -> None:
    spread = 0.06 if side else 0.1
    bare = person.garment == "skirt"
    for x, lift in ((0.5 - spread, 0.0), (0.5 + spread, 0.012)):
        brush.box(x - 0.07, 0.02 + lift, x + 0.07, 0.5, skin if bare else shade(lower, -0.1 if lift else 0.0))
        brush.box(x - 0.08, 0.0, x + (0.13 if side else 0.08), 0.035 + lift, (36, 34, 36), 0.01)
    if bare:
        brush.polygon(((0.36, 0.5), (0.64, 0.5), (0.78, 0.24), (0.22, 0.24)), lower)


def _arm(brush: Brush, x: float, upper: Color, skin: Color, short: bool) -> None:
    brush.box(x - 0.055, 0.42, x + 0.055, 0.82, skin, 0.03)
    brush.box(x - 0.06, 0.68 if short else 0.47, x + 0.06, 0.825, shade(upper, -0.12), 0.02)


def _pattern(brush: Brush, person: Person, upper: Color, half: float, bottom: float) -> None:
    contrast = shade(upper, 0.55) if sum(upper) < 420 else shade(upper, -0.4)
    if person.pattern != "plain":
        for step in range(5):
            y = 0.8 - step * 0.065
            if y > bottom + 0.02:
                brush.box(0.5 - half, y - 0.017, 0.5 + half, y, contrast)
    if person.pattern == "plaid":
        for x in (-0.6, 0.0, 0.6):
            brush.box(0.5 + x * half - 0.025, bottom, 0.5 + x * half + 0.025, 0.83, contrast)


def _bag(brush: Brush, person: Person, half: float) -> None:
    leather = shade(COLORS["brown"], -0.1)
    if person.bag == "backpack" and person.view == "back":
        brush.box(0.5 - half * 0.85, 0.5, 0.5 + half * 0.85, 0.81, leather, 0.05)
        brush.box(0.5 - half * 0.6, 0.53, 0.5 + half * 0.6, 0.64, shade(leather, 0.2), 0.03)
    elif person.bag == "backpack" and person.view == "side":
        brush.box(0.16, 0.52, 0.36, 0.81, leather, 0.05)
    elif person.bag == "backpack":
        for x in (-0.6, 0.6):
            brush.box(0.5 + x * half - 0.03, 0.56, 0.5 + x * half + 0.03, 0.83, leather)
    elif person.bag == "hand bag":
        brush.box(0.74, 0.3, 0.98, 0.41, leather, 0.02)
        brush.line(((0.78, 0.41), (0.82, 0.47), (0.9, 0.47), (0.94, 0.41)), leather, 0.012)
    elif person.bag == "shoulder bag":
        brush.line(((0.5 - half, 0.82), (0.5 + half + 0.02, 0.52)), leather, 0.018)
        brush.box(0.5 + half - 0.06, 0.42, 0.5 + half + 0.14, 0.53, leather, 0.02)


def _head(brush: Brush, person: Person, skin: Color, hair: Color) -> None:
    brush.box(0.44, 0.81, 0.56, 0.87, skin)
    if person.female:  # long hair, behind the face
        brush.box(0.29, 0.79, 0.71, 0.97, hair, 0.06)
    brush.disc(0.5, 0.915, 0.07, hair if person.view == "back" else skin)
    if person.view != "back":
        brush.polygon(
            ((0.29, 0.92), (0.36, 0.985), (0.5, 1.0), (0.64, 0.985), (0.71, 0.92), (0.6, 0.955), (0.4, 0.955)), hair
        )
        eyes = (0.6,) if person.view == "side" else (0.41, 0.59)
        for x in eyes:
            brush.disc(x, 0.915, 0.021 if person.glasses else 0.009, (24, 24, 26))
            if person.glasses:
                brush.disc(x, 0.915, 0.012, (170, 196, 214))
    if person.hat:
        felt = shade(COLORS["blue"], -0.5)
        brush.box(0.3, 0.95, 0.7, 1.03, felt, 0.03)
        brush.box(0.22, 0.945, 0.84 if person.view == "side" else 0.78, 0.967, felt, 0.01)
