"""The files of images: which there are below a folder, and their bytes. Nothing here decodes, so Pillow stays out."""

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipret.errors import ClipretError
from clipret.images.formats import EXTENSIONS

__all__ = [
    "MOST_BYTES",
    "ImageError",
    "ImageFile",
    "find_images",
    "no_images",
    "read_bytes",
    "read_image",
    "walk_images",
]

MOST_BYTES = 1 << 30  # of one image's file; the largest that Pillow's pixel limit lets through is smaller


class ImageError(ClipretError):
    """One image that cannot be used. The message is the reason alone; whoever lists it knows the path."""


@dataclass(frozen=True)
class ImageFile:
    """An image's bytes with what tells whether the file has changed since. `digest`: BLAKE2b-128 of the bytes, hex."""

    content: bytes
    size: int
    mtime_ns: int
    digest: str


def find_images(folder: Path) -> list[Path]:
    """Every file below `folder` whose name ends like an image's, sorted by path, hidden ones left out.

    Raises ClipretError when the folder does not exist or holds none.
    """
    if not folder.is_dir():
        raise ClipretError(f"{folder} is not a folder: name a folder of images, a list or an archive")
    found = [folder / name for name in walk_images(folder)]
    if not found:
        raise no_images(folder)
    return found


def no_images(folder: Path) -> ClipretError:
    return ClipretError(f"{folder} holds no images ({' '.join(sorted(EXTENSIONS))}): is it the right folder?")


def walk_images(folder: Path) -> Iterator[str]:
    """The same images one by one, named relative to `folder` with /; only the folders on the way there are held.

    Links to folders are followed, but not in circles. A folder below that may not be read comes as if it were a
    image, so that whoever reads it learns the reason and nothing is left out in silence.
    """
    root = os.fspath(folder)
    # A stack of our own, because folders can lie deeper than Python's recursion goes.
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
                raise ClipretError(f"{folder} cannot be read: {error.strerror}") from None
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
    """Names that are not hidden, and whether each is a folder."""
    for entry in entries:
        if not entry.name.startswith("."):
            try:
                yield entry.name, entry.is_dir()
            except OSError:  # a link that leads to itself
                yield entry.name, False


def _extension(name: str) -> str:
    return name[name.rfind(".") :].lower()


def read_image(path: Path) -> ImageFile:
    """Read an image's file once. Raises ImageError for what is no regular, non-empty, readable file."""
    content, mtime_ns = read_bytes(path)
    return ImageFile(content, len(content), mtime_ns, hashlib.blake2b(content, digest_size=16).hexdigest())


def read_bytes(path: Path) -> tuple[bytes, int]:
    """The bytes of an image's file and the time of its last change in nanoseconds. Raises ImageError."""
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise ImageError("not a regular file")  # opening a pipe would wait for its other end
        if status.st_size > MOST_BYTES:
            raise ImageError(f"{status.st_size} bytes are too many for an image")
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a zero character in the name
        raise ImageError(f"cannot be read: {error}") from None
    except MemoryError:
        raise ImageError("too large for the memory") from None
    if not content:
        raise ImageError("the file is empty")
    return content, status.st_mtime_ns
