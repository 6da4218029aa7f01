"""What a training learns from: images with their captions and groups, from a list or from webdataset's archives."""

import dataclasses
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
    """`groups[i]`: numbers of the groups that `pairs.paths[i]` belongs to, () without any. `read[i]` gives the bytes of
    an image that is in an archive, or raises ImageError; None where the paths are files."""

    pairs: PairSet
    groups: tuple[tuple[int, ...], ...]
    read: tuple[Callable[[], bytes], ...] | None = None

    def subset(self, keep: Sequence[int]) -> "Annotations":
        """The images at these positions, with only their own captions."""
        read = tuple(self.read[position] for position in keep) if self.read is not None else None
        return Annotations(self.pairs.subset(keep), tuple(self.groups[position] for position in keep), read)

    def fingerprint(self) -> int:
        """A number that tells this list from any other: a resumed run must learn from the one that it began with."""
        pairs = self.pairs
        return seed_of(str(pairs.paths), str(pairs.captions), str(pairs.of_image), str(self.groups))


def read_annotation_files(config: FitConfig) -> tuple[Annotations, Annotations]:
    """The images to train on and those held out; the latter are taken out of the former. Raises ClipretError."""
    annotations = read_annotations(config, config.data, config.where)
    if config.val is None and config.val_where is None:
        return split_pairs(annotations, config.val_split, config.seed)
    alone = dataclasses.replace(config, group_column=None)  # what is measured are the pairs that are listed
    val = read_annotations(alone, config.val or config.data, config.val_where)
    held_out = set(_places(val.pairs.paths))
    keep = [position for position, place in enumerate(_places(annotations.pairs.paths)) if place not in held_out]
    if not keep:
        raise ClipretError(
            f"every image of {config.data} is held out for validation: change --where, --val or --val-where"
        )
    return annotations.subset(keep), val


def _places(paths: Iterable[Path]) -> Iterator[Path]:
    """Where the files really lie, by which two lists name the same one: no links, no .. and nothing relative."""
    resolved = cache(Path.resolve)  # of folders, of which there are few
    for path in paths:
        place = resolved(path.parent) / path.name
        yield place.resolve() if place.is_symlink() else place


def read_annotations(config: FitConfig, source: str, where: str | None) -> Annotations:
    """A .csv, .tsv or .jsonl list, or shards/{000..127}.tar (a folder of .tar files likewise), in a store too.

    Raises ClipretError as `read_pairs` and `open_source` do, and when an image has no caption.
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
    rows = [(root or path.parent) / row[image].strip() for row in table.rows]
    return Annotations(pairs, _groups(table, config.group_column, rows, pairs))


def split_pairs(annotations: Annotations, share: float, seed: int) -> tuple[Annotations, Annotations]:
    """Training and validation part, split by image: no image is in both.

    Raises ClipretError when one of the two would be empty.
    """
    count = len(annotations.pairs.paths)
    held_out = round(count * share)
    if count == 1:
        raise ClipretError("there is one image and none to hold out for validation: name a list of others with --val")
    if not 0 < held_out < count:
        raise ClipretError(f"a validation share of {share} of {count} images leaves one part empty: change --val-split")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return annotations.subset(sorted(order[held_out:])), annotations.subset(sorted(order[:held_out]))


def _read_archives(config: FitConfig, place: Path | str, where: str | None) -> Annotations:
    """Names, captions and places of all images; their bytes are read when they are wanted, in any order."""
    source, path = open_source(place, where=where), Path(place)
    try:
        items: list[Item] = [without_bytes(item) for item in source]
    except ClipretError as error:  # of a damaged archive indexing keeps what comes before, a training begins with all
        raise ClipretError(str(error).replace("the images before that place are done; ", "")) from None
    columns = dict.fromkeys(name for item in items for name in item.metadata)
    rows = [{name: _text(item.metadata.get(name)) for name in columns} for item in items]
    table = Table(path, tuple(columns), rows)
    if not items:
        raise ClipretError(f"{path} holds no images: nothing to do")
    caption = pick_column(table, config.caption_column, "caption")
    captions: dict[str, int] = {}
    of_image: list[tuple[int, ...]] = []
    for item, row in zip(items, rows, strict=True):
        text = row[caption].strip()
        if not text:
            raise ClipretError(f"{item.path} in {path} has no {caption}: add a .txt or .json file with the same name")
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
    """The groups of each image of `pairs`; `paths` are those of the table's rows. An empty value is no group."""
    if column not in table.columns:
        raise ClipretError(f"{table.path} has no column {column!r}: its columns are {', '.join(table.columns)}")
    numbers: dict[str, int] = {}
    of_path: dict[Path, dict[int, None]] = {}
    for row, path in zip(table.rows, paths, strict=True):
        if value := row[column].strip():
            of_path.setdefault(path, {})[numbers.setdefault(value, len(numbers))] = None
    return tuple(tuple(of_path.get(path, {})) for path in pairs.paths)
