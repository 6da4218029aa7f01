"""A scene as a picture, in either style."""

import numpy as np
from PIL import Image, ImageDraw

from clipret.training.scenes.backdrop import draw_backdrop, draw_foreground, relight
from clipret.training.scenes.brush import Brush, shade
from clipret.training.scenes.camera import degrade
from clipret.training.scenes.people import draw_person
from clipret.training.scenes.scene import COLORS, Scene, Style
from clipret.training.scenes.vehicles import ASPECTS, draw_vehicle

__all__ = ["draw"]

_SIZES = ((320, 240), (320, 214), (256, 256))  # width, height
_SCALE = 2  # the canvas is twice as large, which gives smooth edges when it is reduced


def draw(scene: Scene, rng: np.random.Generator, style: Style) -> Image.Image:
    """An RGB picture. `web`: the whole scene, clean. `surveillance`: a camera's crop around the subject."""
    width, height = _SIZES[int(rng.integers(len(_SIZES)))]
    image = Image.new("RGB", (width * _SCALE, height * _SCALE))
    _, kerb = draw_backdrop(image, scene, rng)
    place = _draw_subject if scene.person is None else _draw_pedestrian
    box = place(image, scene, kerb, rng)
    draw_foreground(image, (box[0], box[2]), rng)
    image = relight(image, scene.light if scene.place != "tunnel" else "overcast")
    if style == "surveillance":
        image = image.crop(_crop(box, image.size, rng))
    image = image.resize((max(1, image.width // _SCALE), max(1, image.height // _SCALE)), Image.Resampling.BOX)
    return degrade(image, rng) if style == "surveillance" else image


Box = tuple[float, float, float, float]  # left, top, right, bottom on the canvas, in pixels


def _draw_subject(image: Image.Image, scene: Scene, kerb: float, rng: np.random.Generator) -> Box:
    aspect = ASPECTS[scene.type]
    width = min(image.width * rng.uniform(0.55, 0.94), image.height * 0.66 * aspect)
    height = width / aspect
    left = (image.width - width) * rng.uniform(0.2, 0.8)
    ground = kerb - image.height * rng.uniform(0.02, 0.07)
    color = shade(COLORS[scene.color], float(rng.uniform(-0.1, 0.08)))
    brush = Brush(ImageDraw.Draw(image), left, ground, width, height, scene.mirrored)
    draw_vehicle(brush, scene.type, color, rng, lamps=scene.light in ("night", "dusk"))
    return left, ground - height, left + width, ground


def _draw_pedestrian(image: Image.Image, scene: Scene, kerb: float, rng: np.random.Generator) -> Box:
    person = scene.person
    assert person is not None
    tall = {"child": 0.72, "adult": 1.0, "elder": 0.93}[person.age]
    height = image.height * rng.uniform(0.62, 0.76) * tall
    width = height * (0.42 if person.age == "child" else 0.36)
    left = (image.width - width) * rng.uniform(0.2, 0.8)
    ground = kerb + (image.height - kerb) * rng.uniform(0.1, 0.6)
    draw_person(
        Brush(ImageDraw.Draw(image), left, ground, width, height, scene.mirrored), person, int(rng.integers(12))
    )
    return left, ground - height * 1.03, left + width, ground


def _crop(box: Box, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The subject with margins that a detector might leave: from a little too tight to generous."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    margins = rng.uniform(-0.03, 0.3, 4) * rng.choice([0.4, 1.0])
    return (
        round(max(0, left - margins[0] * width)),
        round(max(0, top - margins[1] * height)),
        round(min(size[0], right + margins[2] * width)),
        round(min(size[1], bottom + margins[3] * height)),
    )
