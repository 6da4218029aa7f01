"""Drawing a scene as an image."""

import numpy as np
from PIL import Image

from clipret_training.choices import Style
from clipret_training.synthetic.backdrop import draw_backdrop, draw_foreground, relight
from clipret_training.synthetic.brush import Brush, Color, shade
from clipret_training.synthetic.camera import degrade
from clipret_training.synthetic.people import HALF_WIDTH, draw_person
from clipret_training.synthetic.scene import COLORS, Person, Scene
from clipret_training.synthetic.vehicles import aspect, draw_vehicle

__all__ = ["draw"]

_SIZES = ((320, 240), (320, 214), (280, 280))  # width, height
_SCALE = 2  # the canvas is twice as large as the image, for smooth edges
_WIDEST = 3.0  # the largest aspect ratio of a crop, either way

Box = tuple[float, float, float, float]  # left, top, right, bottom on the canvas, in pixels


def draw(scene: Scene, rng: np.random.Generator, style: Style) -> Image.Image:
    """Draw a scene.

    Args:
        scene: The scene.
        rng: Random numbers.
        style: `web` is the whole scene, clean; `surveillance` is the crop of a surveillance camera around the subject.

    Returns:
        An RGB image.
    """
    width, height = _SIZES[int(rng.integers(len(_SIZES)))]
    image = Image.new("RGB", (width * _SCALE, height * _SCALE))
    kerb = draw_backdrop(image, scene, rng)
    if scene.person is None:
        box = _place_vehicle(image, scene, kerb, rng)
    else:
        box = _place_person(image, scene.person, scene.flipped, kerb, rng)
    draw_foreground(image, scene, (box[0], box[2]), rng)
    if scene.place != "tunnel":
        image = relight(image, scene.light, subject=True)
    if style == "surveillance":
        image = image.crop(_crop(box, image.size, rng))
    image = image.resize((image.width // _SCALE, image.height // _SCALE), Image.Resampling.BOX)
    return degrade(image, rng) if style == "surveillance" else image


def _place_vehicle(image: Image.Image, scene: Scene, kerb: float, rng: np.random.Generator) -> Box:
    ratio = aspect(scene.type, scene.view)
    tallest = image.height * (0.66 if scene.type in ("Bus", "Truck", "Microbus") else 0.6)
    width = min(image.width * rng.uniform(0.6, 0.94), tallest * rng.uniform(0.85, 1.0) * ratio)
    height = width / ratio
    left = (image.width - width) * rng.uniform(0.2, 0.8)
    ground = kerb - image.height * rng.uniform(0.02, 0.08)
    brush = Brush(image, left, ground, width, height, scene.flipped)
    dark = scene.light in ("night", "dusk") or scene.place == "tunnel"
    draw_vehicle(brush, scene.type, scene.view, _variant(scene.color, rng), rng, lamps=dark)
    return left, ground - height * 1.03, left + width, ground


def _variant(name: str, rng: np.random.Generator) -> Color:
    """A random shade that people would still call by the same name; white and black vary the least."""
    reach = 0.03 if name in ("white", "black") else 0.08
    red, green, blue = (
        int(level) for level in rng.integers(-5, 6, 3) + shade(COLORS[name], rng.uniform(-reach, reach))
    )
    return min(max(red, 0), 255), min(max(green, 0), 255), min(max(blue, 0), 255)


def _place_person(image: Image.Image, person: Person, flipped: bool, kerb: float, rng: np.random.Generator) -> Box:
    height = image.height * rng.uniform(0.64, 0.8) * (0.84 if person.age == "child" else 1.0)
    middle = image.width * rng.uniform(0.3, 0.7)
    ground = kerb + (image.height - kerb) * rng.uniform(0.1, 0.6)
    draw_person(Brush(image, middle - height / 2, ground, height, height, flipped), person, int(rng.integers(12)))
    half = height * HALF_WIDTH
    return middle - half, ground - height * 1.04, middle + half, ground


def _crop(box: Box, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The box of the subject with the margins of an imperfect detector."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    margins = rng.uniform(-0.03, 0.3, 4) * rng.choice([0.4, 1.0])
    left, right = max(0.0, left - margins[0] * width), min(size[0], right + margins[2] * width)
    top, bottom = max(0.0, top - margins[1] * height), min(size[1], bottom + margins[3] * height)
    # Limit the aspect ratio.
    return (
        round(left),
        round(top),
        round(min(right, left + (bottom - top) * _WIDEST)),
        round(min(bottom, top + (right - left) * _WIDEST)),
    )
