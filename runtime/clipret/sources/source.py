"""Where images come from: folders, lists, archives and Parquet files, as one stream of items that holds none of them.

open_source("images/")             every image below the folder
open_source("list.csv")              a column of paths; the other columns are metadata
open_source("shards/{000..127}.tar") webdataset; a folder of nothing but .tar files likewise
open_source("images.zip"), open_source("data.parquet"), open_source("one.jpg")
open_source("s3://bucket/shards/{000..127}.tar") and the like in Google's store and HDFS; Parquet, images, folders too
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from clipret.errors import ClipretError
from clipret.images.formats import EXTENSIONS
from clipret.images.walk import ImageError, ImageFile, no_images, read_image, walk_images
from clipret.locations import is_remote, remote_in
from clipret.sources.archives import SUFFIXES, expand, expand_remote, members, modified, prefix_of, read_member
from clipret.sources.item import Item, Value, broken_item, file_item, free_names, scalar
from clipret.sources.parquet import ImageTable, read_row
from clipret.sources.remote import RemoteFile, open_remote, read_remote, remote_item, stats, walk_remote
from clipret.tables import pick_column, read_table

__all__ = ["Item", "Source", "Stream", "open_source", "read_stored"]


_LISTS = frozenset({".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json"})
_ARCHIVES = frozenset({*SUFFIXES, ".parquet"})


@dataclass(frozen=True)
class Stream:
    """A part of a source that any process can read by itself: an archive, or a group of rows of a Parquet file.

    The paths of its images, and of no others, are at least `first` and below `last`. `size` and `mtime_ns` are the
    file's.
    """

    first: str
    last: str
    size: int
    mtime_ns: int
    items: Callable[[], Iterator[Item]]


@dataclass(frozen=True)
class Source:
    """A stream of images that can be read again and again, each time from the start.

    `root`: what the items' paths are relative to. `columns`: their metadata, where it is known beforehand. `count`: how
    many there are, None where only reading all of them would tell. `streams`: what it consists of, in its order,
    where it is made of archives that hold their images.
    """

    root: Path
    columns: tuple[str, ...]
    count: int | None
    items: Callable[[], Iterator[Item]]
    streams: tuple[Stream, ...] = ()

    def __iter__(self) -> Iterator[Item]:
        return self.items()


def open_source(
    path: str | Path, *, image_column: str | None = None, image_root: Path | None = None, where: str | None = None
) -> Source:
    """The images of a folder, one file, a list, archives or a Parquet file.

    A folder stands for the images below it; one with none of them for the .tar, .zip and .parquet files in it. A list
    (.csv, .tsv, .txt, .jsonl, .parquet) has an image a row; paths in it are relative to `image_root`, by default the
    list's folder, and of rows that name one file the first counts. `where` is an SQL expression over its columns (not
    for Parquet). A Parquet file may hold the images themselves, see `ImageTable`. In .tar files members whose names
    are equal up to the first dot belong together (webdataset): .json, .txt and .cls beside an image become its
    metadata. A metadata column that a gallery has by itself (id, path, size, mtime_ns, hash) gets an underscore at its
    end.

    s3://, gs:// and hdfs:// addresses name .tar and .parquet files, images, and folders of them; so may the rows of a
    list. They are read by pyarrow. What a store holds has its address for a path, whatever the gallery's root.
    Raises ClipretError: nothing there, nothing in it, no such column, a package that reads it is missing.
    """
    if is_remote(path):
        return _remote(str(path), image_column, where)
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _LISTS and not path.is_dir():
        return _listed(path, image_column, image_root, where)
    if where is not None:
        raise ClipretError(f"--where chooses rows of a .csv, .tsv or .jsonl list; {path} is none")
    if path.is_dir():
        if next(walk_images(path), None) is None and (inside := _archives_in(path)):
            return _archived(inside, image_root or path, image_column)
        if inside := _archives_in(path):
            warnings.warn(
                f"{path} holds archives beside its images ({len(inside)}): they are left out; index them by name",
                stacklevel=2,
            )
        return _folder(path)
    files = expand(path)
    if suffix in _ARCHIVES:
        root = image_root or Path(os.path.commonpath([file.parent for file in files]))
        return _archived(files, root, image_column)
    if suffix not in EXTENSIONS or not path.is_file():
        raise ClipretError(f"{path} is no folder, list, archive or image: see clipret-search index --help")
    return Source(path.parent, (), 1, lambda: iter([file_item(path.parent, path.name)]))


def read_stored(root: Path, stored: str) -> ImageFile:
    """The bytes of an image again by the name that a gallery stores, a member of an archive included.

    Raises ImageError when it cannot be read.
    """
    if (uri := remote_in(stored) or remote_in(root / stored)) is not None:
        return _read_remote(uri)
    file = Path(root, stored)
    for parent in file.parents:
        if parent.suffix.lower() in _ARCHIVES and parent.is_file():
            name = file.relative_to(parent).as_posix()
            if parent.suffix.lower() == ".parquet":
                try:
                    return read_row(parent, name, parent.stat().st_mtime_ns)
                except OSError as error:
                    raise ImageError(f"its archive cannot be read: {error.strerror or error}") from None
            return read_member(parent, name)
    return read_image(file)


def _folder(path: Path) -> Source:
    count = sum(1 for _ in walk_images(path))
    if not count:
        raise no_images(path)
    return Source(path, (), count, lambda: (file_item(path, name) for name in walk_images(path)))


def _archives_in(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.suffix.lower() in _ARCHIVES and not file.name.startswith("."))
    return sorted(file for file in files if file.is_file())


def _archived(files: Sequence[Path | RemoteFile], root: Path, image_column: str | None) -> Source:
    """The images of several archives, one archive after the other."""
    reads: list[Callable[[], Iterator[Item]]] = []
    streams: list[Stream] = []
    columns: dict[str, None] = {}
    count: int | None = 0
    apart = True
    for file, (size, mtime) in zip(files, _states(files), strict=True):
        if file.suffix.lower() == ".parquet":
            table = ImageTable(file, root, image_column)
            columns |= dict.fromkeys(table.columns)
            count = None if count is None or table.count is None else count + table.count
            reads.append(table.items)
            groups = table.groups()
            apart = apart and bool(groups)  # of paths any may be anywhere
            for number, first, last in groups:
                bounds = f"{table.prefix}/{first:09d}", f"{table.prefix}/{last:09d}"
                streams.append(Stream(*bounds, size, mtime, partial(table.items, number, first)))
        else:
            count = None
            reads.append(partial(members, file, root))
            prefix = prefix_of(file, root)
            streams.append(Stream(f"{prefix}/", f"{prefix}0", size, mtime, reads[-1]))  # 0 is what follows /
    made = tuple(streams) if apart else ()
    return Source(root, tuple(columns), count, lambda: chain.from_iterable(read() for read in reads), made)


def _states(files: Sequence[Path | RemoteFile]) -> list[tuple[int, int]]:
    """Size and time of each file. Raises ClipretError for one that is not there."""
    remote = [file for file in files if isinstance(file, RemoteFile)]
    if remote:
        return stats(remote)
    try:
        return [modified(file) for file in files]
    except OSError as error:
        raise ClipretError(f"{error.filename} cannot be read: {error.strerror}; check the name") from None


def _remote(uri: str, image_column: str | None, where: str | None) -> Source:
    """What an address names. Nothing of it has a place on this machine, so the root says nothing."""
    root, suffix = Path("/"), os.path.splitext(uri)[1].lower()  # noqa: PTH122 (an address is no path)
    if where is not None:
        raise ClipretError(f"--where chooses rows of a .csv, .tsv or .jsonl list; {uri} is none")
    if suffix in _LISTS or suffix == ".zip":
        raise ClipretError(f"{uri} cannot be read in its store: copy it here (the rows of a list may be addresses)")
    if suffix in _ARCHIVES or suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst"):
        return _archived(expand_remote(uri), root, image_column)
    if suffix in EXTENSIONS:
        return Source(root, (), 1, lambda: iter([remote_item(uri)]))
    open_remote(uri)
    found = walk_remote(uri)
    images = [one for one in found if one[0].suffix.lower() in EXTENSIONS]
    if not images:
        if inside := [file for file, _, _ in found if file.suffix.lower() in (".tar", ".parquet")]:
            return _archived(inside, root, image_column)
        raise ClipretError(f"{uri} holds no images, .tar or .parquet files: is it the right folder?")
    return Source(
        root, (), len(images), lambda: (remote_item(file.uri, None, size, mtime) for file, size, mtime in images)
    )


def _read_remote(uri: str) -> ImageFile:
    for suffix in (".tar/", ".parquet/"):
        archive, found, name = uri.partition(suffix)
        if found:
            file = RemoteFile(archive + suffix[:-1])
            if suffix == ".tar/":
                return read_member(file, name)
            try:
                return read_row(file, name, file.modified()[1])
            except OSError as error:
                raise ImageError(f"its archive cannot be read: {error.strerror or error}") from None
    return read_remote(RemoteFile(uri))


def _listed(path: Path, image_column: str | None, image_root: Path | None, where: str | None) -> Source:
    table = read_table(path, where)
    image = pick_column(table, image_column, "image")
    root = image_root or path.parent
    top = root.absolute()
    names = free_names([column for column in table.columns if column != image])
    rows: dict[str, dict[str, str]] = {}  # of each image the first
    for number, row in enumerate(table.rows, 1):
        if is_remote(row[image]):
            rows.setdefault(row[image], row)
            continue
        file = Path(row[image])
        if file.is_absolute() and file.is_relative_to(top):
            file = file.relative_to(top)
        rows.setdefault(file.as_posix() if row[image] else f"{path.name} row {number}", row)

    def items() -> Iterator[Item]:
        for name, row in rows.items():
            metadata: dict[str, Value] = {new: scalar(row[old] or None) for old, new in names.items()}
            if is_remote(name):
                yield remote_item(name, metadata)
            elif row[image]:
                yield file_item(root, name, metadata)
            else:
                yield broken_item(name, "its row names no image", metadata)

    return Source(root, tuple(names.values()), len(rows), items)
