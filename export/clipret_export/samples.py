"""What an export is checked with: images and texts that everyone has, and the user's own."""

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
    "The quick brown fox jumps over the lazy dog; " * 12,  # longer than any context: the cut must agree too
)
_SIZES = [(320, 200), (90, 251), (640, 64), (33, 77), (500, 499), (224, 180)]


def sample_images(count: int = 12) -> list[Image.Image]:
    """ImageReader, none of them square: smooth colour fields with hard-edged shapes and noise, always the same."""
    made = []
    for number in range(count):
        width, height = _SIZES[number % len(_SIZES)]
        rng = np.random.default_rng(number)
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-0.08, 0.08, (3, 3)) * (1, 1, 40)]
        canvas = 127 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
        canvas[height // 4 : height // 2, width // 5 : width // 2] = rng.integers(0, 256, 3)
        made.append(Image.fromarray(canvas.clip(0, 255).astype(np.uint8)))
    return made


@dataclass(frozen=True)
class Sample:
    """The user's images, with captions where a list has them: `source` is a folder of images or a list.

    `limit`: at most so many images, spread evenly over all of them.
    """

    source: Path
    image_root: Path | None = None
    where: str | None = None
    limit: int = 1000
    image_column: str | None = None
    caption_column: str | None = None

    def read(self) -> PairSet:
        """Raises ClipretError as `find_images` and `read_pairs` do, and when nothing is left."""
        if self.source.is_dir():
            found = find_images(self.source)
            pairs = PairSet(tuple(found), (), ((),) * len(found))
        else:
            columns = {"image_column": self.image_column, "caption_column": self.caption_column}
            pairs = read_pairs(self.source, image_root=self.image_root, where=self.where, **columns)
        if not pairs.paths:
            raise ClipretError(f"{self.source} holds no images to check with: look at its --where")
        step = max(1.0, len(pairs.paths) / self.limit)
        return pairs.subset([int(at * step) for at in range(min(self.limit, len(pairs.paths)))])
