"""What a camera on a pole does to a picture: low light, blur, noise, few pixels, hard compression."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["degrade"]

_SODIUM = np.array((1.06, 0.98, 0.82), np.float32)  # the tint of sodium lamps, mild enough to leave colours nameable


def degrade(image: Image.Image, rng: np.random.Generator, strength: float = 1.0) -> Image.Image:
    """An RGB picture as a surveillance camera would deliver it; `strength` 0 leaves it nearly as it is, 1 is hard.

    The order is that of a camera: light, optics, sensor, overlay, codec.
    """
    pixels = np.asarray(image, np.float32) / 255
    dark = rng.random() < 0.45
    if dark:
        pixels = pixels ** (1 + 0.2 * strength) * (1 - rng.uniform(0.1, 0.42) * strength)
        if rng.random() < 0.5:
            pixels = pixels * (1 + (_SODIUM - 1) * strength)
    elif rng.random() < 0.25:
        pixels = pixels * (1 - 0.25 * strength) + 0.25 * strength  # haze
    image = Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))

    chance = rng.random()
    if chance < 0.35:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.8) * strength))
    elif chance < 0.6:
        image = _motion(image, 2 + int(rng.integers(1, 7) * strength))

    share = 1 - rng.uniform(0.1, 0.62) * strength
    small = (max(24, round(image.width * share)), max(24, round(image.height * share)))
    image = image.resize(small, Image.Resampling.BILINEAR)

    pixels = np.asarray(image, np.float32)
    sigma = rng.uniform(2, 11 if dark else 7) * strength
    grain = rng.normal(0, sigma, (image.height, image.width, 1)) + rng.normal(0, sigma / 2, pixels.shape)
    image = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))

    if rng.random() < 0.3:
        stamp = f"CAM{rng.integers(1, 40):02d} {rng.integers(0, 24):02d}:{rng.integers(0, 60):02d}"
        ImageDraw.Draw(image).text((3, 2), stamp, fill=(230, 230, 230))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(90 - rng.uniform(20, 62) * strength))
    return Image.open(buffer).convert("RGB")


def _motion(image: Image.Image, length: int) -> Image.Image:
    """Horizontal motion blur: the mean of `length` shifted copies."""
    pixels = np.asarray(image, np.float32)
    padded = np.pad(pixels, ((0, 0), (length, length), (0, 0)), mode="edge")
    total = np.cumsum(padded, axis=1)
    blurred = (total[:, length:] - total[:, :-length]) / length
    start = length // 2
    return Image.fromarray(blurred[:, start : start + image.width].clip(0, 255).astype(np.uint8))
