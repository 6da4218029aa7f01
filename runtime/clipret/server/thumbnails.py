"""Images of a gallery for browsers: their own files, and thumbnails."""

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
SIDES = (160, 320, 640, 1600)  # longest sides of thumbnails, pixels: few, so that one is found again


def original(root: Path, image: ImageRecord) -> tuple[bytes, str]:
    """The bytes of an image's file and their media type.

    Raises ImageError when it cannot be read or is no image any more, whatever its name says: that a gallery once
    held an image there is no reason to hand out what lies there now.
    """
    content = read_stored(root, image.path).content
    return content, _media_type(content)


class Thumbnails:
    """JPEGs of images, the last used ones in at most `room` bytes of memory. From any thread."""

    def __init__(self, room: int) -> None:
        self._room, self._used = room, 0
        self._kept = OrderedDict[tuple[Path, ImageRecord, int], bytes]()
        self._lock = threading.Lock()

    def get(self, root: Path, image: ImageRecord, side: int) -> bytes:
        """An image, upright, within a square of `side`, without its metadata. Raises ImageError."""
        key = (root, image, side)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = jpeg(thumbnail(read_stored(root, image.path).content, side))
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._used += len(made)
            while self._used > self._room:
                self._used -= len(self._kept.popitem(last=False)[1])
        return made


def _media_type(content: bytes) -> str:
    """That of an image, with its header read and nothing decoded."""
    try:
        image = Image.open(io.BytesIO(content))
    except Exception as error:  # a bomb's warning too, where warnings are errors
        decode(content)  # names what is wrong
        raise ImageError("not an image") from error
    media_type = FORMATS.get(image.format or "", Format()).media_type
    if media_type is None:
        raise ImageError("not an image that a browser shows")
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ImageError("too many pixels")
    return media_type
