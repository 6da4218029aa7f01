"""Lists of pictures and titles, many to many: training learns from them, the check of an export measures with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipret.errors import ClipretError
from clipret.tables import pick_column, read_table

__all__ = ["PairSet", "read_pairs"]


@dataclass(frozen=True)
class PairSet:
    """Pictures and titles, many to many: `of_picture[i]` are the positions in `titles` that belong to `paths[i]`.

    Every picture is named once and every title text is kept once, so that rows with the same picture or the same
    title are each other's positives by construction.
    """

    paths: tuple[Path, ...]
    titles: tuple[str, ...]
    of_picture: tuple[tuple[int, ...], ...]

    def subset(self, keep: Sequence[int]) -> "PairSet":
        """The pictures at these positions, with only their own titles."""
        new: dict[int, int] = {}
        for picture in keep:
            for title in self.of_picture[picture]:
                new.setdefault(title, len(new))
        return PairSet(
            tuple(self.paths[picture] for picture in keep),
            tuple(self.titles[title] for title in new),
            tuple(tuple(new[title] for title in self.of_picture[picture]) for picture in keep),
        )

    def of_title(self) -> list[list[int]]:
        """For each title the positions of its pictures."""
        pictures: list[list[int]] = [[] for _ in self.titles]
        for picture, titles in enumerate(self.of_picture):
            for title in titles:
                pictures[title].append(picture)
        return pictures


def read_pairs(
    path: Path,
    *,
    image_root: Path | None = None,
    image_column: str | None = None,
    title_column: str | None = None,
    where: str | None = None,
) -> PairSet:
    """Read a CSV, TSV or JSONL list with one picture and one title a row.

    Pictures are relative to `image_root`, by default the list's folder; columns are detected when not named.
    Raises ClipretError as `read_table` and `pick_column` do, and for an empty picture or title.
    """
    table = read_table(path, where)
    image, title = pick_column(table, image_column, "image"), pick_column(table, title_column, "title")
    root = image_root or path.parent
    titles: dict[str, int] = {}
    of_picture: dict[str, dict[int, None]] = {}
    for row in table.rows:
        name, text = row[image].strip(), row[title].strip()
        if not name or not text:
            raise ClipretError(
                f"{path} has a row with an empty {title if name else image} ({text or name or 'both are empty'}): "
                "remove it, or leave it out with --where"
            )
        of_picture.setdefault(name, {})[titles.setdefault(text, len(titles))] = None
    return PairSet(tuple(root / name for name in of_picture), tuple(titles), tuple(map(tuple, of_picture.values())))
