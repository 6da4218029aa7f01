"""What a training learns from: pictures with their titles and groups, from a list or from webdataset's archives."""

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

__all__ = ["Listing", "read_listing", "read_listings", "split_pairs"]


@dataclass(frozen=True)
class Listing:
    """`groups[i]`: numbers of the groups that `pairs.paths[i]` belongs to, () without any. `read[i]` gives the bytes of
    a picture that is in an archive, or raises PictureError; None where the paths are files."""

    pairs: PairSet
    groups: tuple[tuple[int, ...], ...]
    read: tuple[Callable[[], bytes], ...] | None = None

    def subset(self, keep: Sequence[int]) -> "Listing":
        """The pictures at these positions, with only their own titles."""
        read = tuple(self.read[position] for position in keep) if self.read is not None else None
        return Listing(self.pairs.subset(keep), tuple(self.groups[position] for position in keep), read)

    def fingerprint(self) -> int:
        """A number that tells this list from any other: a resumed run must learn from the one that it began with."""
        pairs = self.pairs
        return seed_of(str(pairs.paths), str(pairs.titles), str(pairs.of_picture), str(self.groups))


def read_listings(config: FitConfig) -> tuple[Listing, Listing]:
    """The pictures to train on and those held out; the latter are taken out of the former. Raises ClipretError."""
    listing = read_listing(config, config.data, config.where)
    if config.val is None and config.val_where is None:
        return split_pairs(listing, config.val_split, config.seed)
    alone = dataclasses.replace(config, group_column=None)  # what is measured are the pairs that are listed
    val = read_listing(alone, config.val or config.data, config.val_where)
    held_out = set(_places(val.pairs.paths))
    keep = [position for position, place in enumerate(_places(listing.pairs.paths)) if place not in held_out]
    if not keep:
        raise ClipretError(
            f"every picture of {config.data} is held out for validation: change --where, --val or --val-where"
        )
    return listing.subset(keep), val


def _places(paths: Iterable[Path]) -> Iterator[Path]:
    """Where the files really lie, by which two lists name the same one: no links, no .. and nothing relative."""
    resolved = cache(Path.resolve)  # of folders, of which there are few
    for path in paths:
        place = resolved(path.parent) / path.name
        yield place.resolve() if place.is_symlink() else place


def read_listing(config: FitConfig, source: str, where: str | None) -> Listing:
    """A .csv, .tsv or .jsonl list, or shards/{000..127}.tar (a folder of .tar files likewise), in a store too.

    Raises ClipretError as `read_pairs` and `open_source` do, and when a picture has no title.
    """
    if is_remote(source):
        return _read_archives(config, source, where)
    path = Path(source)
    if path.is_dir() or path.suffix.lower() in SUFFIXES:
        return _read_archives(config, path, where)
    root = Path(config.image_root) if config.image_root is not None else None
    pairs = read_pairs(
        path, image_root=root, image_column=config.image_column, title_column=config.title_column, where=where
    )
    if config.group_column is None:
        return Listing(pairs, ((),) * len(pairs.paths))
    table = read_table(path, where)
    image = pick_column(table, config.image_column, "image")
    rows = [(root or path.parent) / row[image].strip() for row in table.rows]
    return Listing(pairs, _groups(table, config.group_column, rows, pairs))


def split_pairs(listing: Listing, share: float, seed: int) -> tuple[Listing, Listing]:
    """Training and validation part, split by picture: no picture is in both.

    Raises ClipretError when one of the two would be empty.
    """
    count = len(listing.pairs.paths)
    held_out = round(count * share)
    if count == 1:
        raise ClipretError("there is one picture and none to hold out for validation: name a list of others with --val")
    if not 0 < held_out < count:
        raise ClipretError(
            f"a validation share of {share} of {count} pictures leaves one part empty: change --val-split"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return listing.subset(sorted(order[held_out:])), listing.subset(sorted(order[:held_out]))


def _read_archives(config: FitConfig, place: Path | str, where: str | None) -> Listing:
    """Names, titles and places of all pictures; their bytes are read when they are wanted, in any order."""
    source, path = open_source(place, where=where), Path(place)
    try:
        items: list[Item] = [without_bytes(item) for item in source]
    except ClipretError as error:  # of a damaged archive indexing keeps what comes before, a training begins with all
        raise ClipretError(str(error).replace("the pictures before that place are done; ", "")) from None
    columns = dict.fromkeys(name for item in items for name in item.metadata)
    rows = [{name: _text(item.metadata.get(name)) for name in columns} for item in items]
    table = Table(path, tuple(columns), rows)
    if not items:
        raise ClipretError(f"{path} holds no pictures: nothing to do")
    title = pick_column(table, config.title_column, "title")
    titles: dict[str, int] = {}
    of_picture: list[tuple[int, ...]] = []
    for item, row in zip(items, rows, strict=True):
        text = row[title].strip()
        if not text:
            raise ClipretError(f"{item.path} in {path} has no {title}: put a .txt or .json file with it beside it")
        of_picture.append((titles.setdefault(text, len(titles)),))
    paths = tuple(source.root / item.path for item in items)
    pairs = PairSet(paths, tuple(titles), tuple(of_picture))
    groups: tuple[tuple[int, ...], ...] = ((),) * len(paths)
    if config.group_column is not None:
        groups = _groups(table, config.group_column, paths, pairs)
    return Listing(pairs, groups, tuple(_reader(item) for item in items))


def _reader(item: Item) -> Callable[[], bytes]:
    return lambda: item.read().content


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _groups(table: Table, column: str, paths: Sequence[Path], pairs: PairSet) -> tuple[tuple[int, ...], ...]:
    """The groups of each picture of `pairs`; `paths` are those of the table's rows. An empty value is no group."""
    if column not in table.columns:
        raise ClipretError(f"{table.path} has no column {column!r}: its columns are {', '.join(table.columns)}")
    numbers: dict[str, int] = {}
    of_path: dict[Path, dict[int, None]] = {}
    for row, path in zip(table.rows, paths, strict=True):
        if value := row[column].strip():
            of_path.setdefault(path, {})[numbers.setdefault(value, len(numbers))] = None
    return tuple(tuple(of_path.get(path, {})) for path in pairs.paths)
