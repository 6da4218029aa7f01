"""The supported image formats with their file extensions and media types."""

from typing import NamedTuple

__all__ = ["EXTENSIONS", "FORMATS", "Format"]


class Format(NamedTuple):
    """An image format.

    Attributes:
        extensions: Extensions of its files, the usual one first. Folders are not searched for formats without one.
        media_type: Its media type if browsers can display it, else None.
    """

    extensions: tuple[str, ...] = ()
    media_type: str | None = None


# By Pillow's names. Some of Pillow's formats are left out: a file could start Ghostscript by its first bytes, and
# formats without a signature accept arbitrary bytes.
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
EXTENSIONS = frozenset(extension for image_format in FORMATS.values() for extension in image_format.extensions)
