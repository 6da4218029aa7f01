"""Where a scene plays: sky, what stands at the roadside, the road. All from a few parameters and the generator."""

import numpy as np
from PIL import Image, ImageDraw

from clipret.training.scenes.brush import Brush, Color, mix, shade
from clipret.training.scenes.scene import Scene
from clipret.training.scenes.vehicles import ASPECTS, draw_vehicle

__all__ = ["draw_backdrop", "draw_foreground", "relight"]

_SKIES: dict[str, tuple[Color, Color]] = {
    "day": ((112, 176, 232), (214, 234, 246)),
    "overcast": ((168, 178, 188), (214, 218, 222)),
    "dusk": ((88, 92, 158), (246, 178, 132)),
    "night": ((16, 22, 46), (46, 56, 92)),
}
# What the light does to everything under it: a tint, and how much of it.
_TINTS: dict[str, tuple[Color, float]] = {
    "day": ((255, 250, 235), 0.0),
    "overcast": ((150, 156, 166), 0.1),
    "dusk": ((196, 112, 84), 0.14),
    "night": ((14, 20, 48), 0.36),
}


def draw_backdrop(image: Image.Image, scene: Scene, rng: np.random.Generator) -> tuple[float, float]:
    """Paint the whole canvas. Returns the heights, in pixels from the top, of the horizon and of the near kerb."""
    width, height = image.size
    canvas = ImageDraw.Draw(image)
    horizon = height * rng.uniform(0.42, 0.54)
    kerb = height * rng.uniform(0.86, 0.94)
    _sky(image, scene, horizon)
    if scene.place == "tunnel":
        _tunnel(canvas, width, height, horizon)
    elif scene.place == "country":
        _hills(canvas, width, horizon, rng)
    else:
        _houses(canvas, width, horizon, scene, rng)
    verge = {"country": (124, 158, 88), "street": (176, 172, 166), "parking": (158, 160, 160)}
    canvas.rectangle((0, horizon, width, height), fill=verge.get(scene.place, (138, 142, 136)))
    if scene.place in ("street", "country"):
        for _ in range(int(rng.integers(2, 6))):
            _tree(canvas, rng.uniform(0, width), horizon + height * 0.02, height * rng.uniform(0.16, 0.34), rng)
    asphalt = shade((104, 106, 112), float(rng.uniform(-0.15, 0.15)))
    road = horizon + height * 0.07
    canvas.rectangle((0, road, width, kerb), fill=asphalt)
    canvas.rectangle((0, kerb, width, height), fill=verge.get(scene.place, (150, 152, 152)))
    canvas.line((0, kerb, width, kerb), fill=(214, 212, 206), width=max(2, round(height * 0.008)))
    _markings(canvas, scene, width, height, road, kerb, rng)
    if scene.place != "parking" and rng.random() < 0.6:
        _traffic_behind(canvas, width, height, road, rng)
    return horizon, kerb


def _sky(image: Image.Image, scene: Scene, horizon: float) -> None:
    top, bottom = (np.array(color, np.float32) for color in _SKIES[scene.light])
    share = np.linspace(0, 1, max(2, round(horizon)), dtype=np.float32)[:, None, None]
    band = np.broadcast_to(top + (bottom - top) * share, (len(share), image.width, 3)).astype(np.uint8)
    image.paste(Image.fromarray(band), (0, 0))


def _houses(canvas: ImageDraw.ImageDraw, width: int, horizon: float, scene: Scene, rng: np.random.Generator) -> None:
    x = -rng.uniform(0, 60)
    walls: tuple[Color, ...] = ((206, 196, 184), (186, 178, 172), (172, 184, 196), (212, 204, 190), (166, 162, 168))
    if scene.place == "highway":
        walls = tuple(mix(wall, (190, 204, 216), 0.6) for wall in walls)  # far away
    scale = 0.5 if scene.place == "highway" else 1.0
    while x < width:
        wide, high = rng.uniform(70, 170) * scale, horizon * rng.uniform(0.35, 0.92) * scale
        wall = walls[int(rng.integers(len(walls)))]
        canvas.rectangle((x, horizon - high, x + wide, horizon + 2), fill=wall)
        lit = (250, 222, 140) if scene.light in ("night", "dusk") else (120, 138, 156)
        for row in np.arange(horizon - high + 12 * scale, horizon - 14 * scale, 24 * scale):
            for column in np.arange(x + 10 * scale, x + wide - 14 * scale, 22 * scale):
                glass = lit if rng.random() < 0.6 else shade(wall, -0.3)
                canvas.rectangle((column, row, column + 10 * scale, row + 13 * scale), fill=glass)
        x += wide + rng.uniform(0, 22) * scale


