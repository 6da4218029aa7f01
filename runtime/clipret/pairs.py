"""Lists of images and captions, many to many: training learns from them, the check of an export measures with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipret.errors import ClipretError
from clipret.tables import pick_column, read_table

__all__ = ["PairSet", "read_pairs"]


@dataclass(frozen=True)
class PairSet:
    """Images and captions, many to many: `of_image[i]` are the positions in `captions` that belong to `paths[i]`.

    Every image is named once and every caption text is kept once, so that rows with the same image or the same
    caption are each other's positives by construction.
    """

    paths: tuple[Path, ...]
    captions: tuple[str, ...]
    of_image: tuple[tuple[int, ...], ...]

    def subset(self, keep: Sequence[int]) -> "PairSet":
        """The images at these positions, with only their own captions."""
        new: dict[int, int] = {}
        for image in keep:
            for caption in self.of_image[image]:
                new.setdefault(caption, len(new))
        return PairSet(
            tuple(self.paths[image] for image in keep),
            tuple(self.captions[caption] for caption in new),
            tuple(tuple(new[caption] for caption in self.of_image[image]) for image in keep),
        )

    def of_caption(self) -> list[list[int]]:
        """For each caption the positions of its images."""
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
    """Read a CSV, TSV or JSONL list with one image and one caption a row.

    Images are relative to `image_root`, by default the list's folder; columns are detected when not named.
    Raises ClipretError as `read_table` and `pick_column` do, and for an empty image or caption.
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
