"""Sources of images: folders, annotations files, archives and Parquet files, each as a stream of items.

open_source("images/")                  every image below the folder
open_source("images.csv")               an annotations file: a column of paths; the other columns are metadata
open_source("shards/{000..127}.tar")    webdataset; also as a folder with only .tar files
open_source("images.zip"), open_source("data.parquet"), open_source("image.jpg")
open_source("s3://bucket/shards/{000..127}.tar")    also gs:// and hdfs://, Parquet, images and folders
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
from clipret.sources.remote import RemoteFile, open_remote, read_remote, remote_item, stat_files, walk_remote
from clipret.tables import pick_column, read_table

__all__ = ["Item", "Source", "Stream", "open_source", "read_stored"]

_ANNOTATIONS = frozenset({".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json"})
_ARCHIVES = frozenset({*SUFFIXES, ".parquet"})


@dataclass(frozen=True)
class Stream:
    """A part of a source that any process can read independently: an archive, or a row group of a Parquet file.

    Attributes:
        first: Lower bound of the paths of its images, inclusive.
        last: Upper bound, exclusive. No image of another stream is between the bounds.
        size: Bytes of the file.
        mtime_ns: Its modification time in nanoseconds.
        items: Iterates over the images.
    """

    first: str
    last: str
    size: int
    mtime_ns: int
    items: Callable[[], Iterator[Item]]


@dataclass(frozen=True)
class Source:
    """A stream of images. Each iteration starts from the beginning.

    Attributes:
        root: The folder that the paths of the items are relative to.
        columns: Metadata columns, if they are known in advance.
        count: Number of images, or None if only reading all of them would tell.
        items: Iterates over the images.
        streams: The parts of the source in its order, if it consists of archives that contain their images.
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
    """Open the images of a folder, a file, an annotations file, archives or a Parquet file.

    A folder stands for the images below it or, if there are none, for the .tar, .zip and .parquet files in it. An
    annotations file (.csv, .tsv, .txt, .jsonl) and a Parquet file have one image per row; of several rows with the same
    file the first one counts. A Parquet file may contain the images themselves, see `ImageTable`. In a .tar, members
    whose names are equal up to the first dot form a sample (webdataset): .json, .txt and .cls files next to an image
    become its metadata. A metadata column with the name of a gallery's own column (id, path, size, mtime_ns, hash) gets
    an underscore at its end.

    s3://, gs:// and hdfs:// URIs may name .tar and .parquet files, images, and folders of them; so may the rows of an
    annotations file. pyarrow reads them. The path of an image in a store is its URI, whatever the root of the gallery.

    Args:
        path: The folder, file or URI. Ranges such as {000..127} stand for several archives.
        image_column: Column of image paths of a table; default: detected.
        image_root: The folder that image paths of a table are relative to; default: the folder of the table.
        where: SQL expression over the columns of an annotations file that selects rows.

    Raises:
        ClipretError: There is no such file, it contains no images, a column is missing, or a package that reads it is
            not installed.

    Examples:
        >>> source = open_source("images/")  # doctest: +SKIP
        >>> [item.path for item in source]  # doctest: +SKIP
        ['a.jpg', 'b.jpg']
    """
    if is_remote(path):
        return _remote(str(path), image_column, where)
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _ANNOTATIONS and not path.is_dir():
        return _annotated(path, image_column, image_root, where)
    if where is not None:
        raise ClipretError(f"--where selects rows of a .csv, .tsv or .jsonl file, which {path} is not: leave it out")
    if path.is_dir():
        if next(walk_images(path), None) is None and (archives := _archives_in(path)):
            return _archived(archives, image_root or path, image_column)
        if archives := _archives_in(path):
            warnings.warn(
                f"{path} holds archives in addition to images ({len(archives)}): they are skipped; index them by name",
                stacklevel=2,
            )
        return _folder(path)
    files = expand(path)
    if suffix in _ARCHIVES:
        root = image_root or Path(os.path.commonpath([file.parent for file in files]))
        return _archived(files, root, image_column)
    if suffix not in EXTENSIONS or not path.is_file():
        raise ClipretError(
            f"{path} is not a folder, annotations file, archive or image: see clipret-search index --help"
        )
    return Source(path.parent, (), 1, lambda: iter([file_item(path.parent, path.name)]))