def _hills(canvas: ImageDraw.ImageDraw, width: int, horizon: float, rng: np.random.Generator) -> None:
    for layer, color in enumerate(((136, 164, 150), (112, 150, 100))):
        xs = np.linspace(0, width, 24)
        waves = np.sin(xs / width * rng.uniform(4, 9) + rng.uniform(0, 6)) * horizon * 0.07
        ys = horizon - horizon * (0.2 - 0.1 * layer) + waves
        canvas.polygon([(0, horizon), *zip(xs.tolist(), ys.tolist(), strict=True), (width, horizon)], fill=color)


def _tunnel(canvas: ImageDraw.ImageDraw, width: int, height: int, horizon: float) -> None:
    canvas.rectangle((0, 0, width, horizon), fill=(120, 116, 106))
    canvas.rectangle((0, 0, width, horizon * 0.3), fill=(78, 76, 72))
    for x in range(20, width, 120):
        canvas.rounded_rectangle((x, horizon * 0.34, x + 70, horizon * 0.4), 4, fill=(255, 236, 184))
    canvas.rectangle((0, horizon * 0.72, width, horizon), fill=(168, 164, 152))
    canvas.line((0, horizon * 0.72, width, horizon * 0.72), fill=(214, 176, 60), width=max(2, height // 120))


def _tree(canvas: ImageDraw.ImageDraw, x: float, ground: float, size: float, rng: np.random.Generator) -> None:
    canvas.rectangle((x - size * 0.04, ground - size * 0.5, x + size * 0.04, ground), fill=(104, 80, 60))
    green = shade((74, 122, 70), float(rng.uniform(-0.2, 0.15)))
    for dx, dy, r in ((-0.16, 0.5, 0.2), (0.16, 0.52, 0.2), (0.0, 0.68, 0.24)):
        cx, cy = x + dx * size, ground - dy * size
        canvas.ellipse((cx - r * size, cy - r * size, cx + r * size, cy + r * size), fill=green)


def _markings(
    canvas: ImageDraw.ImageDraw,
    scene: Scene,
    width: int,
    height: int,
    road: float,
    kerb: float,
    rng: np.random.Generator,
) -> None:
    paint = (226, 226, 220)
    if scene.place == "parking":
        for x in range(int(rng.uniform(-80, 0)), width, 190):
            canvas.line((x, kerb, x + 60, road), fill=paint, width=max(2, height // 100))
        return
    y = road + (kerb - road) * 0.3
    for x in range(int(rng.uniform(-60, 0)), width, 110):
        canvas.rectangle((x, y, x + 62, y + height * 0.012), fill=paint)
    if scene.place == "highway":
        canvas.rectangle((0, road - height * 0.035, width, road - height * 0.012), fill=(190, 194, 198))


def _traffic_behind(
    canvas: ImageDraw.ImageDraw, width: int, height: int, road: float, rng: np.random.Generator
) -> None:
    """Small grey vehicles far behind: traffic, but nothing that a caption would name."""
    for _ in range(int(rng.integers(1, 3))):
        kind = str(rng.choice(list(ASPECTS)))
        high = height * (0.09 if kind in ("Bus", "Truck") else 0.065)
        grey = int(rng.integers(110, 165))
        left = rng.uniform(-0.05, 0.95) * width
        brush = Brush(canvas, left, road + height * 0.05, high * ASPECTS[kind], high, bool(rng.random() < 0.5))
        draw_vehicle(brush, kind, (grey, grey, grey + 4), rng, lamps=False)


def draw_foreground(image: Image.Image, subject: tuple[float, float], rng: np.random.Generator) -> None:
    """Now and then a pole or a bush before the edge of the subject, whose left and right side are given."""
    width, height = image.size
    canvas = ImageDraw.Draw(image)
    chance = rng.random()
    left, right = subject
    edge = (
        left + (right - left) * rng.uniform(0.02, 0.16)
        if rng.random() < 0.5
        else right - (right - left) * rng.uniform(0.02, 0.16)
    )
    if chance < 0.14:
        canvas.rectangle((edge - width * 0.008, 0, edge + width * 0.008, height), fill=(88, 92, 96))
    elif chance < 0.24:
        for _ in range(7):
            r = height * rng.uniform(0.04, 0.09)
            x, y = edge + rng.normal() * width * 0.04, height - rng.uniform(0, 0.12) * height
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=shade((70, 112, 62), float(rng.uniform(-0.2, 0.2))))


def relight(image: Image.Image, light: str) -> Image.Image:
    """The whole picture under the light of the hour."""
    tint, share = _TINTS[light]
    return Image.blend(image, Image.new("RGB", image.size, tint), share) if share else image
