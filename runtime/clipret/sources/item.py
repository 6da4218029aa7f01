"""An image of a source: its path, how to read it, what tells whether it has changed, and its metadata."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clipret.images.walk import ImageError, ImageFile, read_image
from clipret.tables import OWN_COLUMNS, as_number

__all__ = [
    "Item",
    "PreloadedRead",
    "Value",
    "broken_item",
    "file_item",
    "free_names",
    "image_file",
    "is_plain",
    "scalar",
    "without_bytes",
]

Value = str | int | float | None


@dataclass(frozen=True)
class Item:
    """An image of a source.

    Items from Parquet files with image bytes, and from archives in object stores, keep these bytes in memory: process
    items as they come instead of collecting them in a list.

    Attributes:
        path: Relative to the source's root, with / as the separator, or absolute, or a URI.
        read: Reads the image, in any thread and any number of times. Raises ImageError.
        size: Bytes of the file, or None if they are not known before reading.
        mtime_ns: Modification time in nanoseconds, or None if it is not known before reading. A member of an archive
            has the time of the archive.
        metadata: Values by column.
    """

    path: str
    read: Callable[[], ImageFile]
    size: int | None
    mtime_ns: int | None
    metadata: Mapping[str, Value]


@dataclass(frozen=True)
class PreloadedRead:
    """The `read` of an item whose bytes came with the stream.

    Attributes:
        content: The bytes.
        mtime_ns: Modification time in nanoseconds.
        reread: Reads them again from the source.
    """

    content: bytes
    mtime_ns: int
    reread: Callable[[], ImageFile]

    def __call__(self) -> ImageFile:
        return image_file(self.content, self.mtime_ns)


def without_bytes(item: Item) -> Item:
    """Drop the bytes of an item, which are read again when needed, so that many items can be collected."""
    return dataclasses.replace(item, read=item.read.reread) if isinstance(item.read, PreloadedRead) else item


def file_item(root: Path, name: str, metadata: Mapping[str, Value] | None = None) -> Item:
    """Make the item of a file `name`, which is relative to `root` or absolute."""
    file = root / name
    try:
        status = os.stat(file)  # noqa: PTH116 (three times as fast as Path.stat, and called a million times)
        size, mtime = status.st_size, status.st_mtime_ns
    except (OSError, ValueError):  # reading it gives the reason
        return Item(name, partial(read_image, file), None, None, metadata or {})
    return Item(name, partial(read_image, file), size, mtime, metadata or {})


def broken_item(name: str, reason: str, metadata: Mapping[str, Value] | None = None) -> Item:
    """Make an item for an entry that is not an image: reading it raises ImageError with the reason."""
    return Item(name, partial(_refuse, reason), None, None, metadata or {})


def _refuse(reason: str) -> ImageFile:
    raise ImageError(reason)


def image_file(content: bytes, mtime_ns: int) -> ImageFile:
    """Make an image file from the bytes of an archive's member. Raises ImageError if there are none."""
    if not content:
        raise ImageError("the file is empty")
    return ImageFile(content, len(content), mtime_ns, hashlib.blake2b(content, digest_size=16).hexdigest())


def free_names(columns: Sequence[str]) -> dict[str, str]:
    """Name input columns in a gallery: a name that is taken, in any case, gets underscores at its end.

    Examples:
        >>> free_names(["ID", "hour"])
        {'ID': 'ID_', 'hour': 'hour'}
    """
    taken, names = set(OWN_COLUMNS), dict[str, str]()
    for column in columns:
        name = column
        while name.lower() in taken:
            name += "_"
        taken.add(name.lower())
        names[column] = name
    return names


def is_plain(value: object) -> bool:
    """Whether a JSON value can be metadata: a string, number, boolean or null."""
    return value is None or isinstance(value, str | int | float)


def scalar(value: object) -> Value:
    """Convert a value to one that both sqlite and JSON can represent.

    Dates and integers beyond 64 bits become strings; NaN and numbers beyond a float become None.

    Examples:
        >>> scalar(1 << 64), scalar(float("nan")), scalar(True)
        ('18446744073709551616', None, 1)
    """
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    text = value if value is None or isinstance(value, str) else str(value)
    number = as_number(text)
    return text if not isinstance(number, float) or math.isfinite(number) else None
