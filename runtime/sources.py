"""Where pictures come from: folders, lists, archives and Parquet files, as one stream of items that holds none of them.

open_source("pictures/")             every picture below the folder
open_source("list.csv")              a column of paths; the other columns are metadata
open_source("shards/{000..127}.tar") webdataset; a folder of nothing but .tar files likewise
open_source("pictures.zip"), open_source("data.parquet"), open_source("one.jpg")
"""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from clipret.archives import SUFFIXES, expand, members, read_member
from clipret.errors import ClipretError
from clipret.images import EXTENSIONS, PictureError, PictureFile, no_pictures, read_picture, walk_pictures
from clipret.items import Item, Value, broken_item, file_item, free_names
from clipret.parquet import PictureTable, read_row
from clipret.tables import pick_column, read_table

__all__ = ["Item", "Source", "open_source", "read_stored"]

_LISTS = frozenset({".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json"})
_ARCHIVES = frozenset({*SUFFIXES, ".parquet"})


@dataclass(frozen=True)
class Source:
    """A stream of pictures that can be read again and again, each time from the start.

    `root`: what the items' paths are relative to. `columns`: their metadata, where it is known beforehand. `count`: how
    many there are, None where only reading all of them would tell.
    """

    root: Path
    columns: tuple[str, ...]
    count: int | None
    items: Callable[[], Iterator[Item]]

    def __iter__(self) -> Iterator[Item]:
        return self.items()


def open_source(
    path: str | Path, *, image_column: str | None = None, image_root: Path | None = None, where: str | None = None
) -> Source:
    """The pictures of a folder, one file, a list, archives or a Parquet file.

    A folder stands for the pictures below it; one with none of them for the .tar, .zip and .parquet files in it. A list
    (.csv, .tsv, .txt, .jsonl, .parquet) has a picture a row; paths in it are relative to `image_root`, by default the
    list's folder, and of rows that name one file the first counts. `where` is an SQL expression over its columns (not
    for Parquet). A Parquet file may hold the pictures themselves, see `PictureTable`. In .tar files members whose names
    are equal up to the first dot belong together (webdataset): .json, .txt and .cls beside a picture become its
    metadata. A metadata column that a gallery has by itself (id, path, size, mtime_ns, hash) gets an underscore at its
    end. Raises ClipretError: nothing there, nothing in it, no such column, a package that reads it is missing.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _LISTS and not path.is_dir():
        return _listed(path, image_column, image_root, where)
    if where is not None:
        raise ClipretError(f"--where chooses rows of a .csv, .tsv or .jsonl list; {path} is none")
    if path.is_dir():
        if next(walk_pictures(path), None) is None and (inside := _archives_in(path)):
            return _archived(inside, image_root or path, image_column)
        if inside := _archives_in(path):
            warnings.warn(
                f"{path} holds archives beside its pictures ({len(inside)}): they are left out; index them by name",
                stacklevel=2,
            )
        return _folder(path)
    files = expand(path)
    if suffix in _ARCHIVES:
        root = image_root or Path(os.path.commonpath([file.parent for file in files]))
        return _archived(files, root, image_column)
    if suffix not in EXTENSIONS or not path.is_file():
        raise ClipretError(f"{path} is no folder, list, archive or picture: see clipret-search index --help")
    return Source(path.parent, (), 1, lambda: iter([file_item(path.parent, path.name)]))


def read_stored(root: Path, stored: str) -> PictureFile:
    """The bytes of a picture again by the name that a gallery stores, a member of an archive included.

    Raises PictureError when it cannot be read.
    """
    file = Path(root, stored)
    for parent in file.parents:
        if parent.suffix.lower() in _ARCHIVES and parent.is_file():
            name = file.relative_to(parent).as_posix()
            if parent.suffix.lower() == ".parquet":
                try:
                    return read_row(parent, name, parent.stat().st_mtime_ns)
                except OSError as error:
                    raise PictureError(f"its archive cannot be read: {error.strerror or error}") from None
            return read_member(parent, name)
    return read_picture(file)


def _folder(path: Path) -> Source:
    count = sum(1 for _ in walk_pictures(path))
    if not count:
        raise no_pictures(path)
    return Source(path, (), count, lambda: (file_item(path, name) for name in walk_pictures(path)))


def _archives_in(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.suffix.lower() in _ARCHIVES and not file.name.startswith("."))
    return sorted(file for file in files if file.is_file())


def _archived(files: list[Path], root: Path, image_column: str | None) -> Source:
    """The pictures of several archives, one archive after the other."""
    streams: list[Callable[[], Iterator[Item]]] = []
    columns: dict[str, None] = {}
    count: int | None = 0
    for file in files:
        if file.suffix.lower() == ".parquet":
            table = PictureTable(file, root, image_column)
            columns |= dict.fromkeys(table.columns)
            count = None if count is None or table.count is None else count + table.count
            streams.append(table.items)
        else:
            count = None
            streams.append(partial(members, file, root))
    return Source(root, tuple(columns), count, lambda: chain.from_iterable(read() for read in streams))


def _listed(path: Path, image_column: str | None, image_root: Path | None, where: str | None) -> Source:
    table = read_table(path, where)
    image = pick_column(table, image_column, "image")
    root = image_root or path.parent
    top = root.absolute()
    names = free_names([column for column in table.columns if column != image])
    rows: dict[str, dict[str, str]] = {}  # of each picture the first
    for number, row in enumerate(table.rows, 1):
        file = Path(row[image])
        if file.is_absolute() and file.is_relative_to(top):
            file = file.relative_to(top)
        rows.setdefault(file.as_posix() if row[image] else f"{path.name} row {number}", row)

    def items() -> Iterator[Item]:
        for name, row in rows.items():
            metadata: dict[str, Value] = {new: row[old] or None for old, new in names.items()}
            if row[image]:
                yield file_item(root, name, metadata)
            else:
                yield broken_item(name, "its row names no picture", metadata)

    return Source(root, tuple(names.values()), len(rows), items)