def read_stored(root: Path, stored: str) -> ImageFile:
    """Read an image of a gallery again, also from an archive or a store.

    Args:
        root: Root of the gallery.
        stored: Path of the image in the gallery.

    Raises:
        ImageError: It cannot be read.
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
                    raise ImageError(f"its archive cannot be read: {error.strerror or error}") from error
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
    has_streams = True
    for file, (size, mtime) in zip(files, _sizes_and_times(files), strict=True):
        if file.suffix.lower() == ".parquet":
            table = ImageTable(file, root, image_column)
            columns |= dict.fromkeys(table.columns)
            count = None if count is None or table.count is None else count + table.count
            reads.append(table.items)
            groups = table.groups()
            has_streams = has_streams and bool(groups)  # image paths in a table may be anywhere
            for number, first, last in groups:
                bounds = f"{table.prefix}/{first:09d}", f"{table.prefix}/{last:09d}"
                streams.append(Stream(*bounds, size, mtime, partial(table.items, number, first)))
        else:
            count = None
            reads.append(partial(members, file, root))
            prefix = prefix_of(file, root)
            streams.append(Stream(f"{prefix}/", f"{prefix}0", size, mtime, reads[-1]))  # 0 is the character after /
    parts = tuple(streams) if has_streams else ()
    return Source(root, tuple(columns), count, lambda: chain.from_iterable(read() for read in reads), parts)


def _sizes_and_times(files: Sequence[Path | RemoteFile]) -> list[tuple[int, int]]:
    """Size and modification time of each file; raises ClipretError if one does not exist."""
    remote = [file for file in files if isinstance(file, RemoteFile)]
    if remote:
        return stat_files(remote)
    try:
        return [modified(file) for file in files]
    except OSError as error:
        raise ClipretError(f"{error.filename} cannot be read: {error.strerror}; check the name") from error


def _remote(uri: str, image_column: str | None, where: str | None) -> Source:
    """The images at a URI. They have no path on this machine, so the root has no meaning."""
    root, suffix = Path("/"), os.path.splitext(uri)[1].lower()  # noqa: PTH122 (a URI is not a path)
    if where is not None:
        raise ClipretError(f"--where selects rows of a .csv, .tsv or .jsonl file, which {uri} is not: leave it out")
    if suffix in _ANNOTATIONS or suffix == ".zip":
        raise ClipretError(
            f"{uri} cannot be read from a store: copy it to this machine (the rows of an annotations file may be URIs)"
        )
    if suffix in _ARCHIVES or suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst"):
        return _archived(expand_remote(uri), root, image_column)
    if suffix in EXTENSIONS:
        return Source(root, (), 1, lambda: iter([remote_item(uri)]))
    open_remote(uri)
    entries = walk_remote(uri)
    images = [entry for entry in entries if entry[0].suffix.lower() in EXTENSIONS]
    if not images:
        if archives := [file for file, _, _ in entries if file.suffix.lower() in (".tar", ".parquet")]:
            return _archived(archives, root, image_column)
        raise ClipretError(f"{uri} holds no images, .tar or .parquet files: check the path")
    return Source(
        root, (), len(images), lambda: (remote_item(file.uri, None, size, mtime) for file, size, mtime in images)
    )


def _read_remote(uri: str) -> ImageFile:
    for suffix in (".tar/", ".parquet/"):
        archive, separator, name = uri.partition(suffix)
        if separator:
            file = RemoteFile(archive + suffix[:-1])
            if suffix == ".tar/":
                return read_member(file, name)
            try:
                return read_row(file, name, file.modified()[1])
            except OSError as error:
                raise ImageError(f"its archive cannot be read: {error.strerror or error}") from error
    return read_remote(RemoteFile(uri))


def _annotated(path: Path, image_column: str | None, image_root: Path | None, where: str | None) -> Source:
    """The images that an annotations file names."""
    table = read_table(path, where)
    image = pick_column(table, image_column, "image")
    root = image_root or path.parent
    top = root.absolute()
    names = free_names([column for column in table.columns if column != image])
    rows: dict[str, dict[str, str]] = {}  # the first row of each image
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
