"""Images and their captions, many to many, for training and for the parity check of an export."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipret.errors import ClipretError
from clipret.tables import pick_column, read_table

__all__ = ["PairSet", "read_pairs"]


@dataclass(frozen=True)
class PairSet:
    """Images and captions, many to many.

    Each image path and each caption text occurs once. Rows of an annotations file that share an image or a caption are
    therefore positives of each other.

    Attributes:
        paths: The image files.
        captions: The caption texts.
        of_image: For `paths[i]`, the positions of its captions in `captions`.

    Examples:
        >>> pairs = PairSet((Path("a.jpg"), Path("b.jpg")), ("a car", "a red car"), ((0, 1), (0,)))
        >>> pairs.of_caption()
        [[0, 1], [0]]
        >>> pairs.subset([1]).captions
        ('a car',)
    """

    paths: tuple[Path, ...]
    captions: tuple[str, ...]
    of_image: tuple[tuple[int, ...], ...]

    def subset(self, keep: Sequence[int]) -> "PairSet":
        """Select images by position, with their captions only."""
        new_position: dict[int, int] = {}
        for image in keep:
            for caption in self.of_image[image]:
                new_position.setdefault(caption, len(new_position))
        return PairSet(
            tuple(self.paths[image] for image in keep),
            tuple(self.captions[caption] for caption in new_position),
            tuple(tuple(new_position[caption] for caption in self.of_image[image]) for image in keep),
        )

    def of_caption(self) -> list[list[int]]:
        """For each caption, the positions of its images."""
        images: list[list[int]] = [[] for _ in self.captions]
        for image, captions in enumerate(self.of_image):
            for caption in captions:
                images[caption].append(image)
        return images


def read_pairs(
    path: Path,
    *,
    image_root: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    where: str | None = None,
) -> PairSet:
    """Read an annotations file (CSV, TSV or JSONL) with one image and one caption per row.

    Args:
        path: The annotations file.
        image_root: What image paths are relative to; default: the folder of the annotations file.
        image_column: Column of image paths; default: detected by its name.
        caption_column: Column of captions; default: detected by its name.
        where: SQL expression that selects rows, see `read_table`.

    Raises:
        ClipretError: As `read_table` and `pick_column`, and for an empty image or caption.
    """
    table = read_table(path, where)
    image, caption = pick_column(table, image_column, "image"), pick_column(table, caption_column, "caption")
    root = image_root or path.parent
    captions: dict[str, int] = {}
    of_image: dict[str, dict[int, None]] = {}
    for row in table.rows:
        name, text = row[image].strip(), row[caption].strip()
        if not name or not text:
            raise ClipretError(
                f"{path} has a row with an empty {caption if name else image} ({text or name or 'both are empty'}): "
                "remove it, or leave it out with --where"
            )
        of_image.setdefault(name, {})[captions.setdefault(text, len(captions))] = None
    return PairSet(tuple(root / name for name in of_image), tuple(captions), tuple(map(tuple, of_image.values())))
