"""Images of a gallery for browsers: the original files, and thumbnails."""

import io
import threading
from collections import OrderedDict
from pathlib import Path

from PIL import Image

from clipret.gallery.gallery import ImageRecord
from clipret.images.decode import decode, jpeg, thumbnail
from clipret.images.formats import FORMATS, Format
from clipret.images.walk import ImageError
from clipret.sources.source import read_stored

__all__ = ["KIND", "SIDES", "Thumbnails", "original"]

KIND = "image/jpeg"  # of thumbnails
SIDES = (160, 320, 640, 1600)  # longest sides of thumbnails, pixels; few, so that the cache is effective


def original(root: Path, image: ImageRecord) -> tuple[bytes, str]:
    """The bytes of an image file and their media type.

    The gallery knows that the file was once an image, not that it still is one, so its content is checked.

    Args:
        root: Folder that relative paths start from.
        image: The record of the image.

    Raises:
        ImageError: The file cannot be read, or is not an image, whatever its name.
    """
    content = read_stored(root, image.path).content
    return content, _media_type(content)


class Thumbnails:
    """Thumbnails as JPEG, with a cache of the most recently used ones. Thread-safe.

    Args:
        capacity: Size of the cache, bytes.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._used = capacity, 0
        self._cache = OrderedDict[tuple[Path, ImageRecord, int], bytes]()
        self._lock = threading.Lock()

    def get(self, root: Path, image: ImageRecord, side: int) -> bytes:
        """An image, upright and without its metadata, scaled into a square of `side` pixels. Raises ImageError."""
        key = (root, image, side)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        content = jpeg(thumbnail(read_stored(root, image.path).content, side))
        with self._lock:
            if key not in self._cache:
                self._cache[key] = content
                self._used += len(content)
            while self._used > self._capacity:
                self._used -= len(self._cache.popitem(last=False)[1])
        return content


def _media_type(content: bytes) -> str:
    """The media type of an image, from its header, without decoding it."""
    try:
        image = Image.open(io.BytesIO(content))
    except Exception as error:  # also the warning about decompression bombs, where warnings are errors
        decode(content)  # its error names the reason
        raise ImageError("not an image") from error
    media_type = FORMATS.get(image.format or "", Format()).media_type
    if media_type is None:
        raise ImageError("not an image format that browsers show")
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ImageError("too many pixels")
    return media_type
