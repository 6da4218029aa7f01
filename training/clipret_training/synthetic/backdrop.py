"""The surroundings of a scene: sky, roadside and road, drawn from a few parameters and random numbers."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from clipret_training.synthetic.brush import Brush, Color, mix, shade
from clipret_training.synthetic.people import draw_person
from clipret_training.synthetic.scene import TYPES, Person, Scene
from clipret_training.synthetic.vehicles import aspect, draw_vehicle

__all__ = ["draw_backdrop", "draw_foreground", "relight"]

_SKIES: dict[str, tuple[Color, Color]] = {
    "day": ((104, 178, 236), (222, 240, 248)),
    "overcast": ((160, 172, 184), (220, 224, 226)),
    "dusk": ((92, 92, 168), (255, 186, 134)),
    "night": ((18, 26, 58), (62, 72, 120)),
}
# A tint for each light, its share on the backdrop, and its smaller share on the subject, whose colour must stay clear.
_TINTS: dict[str, tuple[Color, float, float]] = {
    "day": ((255, 250, 235), 0.0, 0.0),
    "overcast": ((150, 156, 166), 0.12, 0.04),
    "dusk": ((150, 84, 110), 0.24, 0.04),
    "night": ((14, 22, 58), 0.44, 0.09),
}
_VERGES: dict[str, Color] = {
    "street": (196, 190, 182),
    "highway": (150, 170, 116),
    "parking": (176, 178, 176),
    "country": (142, 178, 92),
    "coast": (232, 212, 166),
    "tunnel": (150, 148, 142),
}
_WALLS: tuple[Color, ...] = (
    (222, 206, 186), (206, 190, 178), (178, 192, 206), (228, 216, 196), (190, 184, 190), (214, 186, 164),
)  # fmt: skip
_LAMP: Color = (255, 226, 150)


@dataclass(frozen=True)
class _Stage:
    """The canvas and the scene. Heights are in pixels from the top."""

    image: Image.Image
    scene: Scene
    rng: np.random.Generator
    horizon: float
    road: float
    kerb: float

    @property
    def dark(self) -> bool:
        return self.scene.light in ("night", "dusk")

    def brush(self, x: float, ground: float, width: float, height: float, flipped: bool = False) -> Brush:
        return Brush(self.image, x, ground, width, height, flipped)

    @property
    def canvas(self) -> Brush:
        """The whole canvas as a box of 1 x 1."""
        return Brush(self.image, 0, self.image.height, self.image.width, self.image.height)


def draw_backdrop(image: Image.Image, scene: Scene, rng: np.random.Generator) -> float:
    """Draw the surroundings on the whole canvas.

    Args:
        image: The canvas.
        scene: The scene.
        rng: Random numbers.

    Returns:
        The height of the near kerb in pixels from the top.
    """
    height = image.height
    horizon = height * rng.uniform(0.42, 0.52)
    stage = _Stage(image, scene, rng, horizon, horizon + height * 0.08, height * rng.uniform(0.86, 0.93))
    _sky(stage)
    lights: list[tuple[float, float, float]] = []  # x, y and radius of lights
    if scene.place == "tunnel":
        _tunnel(stage)
    elif scene.place == "country":
        _hills(stage)
    elif scene.place == "coast":
        _sea(stage)
    else:
        _houses(stage, lights)
    _ground(stage)
    _roadside(stage, lights)
    if scene.place != "parking":
        _traffic_behind(stage)
    if scene.place != "tunnel":
        image.paste(relight(image, scene.light, subject=False))
    if stage.dark and scene.place != "tunnel":
        for x, y, radius in lights:
            stage.brush(x - 50, y + 50, 100, 100).glow(0.5, 0.5, (radius / 50, radius / 50), _LAMP, 0.75)
    return stage.kerb


def _sky(stage: _Stage) -> None:
    top, bottom = _SKIES[stage.scene.light]
    low = 1 - stage.horizon / stage.image.height
    corners = ((0.0, low - 0.01), (1.0, low - 0.01), (1.0, 1.0), (0.0, 1.0))
    stage.canvas.gradient(corners, ((low, bottom), (1.0, top)))
    rng, height = stage.rng, stage.image.height
    if stage.scene.light == "night":
        for x, y in rng.uniform((0, low + 0.1), (1, 1), (14, 2)).tolist():
            stage.canvas.disc(x, y, 0.003, (230, 232, 250))
    if rng.random() < 0.6:
        x, y = rng.uniform(0.1, 0.9), rng.uniform(0.8, 0.93)
        if stage.scene.light == "night":
            stage.canvas.disc(x, y, 0.04, (250, 246, 226))
            stage.canvas.disc(x + 0.014, y + 0.012, 0.034, mix(*_SKIES["night"], 0.15))
        elif stage.scene.light != "overcast":
            stage.canvas.glow(x, y, (0.14, 0.18), (255, 246, 214), 0.8)
            stage.canvas.disc(x, y, 0.042, (255, 244, 200))
    if stage.scene.light != "night":
        cloud = mix(bottom, (255, 255, 255), 0.55)
        for _ in range(int(rng.integers(0, 4))):
            x, y, size = rng.uniform(-0.05, 0.95), rng.uniform(0.72, 0.95), height * rng.uniform(0.1, 0.2)
            puff = stage.brush(x * stage.image.width, (1 - y) * height, size * 2.4, size)
            puff.box(0.0, 0.0, 1.0, 0.34, cloud, 0.17)
            puff.disc(0.36, 0.3, 0.3, cloud)
            puff.disc(0.64, 0.26, 0.22, cloud)


def _houses(stage: _Stage, lights: list[tuple[float, float, float]]) -> None:
    """A row of houses, with shops on a street and far away along a highway."""
    rng, horizon = stage.rng, stage.horizon
    far = stage.scene.place == "highway"
    scale = 0.45 if far else 1.0
    x = -rng.uniform(0, 60)
    while x < stage.image.width:
        wide, high = rng.uniform(90, 190) * scale, horizon * rng.uniform(0.4, 0.95) * scale
        wall = _WALLS[int(rng.integers(len(_WALLS)))]
        wall = mix(wall, (196, 210, 222), 0.6) if far else shade(wall, float(rng.uniform(-0.12, 0.05)))
        house = stage.brush(x, horizon + 2, wide, high)
        house.box(0.0, 0.0, 1.0, 1.0, wall)
        roof = float(rng.random())
        if roof < 0.3 and not far:
            house.polygon(((-0.04, 1.0), (0.5, 1.0 + 46 / high), (1.04, 1.0)), (158, 104, 88))
        else:
            house.box(-0.01, 1.0 - 8 * scale / high, 1.01, 1.0, shade(wall, -0.2))
        shop = stage.scene.place == "street" and high > 90
        across = max(2, int(wide / (30 * scale)))
        for y in np.arange(56.0 if shop else 16 * scale, high - 26 * scale, 28 * scale):
            for n in range(across):
                cx = (n + 0.5) / across
                lit = stage.dark and rng.random() < 0.55
                glass = (255, 222, 140) if lit else (132, 152, 172) if n % 2 else (116, 138, 160)
                dx = 7 * scale / wide
                house.box(cx - dx, y / high, cx + dx, (y + 16 * scale) / high, glass)
        if shop:
            _shop(stage, house, lights)
        x += wide + rng.choice([0.0, 14.0, 30.0]) * scale


def _shop(stage: _Stage, house: Brush, lights: list[tuple[float, float, float]]) -> None:
    window = (255, 230, 168) if stage.dark else (150, 172, 188)
    house.box(0.07, 0.0, 0.68, 30 / house.height, window)
    house.box(0.75, 0.0, 0.92, 34 / house.height, (120, 98, 84))
    cloths: tuple[Color, ...] = ((178, 104, 96), (104, 138, 130), (116, 126, 160), (190, 158, 104))
    cloth = cloths[int(stage.rng.integers(len(cloths)))]
    for n in range(8):
        tint = cloth if n % 2 else (240, 236, 228)
        house.box(0.04 + n * 0.085, 30 / house.height, 0.04 + (n + 1) * 0.085, 44 / house.height, tint)
    lights.append((*house.at((0.38, 14 / house.height)), 60))


def _hills(stage: _Stage) -> None:
    rng, low, width = stage.rng, 1 - stage.horizon / stage.image.height, stage.image.width
    for layer, color in enumerate(((150, 184, 176), (126, 172, 124), (108, 156, 92))):
        xs = np.linspace(0, 1, 28)
        waves = np.sin(xs * rng.uniform(4, 9) + rng.uniform(0, 6)) * 0.035
        ys = low + 0.13 - 0.045 * layer + waves
        stage.canvas.polygon([(0, low - 0.01), *zip(xs.tolist(), ys.tolist(), strict=True), (1, low - 0.01)], color)
    if rng.random() < 0.6:  # a farm
        farm = stage.brush(rng.uniform(0.1, 0.8) * width, stage.horizon + 4, 70, 44)
        farm.box(0.0, 0.0, 1.0, 0.6, (232, 222, 206))
        farm.polygon(((-0.08, 0.58), (0.14, 1.0), (0.86, 1.0), (1.08, 0.58)), (168, 106, 86))
        farm.box(0.4, 0.0, 0.6, 0.4, (120, 92, 74))


def _sea(stage: _Stage) -> None:
    low = 1 - stage.horizon / stage.image.height
    top, bottom = _SKIES[stage.scene.light]
    water = mix(mix(top, (40, 132, 168), 0.6), (255, 255, 255), 0.05)
    corners = ((0.0, low - 0.01), (1.0, low - 0.01), (1.0, low + 0.13), (0.0, low + 0.13))
    stage.canvas.gradient(corners, ((low, mix(water, (150, 214, 210), 0.35)), (low + 0.13, water)))
    for x, y in stage.rng.uniform((0, low + 0.02), (0.95, low + 0.11), (12, 2)).tolist():
        stage.canvas.line(((x, y), (x + 0.05, y)), mix(water, bottom, 0.5), 0.004)
    if stage.rng.random() < 0.7:
        boat = stage.brush(stage.rng.uniform(0.1, 0.85) * stage.image.width, stage.horizon - 22, 44, 44)
        boat.polygon(((0.0, 0.14), (1.0, 0.14), (0.84, 0.0), (0.16, 0.0)), (120, 96, 84))
        boat.polygon(((0.5, 0.2), (0.5, 1.0), (0.92, 0.2)), (246, 244, 238))
        boat.polygon(((0.45, 0.2), (0.45, 0.86), (0.14, 0.2)), (226, 222, 214))


def _tunnel(stage: _Stage) -> None:
    low = 1 - stage.horizon / stage.image.height
    stage.canvas.gradient(((0, low), (1, low), (1, 1), (0, 1)), ((low, (172, 160, 138)), (1.0, (84, 80, 78))))
    stage.canvas.box(0, 0.86, 1, 1, (62, 60, 62))
    start, step = stage.rng.uniform(-0.15, 0.0), 0.24
    for x in np.arange(start, 1, step).tolist():
        stage.canvas.glow(x + 0.07, 0.83, (0.14, 0.12), (255, 228, 160), 0.75)
        stage.canvas.box(x, 0.82, x + 0.14, 0.84, (255, 246, 214), 0.01)
        stage.canvas.line(((x + 0.19, low), (x + 0.19, 0.86)), (116, 110, 102), 0.008)
    stage.canvas.box(0, low, 1, low + 0.12, (206, 198, 180))
    stage.canvas.box(0, low + 0.12, 1, low + 0.135, (222, 178, 64))


def _ground(stage: _Stage) -> None:
    """The far verge, the road with its markings, the near verge."""
    rng, height, width = stage.rng, stage.image.height, stage.image.width
    verge = _VERGES[stage.scene.place]
    horizon, road, kerb = (1 - y / height for y in (stage.horizon, stage.road, stage.kerb))
    stage.canvas.box(0, road - 0.01, 1, horizon, shade(verge, -0.06))
    asphalt = shade((112, 114, 122), float(rng.uniform(-0.14, 0.14)))
    corners = ((0.0, kerb), (1.0, kerb), (1.0, road), (0.0, road))
    stage.canvas.gradient(corners, ((kerb, shade(asphalt, -0.1)), (road, shade(asphalt, 0.1))))
    stage.canvas.box(0, 0, 1, kerb, verge)
    paint, middle = (232, 231, 224), road + (kerb - road) * 0.3
    if stage.scene.place in ("street", "parking", "tunnel"):
        stage.canvas.box(0, kerb - 0.012, 1, kerb + 0.008, (222, 220, 214))
        stage.canvas.box(0, kerb - 0.024, 1, kerb - 0.012, shade(verge, -0.25))
        for x in np.arange(rng.uniform(-0.2, 0), 1.1, 0.16).tolist():
            stage.canvas.line(((x, kerb - 0.024), (x - 0.05, 0)), shade(verge, -0.08), 0.006)
    else:
        for x, y in rng.uniform((0, 0), (1, max(0.01, kerb - 0.02)), (16, 2)).tolist():
            stage.canvas.line(((x, y), (x + 0.012, y + 0.02)), shade(verge, -0.16), 0.006)
    if stage.scene.place == "parking":
        for x in np.arange(rng.uniform(-0.3, 0), 1.1, 0.3).tolist():
            stage.canvas.polygon(((x, kerb), (x + 0.016, kerb), (x + 0.1, road), (x + 0.09, road)), paint)
        return
    if stage.scene.place == "street" and rng.random() < 0.35:  # a zebra crossing
        left = rng.uniform(0.0, 0.7)
        for n in range(6):
            y0, y1 = (kerb + (road - kerb) * ((n + s) / 6) ** 0.8 for s in (0.15, 0.7))
            stage.canvas.polygon(((left, y0), (left + 0.22, y0), (left + 0.22, y1), (left, y1)), paint)
    else:
        for x in np.arange(rng.uniform(-0.15, 0), 1, 0.17).tolist():
            stage.canvas.box(x, middle, x + 0.095, middle + 0.012, paint)
    if stage.scene.place == "highway":
        stage.canvas.box(0, kerb + 0.02, 1, kerb + 0.03, paint)
        for x in range(0, width, 70):
            stage.brush(x, stage.road, 6, height * 0.05).box(0, 0, 1, 1, (140, 144, 150))
        stage.canvas.box(0, road + 0.022, 1, road + 0.05, (204, 208, 212))


def _roadside(stage: _Stage, lights: list[tuple[float, float, float]]) -> None:
    """Trees, lamp posts, signs and the like beyond the road."""
    rng, width, height = stage.rng, stage.image.width, stage.image.height
    foot = stage.road - height * 0.025
    if stage.scene.place == "tunnel":
        return
    if stage.scene.place != "parking":
        for _ in range(int(rng.integers(2, 6))):
            _tree(stage, rng.uniform(0, width), foot, height * rng.uniform(0.18, 0.36))
    if stage.scene.place in ("street", "parking", "highway"):
        start, tall = rng.uniform(0, 260), height * 0.44
        for x in np.arange(start, width, 290).tolist():
            post = stage.brush(x, foot, tall * 0.3, tall)
            post.box(0.0, 0.0, 0.07, 1.0, (92, 98, 106), 0.01)
            post.box(0.0, 0.97, 0.75, 1.0, (92, 98, 106), 0.015)
            post.box(0.5, 0.945, 0.9, 0.985, (255, 244, 204) if stage.dark else (214, 216, 214), 0.02)
            lights.append((*post.at((0.7, 0.95)), height * 0.13))
    if rng.random() < 0.5:
        sign = stage.brush(rng.uniform(0.1, 0.9) * width, foot, 40, height * 0.17)
        sign.box(0.47, 0.0, 0.53, 0.8, (120, 124, 130))
        sign.disc(0.5, 0.8, 0.17, (198, 70, 66))
        sign.disc(0.5, 0.8, 0.115, (244, 242, 236))
    if stage.scene.place in ("street", "coast") and rng.random() < 0.6:
        bench = stage.brush(rng.uniform(0.05, 0.85) * width, foot, height * 0.12, height * 0.065)
        for x in (0.1, 0.84):
            bench.box(x, 0.0, x + 0.06, 0.9, (80, 82, 86))
        bench.box(0.0, 0.4, 1.0, 0.55, (156, 116, 82), 0.05)
        bench.box(0.0, 0.75, 1.0, 0.95, (156, 116, 82), 0.05)


def _tree(stage: _Stage, x: float, ground: float, size: float) -> None:
    rng = stage.rng
    tree = stage.brush(x - size / 2, ground, size, size)
    trunk, green = (116, 88, 66), shade((88, 144, 84), float(rng.uniform(-0.2, 0.1)))
    form = "palm" if stage.scene.place == "coast" else str(rng.choice(["round", "round", "poplar", "fir"]))
    if form == "palm":
        tree.line(((0.46, 0.0), (0.5, 0.4), (0.56, 0.8)), trunk, 0.055)
        for dx, dy in ((-0.36, 0.02), (-0.26, 0.17), (0.26, 0.17), (0.36, 0.02), (-0.2, -0.13), (0.22, -0.13)):
            tip = (0.56 + dx, 0.8 + dy)
            tree.polygon(
                ((0.56, 0.76), (0.56 + dx * 0.5, 0.9 + dy * 0.7), tip, (0.56 + dx * 0.5, 0.8 + dy * 0.6)), green
            )
        return
    tree.box(0.46, 0.0, 0.54, 0.5, trunk)
    if form == "round":
        for dx, y, r in ((0.32, 0.5, 0.2), (0.68, 0.52, 0.2), (0.5, 0.7, 0.25)):
            tree.disc(dx, y, r, green)
        tree.disc(0.44, 0.72, 0.15, shade(green, 0.1))
    elif form == "poplar":
        tree.disc(0.5, 0.6, 0.16, green, 2.5)
        tree.disc(0.46, 0.64, 0.08, shade(green, 0.1), 3.0)
    else:
        for y, half in ((0.14, 0.3), (0.4, 0.23), (0.64, 0.16)):
            tree.polygon(((0.5 - half, y), (0.5 + half, y), (0.5, y + 0.4)), shade(green, -0.12))


def _traffic_behind(stage: _Stage) -> None:
    """Small grey vehicles and pedestrians far behind, which no caption would mention."""
    rng, width, height = stage.rng, stage.image.width, stage.image.height
    for _ in range(int(rng.integers(0, 3))):
        kind = str(rng.choice(TYPES))
        high, grey = height * (0.1 if kind in ("Bus", "Truck") else 0.07), int(rng.integers(130, 175))
        flipped = bool(rng.random() < 0.5)
        brush = stage.brush(
            rng.uniform(-0.05, 0.95) * width, stage.road + height * 0.045, high * aspect(kind, "side"), high, flipped
        )
        draw_vehicle(brush, kind, "side", (grey, grey, grey + 5), rng, lamps=False)
    if stage.scene.place in ("street", "coast"):
        for _ in range(int(rng.integers(0, 3))):
            _passer_by(stage.image, rng, rng.uniform(0, width), stage.road - height * 0.02, height * 0.13)


def _passer_by(image: Image.Image, rng: np.random.Generator, x: float, ground: float, height: float) -> None:
    person = Person(bool(rng.random() < 0.5), "adult", "side", "grey", "black")
    brush = Brush(image, x - height / 2, ground, height, height, bool(rng.random() < 0.5))
    draw_person(brush, person, int(rng.integers(12)))


def draw_foreground(image: Image.Image, scene: Scene, subject: tuple[float, float], rng: np.random.Generator) -> None:
    """Sometimes draw an object in front of one edge of the subject.

    Args:
        image: The canvas.
        scene: The scene.
        subject: The left and right side of the subject in pixels.
        rng: Random numbers.
    """
    width, height = image.size
    left, right = subject
    reach = (right - left) * rng.uniform(0.0, 0.13)
    edge = left + reach if rng.random() < 0.5 else right - reach
    chance = rng.random()
    if chance < 0.1:
        pole = Brush(image, edge - width * 0.009, height, width * 0.018, height)
        pole.box(0, -0.1, 1, 1.1, (92, 98, 106))
        pole.box(0, -0.1, 0.3, 1.1, (128, 134, 142))
    elif chance < 0.2:
        green = (84, 132, 74)
        for r, dx, dy in rng.uniform((0.04, -0.06, 0.0), (0.09, 0.06, 0.1), (7, 3)).tolist():
            leaf = shade(green, float(rng.uniform(-0.2, 0.1)))
            Brush(image, 0, height, width, height).disc(edge / width + dx, dy, r, leaf)
    elif chance < 0.26:
        for x in (edge - 50, edge + 30):
            cone = Brush(image, x, height - height * 0.03, height * 0.1, height * 0.16)
            cone.polygon(((0.14, 0.05), (0.86, 0.05), (0.58, 1.0), (0.42, 1.0)), (222, 112, 70))
            cone.polygon(((0.26, 0.38), (0.74, 0.38), (0.65, 0.64), (0.35, 0.64)), (244, 240, 232))
            cone.box(0.0, 0.0, 1.0, 0.1, (70, 72, 78))
    elif chance < 0.33 and scene.kind == "vehicle":  # a second person would be ambiguous
        _passer_by(image, rng, edge, height * 1.02, height * 0.5)


def relight(image: Image.Image, light: str, *, subject: bool) -> Image.Image:
    """Return the image in a light (see `LIGHTS`), with the strong tint of the backdrop or the mild one of subjects."""
    tint, behind, on_subject = _TINTS[light]
    share = on_subject if subject else behind
    return Image.blend(image, Image.new("RGB", image.size, tint), share) if share else image
