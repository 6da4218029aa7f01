"""One image of a source: its name, how to read it, what tells whether it has changed, what else is known of it."""

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
    "Held",
    "Item",
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

    `path`: relative to the source's root with /, or absolute. `read` gives its bytes, in any thread and as often as
    wanted, or raises ImageError. `size` in bytes and `mtime_ns` are known without reading, None where they cannot be
    had; a member of an archive has the archive's time. An item from a Parquet file of images holds their bytes
    until it is dropped, and so does one from an archive in an object store: take items as they come instead of
    listing them.
    """

    path: str
    read: Callable[[], ImageFile]
    size: int | None
    mtime_ns: int | None
    metadata: Mapping[str, Value]


@dataclass(frozen=True)
class Held:
    """Reads an image whose bytes came with the stream that named it; `later` reads them again."""

    content: bytes
    mtime_ns: int
    later: Callable[[], ImageFile]

    def __call__(self) -> ImageFile:
        return image_file(self.content, self.mtime_ns)


def without_bytes(item: Item) -> Item:
    """The same item for a list of many: its bytes are read when they are wanted."""
    return dataclasses.replace(item, read=item.read.later) if isinstance(item.read, Held) else item


def file_item(root: Path, name: str, metadata: Mapping[str, Value] | None = None) -> Item:
    """The file `name` below `root`, or anywhere if it is absolute."""
    file = root / name
    try:
        status = os.stat(file)  # noqa: PTH116 (a third of the time of Path.stat, a million times)
        size, mtime = status.st_size, status.st_mtime_ns
    except (OSError, ValueError):  # reading it will give the reason
        return Item(name, partial(read_image, file), None, None, metadata or {})
    return Item(name, partial(read_image, file), size, mtime, metadata or {})


def broken_item(name: str, reason: str, metadata: Mapping[str, Value] | None = None) -> Item:
    """What should have been an image: reading it raises ImageError with the reason."""
    return Item(name, partial(_refuse, reason), None, None, metadata or {})


def _refuse(reason: str) -> ImageFile:
    raise ImageError(reason)


def image_file(content: bytes, mtime_ns: int) -> ImageFile:
    """Bytes out of an archive as an image's file. Raises ImageError for none."""
    if not content:
        raise ImageError("the file is empty")
    return ImageFile(content, len(content), mtime_ns, hashlib.blake2b(content, digest_size=16).hexdigest())


def free_names(columns: Sequence[str]) -> dict[str, str]:
    """What each column of an input is called in a gallery: its own name, unless that is taken, whatever its case."""
    taken, names = set(OWN_COLUMNS), dict[str, str]()
    for column in columns:
        name = column
        while name.lower() in taken:
            name += "_"
        taken.add(name.lower())
        names[column] = name
    return names


def is_plain(value: object) -> bool:
    """Whether a value of a JSON object can be metadata: no list, no object."""
    return value is None or isinstance(value, str | int | float)


def scalar(value: object) -> Value:
    """A value as sqlite can keep it and JSON can say it: dates and integers beyond 64 bits are text; NaN and what
    is beyond a float are null."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    text = value if value is None or isinstance(value, str) else str(value)
    number = as_number(text)
    return text if not isinstance(number, float) or math.isfinite(number) else None
