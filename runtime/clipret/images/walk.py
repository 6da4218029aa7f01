"""Find image files in folders and read their bytes, without decoding them and without importing Pillow."""

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipret.errors import ClipretError
from clipret.images.formats import EXTENSIONS

__all__ = [
    "MAX_BYTES",
    "ImageError",
    "ImageFile",
    "find_images",
    "no_images",
    "read_bytes",
    "read_image",
    "walk_images",
]

MAX_BYTES = 1 << 30  # of an image file; Pillow's pixel limit allows no larger images


class ImageError(ClipretError):
    """An image cannot be used. The message is only the reason; the caller knows the path."""


@dataclass(frozen=True)
class ImageFile:
    """The bytes of an image file, with what tells whether the file has changed later.

    Attributes:
        content: The bytes.
        size: Their number.
        mtime_ns: Modification time in nanoseconds.
        digest: BLAKE2b-128 of the bytes in hex.
    """

    content: bytes
    size: int
    mtime_ns: int
    digest: str


def find_images(folder: Path) -> list[Path]:
    """List the image files below a folder, by extension, sorted by path, without hidden ones.

    Raises:
        ClipretError: The folder does not exist or contains no images.
    """
    if not folder.is_dir():
        raise ClipretError(f"{folder} is not a folder: name a folder of images, an annotations file or an archive")
    files = [folder / name for name in walk_images(folder)]
    if not files:
        raise no_images(folder)
    return files


def no_images(folder: Path) -> ClipretError:
    """The error for a folder without images."""
    return ClipretError(f"{folder} holds no images ({' '.join(sorted(EXTENSIONS))}): check the path")


def walk_images(folder: Path) -> Iterator[str]:
    """Iterate over the image files below a folder, sorted, with bounded memory.

    Links to folders are followed, but not in cycles. A folder that cannot be read is yielded like an image: reading it
    gives the reason, and nothing is skipped silently.

    Yields:
        Paths relative to `folder`, with / as the separator.

    Raises:
        ClipretError: `folder` itself cannot be read.
    """
    root = os.fspath(folder)
    # An explicit stack: folders can be nested deeper than Python's recursion limit.
    stack: list[tuple[str, Iterator[tuple[str, bool]], frozenset[tuple[int, int]]]] = []

    def enter(prefix: str, above: frozenset[tuple[int, int]]) -> bool:
        try:
            path = f"{root}/{prefix}"
            status = os.stat(path)  # noqa: PTH116 (strings, since scandir gives them)
            here = (status.st_dev, status.st_ino)
            if here not in above:
                with os.scandir(path) as entries:
                    stack.append((prefix, iter(sorted(_entries(entries))), above | {here}))
        except OSError as error:
            if not prefix:
                raise ClipretError(f"{folder} cannot be read: {error.strerror}") from error
            return False
        return True

    enter("", frozenset())
    while stack:
        prefix, names, above = stack[-1]
        for name, is_folder in names:
            if is_folder:
                if enter(f"{prefix}{name}/", above):
                    break
                yield prefix + name
            elif _extension(name) in EXTENSIONS:
                yield prefix + name
        else:
            stack.pop()


def _entries(entries: Iterator[os.DirEntry[str]]) -> Iterator[tuple[str, bool]]:
    """Names of entries that are not hidden, and whether each is a folder."""
    for entry in entries:
        if not entry.name.startswith("."):
            try:
                yield entry.name, entry.is_dir()
            except OSError:  # a link to itself
                yield entry.name, False


def _extension(name: str) -> str:
    return name[name.rfind(".") :].lower()


def read_image(path: Path) -> ImageFile:
    """Read an image file. Raises ImageError unless it is a regular, readable file that is not empty."""
    content, mtime_ns = read_bytes(path)
    return ImageFile(content, len(content), mtime_ns, hashlib.blake2b(content, digest_size=16).hexdigest())


def read_bytes(path: Path) -> tuple[bytes, int]:
    """Read the bytes of an image file and its modification time in nanoseconds. Raises ImageError as `read_image`."""
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise ImageError("not a regular file")  # opening a pipe would wait for its other end
        if status.st_size > MAX_BYTES:
            raise ImageError(f"{status.st_size} bytes are too many for an image")
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a null character in the name
        raise ImageError(f"cannot be read: {error}") from error
    except MemoryError as error:
        raise ImageError("out of memory") from error
    if not content:
        raise ImageError("the file is empty")
    return content, status.st_mtime_ns
