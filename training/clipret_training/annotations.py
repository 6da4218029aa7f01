"""The images of a training with their captions and groups, from an annotations file or from webdataset archives."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from clipret.errors import ClipretError
from clipret.locations import is_remote
from clipret.pairs import PairSet, read_pairs
from clipret.sources.archives import SUFFIXES
from clipret.sources.item import Item, without_bytes
from clipret.sources.source import open_source
from clipret.tables import Table, pick_column, read_table
from clipret_training.config import FitConfig
from clipret_training.seeds import seed_of

__all__ = ["Annotations", "read_annotation_files", "read_annotations", "split_pairs"]


@dataclass(frozen=True)
class Annotations:
    """Images with their captions and groups.

    Args:
        pairs: The paths of N images, and which captions belong to which image.
        groups: For each image the numbers of its groups, () if it has none. Images of one group, and their captions,
            are right answers to each other.
        read: For each image a function that returns its bytes from an archive or raises ImageError. None if the paths
            are files.
    """

    pairs: PairSet
    groups: tuple[tuple[int, ...], ...]
    read: tuple[Callable[[], bytes], ...] | None = None

    def subset(self, keep: Sequence[int]) -> "Annotations":
        """Select images.

        Args:
            keep: Their positions, each from 0 to N - 1.

        Returns:
            These images with their own captions only.
        """
        read = tuple(self.read[position] for position in keep) if self.read is not None else None
        return Annotations(self.pairs.subset(keep), tuple(self.groups[position] for position in keep), read)

    def fingerprint(self) -> int:
        """Return a hash of paths, captions and groups. A resumed run compares it with that of its start."""
        pairs = self.pairs
        return seed_of(str(pairs.paths), str(pairs.captions), str(pairs.of_image), str(self.groups))


def read_annotation_files(config: FitConfig) -> tuple[Annotations, Annotations]:
    """Read the images to train on and the held-out images.

    An image in both annotations files is held out and not trained on.

    Args:
        config: `data` and `where` select the training images; `val`, `val_where` or `val_split` the held-out ones.

    Returns:
        The training images and the held-out images.

    Raises:
        ClipretError: A file cannot be read, or no image is left to train on or to hold out.
    """
    annotations = read_annotations(config, config.data, config.where)
    if config.val is None and config.val_where is None:
        return split_pairs(annotations, config.val_split, config.seed)
    val_config = dataclasses.replace(config, group_column=None)  # validation counts the listed pairs only
    val = read_annotations(val_config, config.val or config.data, config.val_where)
    held_out = set(_resolved(val.pairs.paths))
    keep = [position for position, path in enumerate(_resolved(annotations.pairs.paths)) if path not in held_out]
    if not keep:
        raise ClipretError(
            f"every image of {config.data} is held out for validation: change where, val or val_where (--set)"
        )
    return annotations.subset(keep), val


def _resolved(paths: Iterable[Path]) -> Iterator[Path]:
    """Absolute paths without links and `..`, so that two annotations files can be compared."""
    resolve_folder = cache(Path.resolve)  # there are few folders
    for path in paths:
        absolute = resolve_folder(path.parent) / path.name
        yield absolute.resolve() if absolute.is_symlink() else absolute


def read_annotations(config: FitConfig, source: str, where: str | None) -> Annotations:
    """Read images, captions and groups.

    Args:
        config: The columns of images, captions and groups, and the image root.
        source: A .csv, .tsv or .jsonl file, a .tar file, a pattern such as shards/{000..127}.tar, a folder of .tar
            files, or the URL of one of these archives.
        where: SQL expression; only rows for which it holds are read.

    Raises:
        ClipretError: The source cannot be read (see `read_pairs` and `open_source`), or an image has no caption.
    """
    if is_remote(source):
        return _read_archives(config, source, where)
    path = Path(source)
    if path.is_dir() or path.suffix.lower() in SUFFIXES:
        return _read_archives(config, path, where)
    root = Path(config.image_root) if config.image_root is not None else None
    pairs = read_pairs(
        path, image_root=root, image_column=config.image_column, caption_column=config.caption_column, where=where
    )
    if config.group_column is None:
        return Annotations(pairs, ((),) * len(pairs.paths))
    table = read_table(path, where)
    image = pick_column(table, config.image_column, "image")
    paths = [(root or path.parent) / row[image].strip() for row in table.rows]
    return Annotations(pairs, _groups(table, config.group_column, paths, pairs))


def split_pairs(annotations: Annotations, share: float, seed: int) -> tuple[Annotations, Annotations]:
    """Split by image into a training part and a validation part.

    Args:
        annotations: What to split.
        share: Share of the images to hold out, above 0 and below 1.
        seed: Decides which.

    Returns:
        The training part and the validation part.

    Raises:
        ClipretError: One of the two parts would be empty.
    """
    count = len(annotations.pairs.paths)
    held_out = round(count * share)
    if count == 1:
        raise ClipretError(
            "there is one image and none to hold out for validation: pass another annotations file with --val"
        )
    if not 0 < held_out < count:
        raise ClipretError(
            f"a validation share of {share} of {count} images leaves one part empty: change --set val_split=…"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return annotations.subset(sorted(order[held_out:])), annotations.subset(sorted(order[:held_out]))


def _read_archives(config: FitConfig, location: Path | str, where: str | None) -> Annotations:
    """Paths and captions of all images. The bytes are read later, in any order."""
    source, path = open_source(location, where=where), Path(location)
    try:
        items: list[Item] = [without_bytes(item) for item in source]
    except ClipretError as error:  # unlike indexing, a training does not use the images before the damage
        raise ClipretError(re.sub(r"the images before( [\w ]+)? are done; ", "", str(error))) from error
    columns = dict.fromkeys(name for item in items for name in item.metadata)
    rows = [{name: _text(item.metadata.get(name)) for name in columns} for item in items]
    table = Table(path, tuple(columns), rows)
    if not items:
        raise ClipretError(f"{path} has no images: pass an archive with images")
    caption = pick_column(table, config.caption_column, "caption")
    captions: dict[str, int] = {}
    of_image: list[tuple[int, ...]] = []
    for item, row in zip(items, rows, strict=True):
        text = row[caption].strip()
        if not text:
            raise ClipretError(f"{item.path} in {path} has no {caption}: add a .txt or .json file with it")
        of_image.append((captions.setdefault(text, len(captions)),))
    paths = tuple(source.root / item.path for item in items)
    pairs = PairSet(paths, tuple(captions), tuple(of_image))
    groups: tuple[tuple[int, ...], ...] = ((),) * len(paths)
    if config.group_column is not None:
        groups = _groups(table, config.group_column, paths, pairs)
    return Annotations(pairs, groups, tuple(_reader(item) for item in items))


def _reader(item: Item) -> Callable[[], bytes]:
    return lambda: item.read().content


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _groups(table: Table, column: str, paths: Sequence[Path], pairs: PairSet) -> tuple[tuple[int, ...], ...]:
    """The groups of each image of `pairs`. `paths` are the paths of the table's rows. An empty value is no group."""
    if column not in table.columns:
        raise ClipretError(f"{table.path} has no column {column!r}: its columns are {', '.join(table.columns)}")
    numbers: dict[str, int] = {}
    of_path: dict[Path, dict[int, None]] = {}
    for row, path in zip(table.rows, paths, strict=True):
        if value := row[column].strip():
            of_path.setdefault(path, {})[numbers.setdefault(value, len(numbers))] = None
    return tuple(tuple(of_path.get(path, {})) for path in pairs.paths)
