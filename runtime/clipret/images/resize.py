"""Resize an RGB image to the square input of a tower, with exactly the pixels of the reference preprocessings."""

import numpy as np
from PIL import Image

from clipret.arrays import Pixels
from clipret.bundle import ImageSpec

__all__ = ["Box", "fit", "fit_box", "resized"]

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edges in pixels."""

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MAX_ASPECT = 64  # long side to short side, beyond which resizing the whole image takes too much memory


def fit(image: Image.Image, spec: ImageSpec) -> Pixels:
    """Resize, then crop or pad an RGB image.

    Sizes and offsets are rounded as in torchvision's Resize and CenterCrop and in open_clip's ResizeKeepRatio and
    CenterCropOrPad, so the pixels equal those of open_clip's evaluation transform. If one side is more than 64 times
    the other, only what the crop keeps is resampled, which differs by one level at most.

    Args:
        image: The image, RGB.
        spec: The preprocessing.

    Returns:
        uint8 [S,S,3], where S is `spec.size`.
    """
    size = spec.size
    width, height = resized(*image.size, spec)
    if max(width, height) > _MAX_ASPECT * size:
        return fit_box(image, spec, (0, 0, *image.size))
    image = image.resize((width, height), _FILTERS[spec.interpolation])
    if spec.resize == "shortest":
        left, top = _offset(width, size), _offset(height, size)
        image = image.crop((left, top, left + size, top + size))
    return _squared(image, spec)


def fit_box(image: Image.Image, spec: ImageSpec, box: Box) -> Pixels:
    """Resize a part of an image, resampling only what the crop keeps: faster than `fit` and within one level of it.

    Args:
        image: The image, RGB.
        spec: The preprocessing.
        box: The part.

    Returns:
        uint8 [S,S,3], where S is `spec.size`.
    """
    left, upper, right, lower = box
    width, height = resized(right - left, lower - upper, spec)
    kept = min(width, spec.size), min(height, spec.size)
    x, y = _offset(width, kept[0]), _offset(height, kept[1])
    across, down = (right - left) / width, (lower - upper) / height
    left, upper = left + x * across, upper + y * down
    right, lower = min(left + kept[0] * across, image.width), min(upper + kept[1] * down, image.height)
    return _squared(image.resize(kept, _FILTERS[spec.interpolation], box=(left, upper, right, lower)), spec)


def resized(width: float, height: float, spec: ImageSpec) -> tuple[int, int]:
    """Compute the size that an image is resized to before it is cropped or padded.

    Examples:
        >>> resized(400, 300, ImageSpec(size=30))
        (40, 30)
    """
    size = spec.size
    if spec.resize == "squash":
        return size, size
    if spec.resize == "longest":
        ratio = max(width, height) / size
        # An image of 1 x 1000 pixels would shrink to a width of 0.
        return max(round(width / ratio), 1), max(round(height / ratio), 1)
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)


def _offset(side: int, size: int) -> int:
    return round((side - size) / 2.0)


def _squared(image: Image.Image, spec: ImageSpec) -> Pixels:
    """Convert to uint8 [S,S,3]; a smaller image is centred and padded."""
    size, (width, height) = spec.size, image.size
    if image.size != (size, size):
        square = Image.new("RGB", (size, size), (spec.fill,) * 3)
        square.paste(image, ((size - width) // 2, (size - height) // 2))
        image = square
    return np.array(image)
