"""Parquet files of images: a column of paths, or of the images' bytes; streamed in batches of rows."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from clipret.errors import ClipretError, require
from clipret.images.walk import ImageError, ImageFile
from clipret.locations import is_remote
from clipret.sources.item import Item, Value, broken_item, file_item, free_names, image_file, scalar
from clipret.sources.remote import RemoteFile, remote_item
from clipret.tables import Table, pick_column

__all__ = ["ImageTable", "read_row"]

_ROWS = 32  # a batch; each may hold an image of megabytes


class ImageTable:
    """A Parquet file with one image a row.

    The images are the column named, or else the only one of bytes (or of structs with a field `bytes`, as Hugging
    Face's datasets write them), or else one that has a usual name for paths; paths are relative to `root`. The columns
    of plain values are metadata. Raises ClipretError where pyarrow is missing, the file is no Parquet or is damaged
    (after the items before that place), or no column holds images.
    """

    def __init__(self, path: Path | RemoteFile, root: Path, image_column: str | None = None) -> None:
        self.path, self.root = path, root
        file = _open(path)
        self._column, self._usual = _image_column(path, file.schema_arrow, image_column)
        self._holds_bytes = _holds_bytes(file.schema_arrow.field(self._column).type)
        plain = [field.name for field in file.schema_arrow if field.name != self._column and _is_plain(field.type)]
        self._names = free_names(plain)
        self.columns = tuple(self._names.values())
        # Of paths some may be named twice, which only reading them would tell.
        self.count: int | None = file.metadata.num_rows if self._holds_bytes else None

    @property
    def prefix(self) -> str:
        """What the names of images begin with that the file itself holds; a row's number, of nine digits, follows."""
        path, root = self.path, self.root
        if isinstance(path, RemoteFile):
            prefix = path.uri
        else:
            prefix = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.absolute().as_posix()
        # With the column, where `read_row` would not find it otherwise.
        return prefix if self._usual else f"{prefix}/{self._column}"

    def groups(self) -> list[tuple[int, int, int]]:
        """The file's groups of rows, where it holds the images: number, first row, one past the last."""
        if not self._holds_bytes:
            return []
        facts, found, start = _open(self.path).metadata, [], 0
        for number in range(facts.num_row_groups):
            rows = facts.row_group(number).num_rows
            found.append((number, start, start + rows))
            start += rows
        return found

    def items(self, group: int | None = None, first: int = 0) -> Iterator[Item]:
        """All images, or those of one group of rows, whose first is row `first`. A path that comes again is left
        out."""
        arrow = require("pyarrow", "parquet")
        seen: set[str] = set()
        path, prefix, number = self.path, self.prefix, first
        groups: Sequence[int] | None = None if group is None else [group]
        try:
            mtime = _mtime(path)
            columns = [self._column, *self._names]
            batches = _open(path).iter_batches(_ROWS, row_groups=groups, columns=columns, use_threads=False)
            for batch in batches:
                for row in batch.to_pylist():
                    metadata = {new: scalar(row[old]) for old, new in self._names.items()}
                    item = self._item(f"{prefix}/{number:09d}", row[self._column], mtime, metadata)
                    number += 1
                    if self._holds_bytes or item.path not in seen:
                        yield item
                    if not self._holds_bytes:
                        seen.add(item.path)
        except (OSError, arrow.ArrowException) as error:
            raise ClipretError(
                f"{path} is damaged behind row {number} ({error}): the images before are done; make it anew"
            ) from None

    def _item(self, name: str, image: object, mtime: int, metadata: dict[str, Value]) -> Item:
        content = _content(image)
        if content is not None:
            return Item(name, partial(image_file, content, mtime), len(content), mtime, metadata)
        file = image.get("path") if isinstance(image, dict) else image
        if isinstance(file, str) and is_remote(file):
            return remote_item(file, metadata)
        if isinstance(file, str) and file:
            return file_item(self.root, file, metadata)
        return broken_item(name, "its row holds no image", metadata)


def _mtime(path: Path | RemoteFile) -> int:
    return path.modified()[1] if isinstance(path, RemoteFile) else path.stat().st_mtime_ns


def read_row(path: Path | RemoteFile, name: str, mtime_ns: int) -> ImageFile:
    """The image in one row again, by the name that its item had. Raises ImageError where there is no such row."""
    column, _, number = name.rpartition("/")
    try:
        file, left = _open(path), int(number)
        column, _ = _image_column(path, file.schema_arrow, column or None)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if left < rows:
                batches = file.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False)
                batch = next(islice(batches, left // _ROWS, None))
                return image_file(_content(batch.column(0)[left % _ROWS].as_py()) or b"", mtime_ns)
            left -= rows
    except (ClipretError, ValueError, OSError, StopIteration) as error:
        raise ImageError(f"cannot be read from its Parquet file: {error}") from None
    raise ImageError(f"{path} has no row {name}")


def _open(path: Path | RemoteFile) -> Any:
    arrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    try:
        if isinstance(path, RemoteFile):
            return parquet.ParquetFile(path.open(), pre_buffer=True)
        return parquet.ParquetFile(path, memory_map=True)
    except (OSError, arrow.ArrowException) as error:
        raise ClipretError(f"{path} cannot be read ({error}): give a Parquet file") from None


def _image_column(path: Path | RemoteFile, schema: Any, given: str | None) -> tuple[str, bool]:
    """The column of images, and whether it would be found without its name."""
    found = [field.name for field in schema if _holds_bytes(field.type)]
    if given is None and len(found) == 1:
        return str(found[0]), True
    name = pick_column(Table(Path(str(path)), tuple(schema.names), []), given, "image")
    kind = schema.field(name).type
    types = require("pyarrow", "parquet").types
    if not (_holds_bytes(kind) or types.is_string(kind) or types.is_large_string(kind)):
        raise ClipretError(
            f"column {name} of {path} holds {kind}, no images or paths: name one with --column image=NAME"
        )
    return name, given is None or found == [name]


def _holds_bytes(kind: Any) -> bool:
    types = require("pyarrow", "parquet").types
    if types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_plain(kind: Any) -> bool:
    types = require("pyarrow", "parquet").types
    return not (types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _content(image: object) -> bytes | None:
    value = image.get("bytes") if isinstance(image, dict) else image
    return value if isinstance(value, bytes) else None
