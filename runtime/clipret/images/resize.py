"""An RGB image brought to the square of a tower, to the pixel as the reference preprocessings do it."""

import numpy as np
from PIL import Image

from clipret.arrays import Pixels
from clipret.bundle import ImageSpec

__all__ = ["Box", "fit", "fit_box", "resized"]

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge in pixels."""

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_LONGEST = 64  # sides to one another, beyond which the whole of a resized image is too much memory


def fit(image: Image.Image, spec: ImageSpec) -> Pixels:
    """An RGB image brought to uint8 [S,S,3] as `spec` says.

    Sizes and offsets are rounded as in torchvision's Resize and CenterCrop and in open_clip's ResizeKeepRatio and
    CenterCropOrPad, so that pixels equal those of open_clip's own evaluation transform. Where one side is more than
    64 times the other, only what the crop keeps is resampled; that differs by one level at most.
    """
    size = spec.size
    width, height = resized(*image.size, spec)
    if max(width, height) > _LONGEST * size:
        return fit_box(image, spec, (0, 0, *image.size))
    image = image.resize((width, height), _FILTERS[spec.interpolation])
    if spec.resize == "shortest":
        left, top = _offset(width, size), _offset(height, size)
        image = image.crop((left, top, left + size, top + size))
    return _squared(image, spec)


def fit_box(image: Image.Image, spec: ImageSpec, box: Box) -> Pixels:
    """The same from the part `box` of the image, without what the crop drops: within a level of `fit`, and faster."""
    left, upper, right, lower = box
    width, height = resized(right - left, lower - upper, spec)
    kept = min(width, spec.size), min(height, spec.size)
    x, y = _offset(width, kept[0]), _offset(height, kept[1])
    across, down = (right - left) / width, (lower - upper) / height
    left, upper = left + x * across, upper + y * down
    right, lower = min(left + kept[0] * across, image.width), min(upper + kept[1] * down, image.height)
    return _squared(image.resize(kept, _FILTERS[spec.interpolation], box=(left, upper, right, lower)), spec)


def resized(width: float, height: float, spec: ImageSpec) -> tuple[int, int]:
    """What an image of this size is resized to, before it is cropped or padded."""
    size = spec.size
    if spec.resize == "squash":
        return size, size
    if spec.resize == "longest":
        ratio = max(width, height) / size
        # An image of 1 x 1000 pixels would shrink to a width of none.
        return max(round(width / ratio), 1), max(round(height / ratio), 1)
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)


def _offset(side: int, size: int) -> int:
    return round((side - size) / 2.0)


def _squared(image: Image.Image, spec: ImageSpec) -> Pixels:
    """uint8 [S,S,3], a smaller image in the middle of the filling."""
    size, (width, height) = spec.size, image.size
    if image.size != (size, size):
        square = Image.new("RGB", (size, size), (spec.fill,) * 3)
        square.paste(image, ((size - width) // 2, (size - height) // 2))
        image = square
    return np.array(image)
