"""The effects of a surveillance camera: low light, blur, noise, low resolution, strong compression."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["degrade"]

_SODIUM = np.array((1.03, 0.99, 0.91), np.float32)  # the tint of sodium lamps, mild so that colours stay clear


def degrade(image: Image.Image, rng: np.random.Generator, strength: float = 1.0) -> Image.Image:
    """Apply the effects in the order of a camera: light, optics, sensor, overlay, codec.

    Low light is mild, because people would call a dark orange brown.

    Args:
        image: An RGB image.
        rng: Random numbers.
        strength: 0 changes almost nothing, 1 is strong.

    Returns:
        An RGB image of at most the same size.
    """
    levels = np.linspace(0, 1, 256, dtype=np.float32)[:, None].repeat(3, axis=1)  # a curve for each channel
    dark = rng.random() < 0.4
    if dark:
        levels = levels ** (1 + 0.15 * strength) * (1 - rng.uniform(0.06, 0.26) * strength)
        if rng.random() < 0.5:
            levels = levels * (1 + (_SODIUM - 1) * strength)
    elif rng.random() < 0.25:
        haze = rng.uniform(0.05, 0.2) * strength
        levels = levels * (1 - haze) + 0.8 * haze
    image = image.point([int(level) for level in (levels.clip(0, 1) * 255).T.ravel()])

    chance = rng.random()
    if chance < 0.35:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.7) * strength))
    elif chance < 0.6:
        image = _motion(image, 1 + int(rng.integers(2, 8) * strength))

    share = 1 - rng.uniform(0.05, 0.6) * strength
    small = tuple(max(min(24, side), round(side * share)) for side in image.size)
    image = image.resize((small[0], small[1]), Image.Resampling.BILINEAR)

    sigma = rng.uniform(2, 11 if dark else 7) * strength
    grain = rng.standard_normal((image.height, image.width, 1), np.float32) * sigma  # of the brightness
    speckle = rng.standard_normal((image.height, image.width, 3), np.float32) * (sigma / 2)  # of the colour
    noisy = np.asarray(image, np.float32) + grain + speckle
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

    if rng.random() < 0.3 * strength:
        stamp = f"CAM{rng.integers(1, 40):02d} {rng.integers(0, 24):02d}:{rng.integers(0, 60):02d}"
        ImageDraw.Draw(image).text((3, 2), stamp, fill=(230, 230, 230), font_size=max(8, image.height // 18))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(92 - rng.uniform(15, 62) * strength))
    return Image.open(buffer).convert("RGB")


def _motion(image: Image.Image, length: int) -> Image.Image:
    """Horizontal motion blur: the mean of `length` neighbouring pixels."""
    pixels = np.asarray(image, np.float32)
    before = length // 2
    padded = np.pad(pixels, ((0, 0), (before + 1, length - before - 1), (0, 0)), mode="edge")
    total = np.cumsum(padded, axis=1)
    blurred = (total[:, length:] - total[:, :-length]) / length
    return Image.fromarray((blurred + 0.5).clip(0, 255).astype(np.uint8))
