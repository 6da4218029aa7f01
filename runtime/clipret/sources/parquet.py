"""Parquet files with a column of image paths or image bytes, streamed in batches of rows."""

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

_BATCH_ROWS = 32  # each row may hold an image of megabytes


class ImageTable:
    """A Parquet file with one image per row. Its columns of plain values are metadata.

    Args:
        path: The file.
        root: The folder that image paths are relative to.
        image_column: Column of images. Default: the only column of bytes (or of structs with a field `bytes`, as
            Hugging Face's datasets have), else a column with a usual name for paths.

    Attributes:
        columns: Names of the metadata columns in a gallery.
        count: Number of images, or None if only reading all of them would tell.

    Raises:
        ClipretError: pyarrow is not installed, the file is not Parquet, or no column holds images.
    """

    def __init__(self, path: Path | RemoteFile, root: Path, image_column: str | None = None) -> None:
        self.path, self.root = path, root
        file = _open(path)
        self._column, self._usual = _image_column(path, file.schema_arrow, image_column)
        self._holds_bytes = _holds_bytes(file.schema_arrow.field(self._column).type)
        plain = [field.name for field in file.schema_arrow if field.name != self._column and _is_plain(field.type)]
        self._names = free_names(plain)
        self.columns = tuple(self._names.values())
        # Paths may occur twice, which only reading them would tell.
        self.count: int | None = file.metadata.num_rows if self._holds_bytes else None

    @property
    def prefix(self) -> str:
        """Prefix of the paths of images that the file contains; the row number in nine digits follows."""
        path, root = self.path, self.root
        if isinstance(path, RemoteFile):
            prefix = path.uri
        else:
            prefix = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.absolute().as_posix()
        # Includes the column if `read_row` would not find it otherwise.
        return prefix if self._usual else f"{prefix}/{self._column}"

    def groups(self) -> list[tuple[int, int, int]]:
        """The row groups of a file with image bytes: number, first row, one past the last row."""
        if not self._holds_bytes:
            return []
        metadata, groups, start = _open(self.path).metadata, [], 0
        for number in range(metadata.num_row_groups):
            rows = metadata.row_group(number).num_rows
            groups.append((number, start, start + rows))
            start += rows
        return groups

    def items(self, group: int | None = None, first: int = 0) -> Iterator[Item]:
        """Iterate over the images; a path that occurs again is skipped.

        Args:
            group: Number of a row group; None: all.
            first: Number of its first row.

        Raises:
            ClipretError: The file is damaged. The items before the damage have been yielded.
        """
        arrow = require("pyarrow", "parquet")
        seen: set[str] = set()
        path, prefix, number = self.path, self.prefix, first
        groups: Sequence[int] | None = None if group is None else [group]
        try:
            mtime = _mtime(path)
            columns = [self._column, *self._names]
            batches = _open(path).iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False)
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
                f"{path} is damaged after row {number} ({error}): the images before the damage are done; create it "
                "again"
            ) from error

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
    """Read the image of a row again.

    Args:
        path: The Parquet file.
        name: The part of its item's path after the file.
        mtime_ns: Modification time of the file in nanoseconds.

    Raises:
        ImageError: There is no such row, or it cannot be read.
    """
    column, _, number = name.rpartition("/")
    try:
        file, offset = _open(path), int(number)
        column, _ = _image_column(path, file.schema_arrow, column or None)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if offset < rows:
                batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False)
                batch = next(islice(batches, offset // _BATCH_ROWS, None))
                return image_file(_content(batch.column(0)[offset % _BATCH_ROWS].as_py()) or b"", mtime_ns)
            offset -= rows
    except (ClipretError, ValueError, OSError, StopIteration) as error:
        raise ImageError(f"cannot be read from its Parquet file: {error}") from error
    raise ImageError(f"{path} has no row {name}")


def _open(path: Path | RemoteFile) -> Any:
    arrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    try:
        if isinstance(path, RemoteFile):
            return parquet.ParquetFile(path.open(), pre_buffer=True)
        return parquet.ParquetFile(path, memory_map=True)
    except (OSError, arrow.ArrowException) as error:
        raise ClipretError(f"{path} cannot be read ({error}): give a Parquet file") from error


def _image_column(path: Path | RemoteFile, schema: Any, column: str | None) -> tuple[str, bool]:
    """The column of images, and whether it would be found without its name."""
    byte_columns = [field.name for field in schema if _holds_bytes(field.type)]
    if column is None and len(byte_columns) == 1:
        return str(byte_columns[0]), True
    name = pick_column(Table(Path(str(path)), tuple(schema.names), []), column, "image")
    kind = schema.field(name).type
    types = require("pyarrow", "parquet").types
    if not (_holds_bytes(kind) or types.is_string(kind) or types.is_large_string(kind)):
        raise ClipretError(
            f"column {name} of {path} holds {kind}, no images or paths: name another with --column image=NAME"
        )
    return name, column is None or byte_columns == [name]


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
