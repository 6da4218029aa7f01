"""The formats of images, in one table: what is read, how files are called, what browsers are told."""

from typing import NamedTuple

__all__ = ["EXTENSIONS", "FORMATS", "Format"]


class Format(NamedTuple):
    """`extensions`: of its files, that of a new one first; files of none are not looked for in folders. `media_type`:
    where browsers show it, else None."""

    extensions: tuple[str, ...] = ()
    media_type: str | None = None


# By Pillow's names, and not all of Pillow's: by its first bytes a "image" could start Ghostscript, and formats
# without a signature take any rubbish for an image.
FORMATS = {
    "JPEG": Format((".jpg", ".jpeg", ".jfif"), "image/jpeg"),
    "MPO": Format((".jpg",), "image/jpeg"),  # a JPEG of several images, which Pillow opens as a JPEG
    "PNG": Format((".png",), "image/png"),
    "WEBP": Format((".webp",), "image/webp"),
    "GIF": Format((".gif",), "image/gif"),
    "BMP": Format((".bmp",), "image/bmp"),
    "TIFF": Format((".tif", ".tiff"), "image/tiff"),
    "AVIF": Format((".avif",), "image/avif"),
    "JPEG2000": Format(),
    "PPM": Format(),
}
EXTENSIONS = frozenset(extension for one in FORMATS.values() for extension in one.extensions)
