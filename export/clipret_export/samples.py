"""The inputs of the parity check: built-in images and texts, and the user's own."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clipret.errors import ClipretError
from clipret.images.walk import find_images
from clipret.pairs import PairSet, read_pairs

__all__ = ["TEXTS", "Sample", "sample_images"]

TEXTS = (
    "red",
    "a red sedan",
    "a woman with a backpack, seen from behind",
    "一辆红色的轿车停在路边",
    "two dogs run across a field of tall grass while a man in a yellow coat watches them from the fence",
    "night, rain",
    "a grey truck",
    "The quick brown fox jumps over the lazy dog; " * 12,  # longer than any context, to check the truncation
)
_SIZES = [(320, 200), (90, 251), (640, 64), (33, 77), (500, 499), (224, 180)]


def sample_images(count: int = 12) -> list[Image.Image]:
    """Draw the built-in images: smooth colour fields with hard-edged shapes and noise, none of them square.

    Args:
        count: Number of images.

    Returns:
        The images, the same in every call.
    """
    images = []
    for number in range(count):
        width, height = _SIZES[number % len(_SIZES)]
        rng = np.random.default_rng(number)
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-0.08, 0.08, (3, 3)) * (1, 1, 40)]
        canvas = 127 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
        canvas[height // 4 : height // 2, width // 5 : width // 2] = rng.integers(0, 256, 3)
        images.append(Image.fromarray(canvas.clip(0, 255).astype(np.uint8)))
    return images


@dataclass(frozen=True)
class Sample:
    """Images of the user, with captions if they come from an annotations file.

    Attributes:
        source: A folder of images or an annotations file.
        image_root: The folder that paths in the annotations file are relative to; by default the file's own.
        where: SQL condition on the rows of the annotations file.
        limit: Maximum number of images, evenly spaced over all of them.
        image_column: Column of the image paths; by default detected.
        caption_column: Column of the captions; by default detected.
    """

    source: Path
    image_root: Path | None = None
    where: str | None = None
    limit: int = 1000
    image_column: str | None = None
    caption_column: str | None = None

    def read(self) -> PairSet:
        """Read the images and captions.

        Returns:
            At most `limit` images, with their captions.

        Raises:
            ClipretError: There are no images, or as `find_images` and `read_pairs`.
        """
        if self.source.is_dir():
            paths = find_images(self.source)
            pairs = PairSet(tuple(paths), (), ((),) * len(paths))
        else:
            columns = {"image_column": self.image_column, "caption_column": self.caption_column}
            pairs = read_pairs(self.source, image_root=self.image_root, where=self.where, **columns)
        if not pairs.paths:
            raise ClipretError(f"{self.source} has no images to use: check the path and the where=… condition")
        step = max(1.0, len(pairs.paths) / self.limit)
        return pairs.subset([int(at * step) for at in range(min(self.limit, len(pairs.paths)))])
