"""Decode images exactly, or raise an error."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, GifImagePlugin, Image, UnidentifiedImageError

from clipret.arrays import Pixels
from clipret.bundle import ImageSpec
from clipret.images.formats import FORMATS
from clipret.images.resize import Box, fit, fit_box, resized
from clipret.images.walk import ImageError, read_bytes

__all__ = ["decode", "jpeg", "load", "thumbnail"]

BACKGROUND = (255, 255, 255)  # behind transparent pixels: white, as product photos have it

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LEVELS = ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)  # 16 bits to 8, rounded


def load(source: Path | bytes | Image.Image | Pixels, spec: ImageSpec, fast: bool = False) -> Pixels:
    """Decode and resize an image to the input of an image tower.

    Evaluation during training, the parity check of the export and the search all use this function, so their pixels
    cannot differ. By default the pixels equal those of the reference preprocessing.

    Args:
        source: A file, its bytes, a Pillow image, or an array uint8 [H,W], [H,W,3] or [H,W,4] (RGBA).
        spec: The preprocessing.
        fast: Let the JPEG decoder skip detail that resizing would average out (as Pillow's `thumbnail` does), and
            resample only what the crop keeps. On 1,000 photographs with at most two samples per pixel of the square
            (three for `longest`) this changed a value by 0.8 levels of 255 on average (0.4) and by 20 at most (15);
            with more samples the difference is smaller, see benchmarks/README.md. For images that are not that much
            larger than the square, and for other formats, it is 1 level at most.

    Returns:
        uint8 [S,S,3], where S is `spec.size`.

    Raises:
        ImageError: The image cannot be decoded completely.

    Examples:
        >>> load(np.zeros((30, 40, 3), np.uint8), ImageSpec(size=8)).shape
        (8, 8, 3)
    """
    with _reasons():
        if isinstance(source, Path):
            source, _ = read_bytes(source)
        image = _open(source)
        box: Box | None = None
        if fast and isinstance(source, bytes):
            # Two samples per side and pixel of the square; three if the whole image must fit into it.
            oversampling = 3 if spec.resize == "longest" else 2
            width, height = resized(*image.size, spec)
            drafted = image.draft(None, (oversampling * width, oversampling * height))  # no effect on other formats
            box = None if drafted is None else drafted[1]
        turn = _orientation(image) if spec.exif else 1
        image = _to_rgb(image)
        if not fast:
            return fit(_turned(image, turn), spec)
        return fit_box(_turned(image, turn), spec, _turned_box(box or (0, 0, *image.size), image.size, turn))


def decode(source: bytes | Image.Image | Pixels, *, exif: bool = False) -> Image.Image:
    """Decode an image to RGB.

    Corrects two errors of a plain `convert("RGB")`: 16-bit grey is scaled instead of clipped to white, and transparent
    pixels become white instead of the hidden colour.

    Args:
        source: A file's bytes, a Pillow image, or an array as for `load`. Of an animation the first frame is decoded,
            or the current frame of a Pillow image.
        exif: Rotate the image as its EXIF tag says (Pillow itself always rotates a TIFF).

    Raises:
        ImageError: The image is truncated, corrupt, too large (a decompression bomb) or of an unknown format. A JPEG
            that was overwritten in the middle without changing its length decodes to a damaged image: no decoder
            detects that.
    """
    with _reasons():
        image = _open(source)
        turn = _orientation(image) if exif else 1
        return _turned(_to_rgb(image), turn)


def thumbnail(content: bytes, side: int) -> Image.Image:
    """Decode an image for display: RGB, upright, without metadata.

    Args:
        content: The bytes of the file.
        side: Maximum width and height in pixels; smaller images are not enlarged.

    Raises:
        ImageError: As for `decode`.
    """
    with _reasons():
        image = _open(content)
        image.draft(None, (2 * side, 2 * side))  # avoids decoding a JPEG of 12 megapixels at full size
        turn = _orientation(image)
        small = _turned(_to_rgb(image), turn)
        small.thumbnail((side, side))
        return small


def jpeg(image: Image.Image) -> bytes:
    """Encode a thumbnail as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, comment=b"")
    return buffer.getvalue()


@contextmanager
def _reasons() -> Iterator[None]:
    """Convert every exception of Pillow to an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image ({', '.join(_formats())})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(_BOMB.format(Image.MAX_IMAGE_PIXELS)) from error
    except MemoryError as error:
        raise ImageError("out of memory") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on corrupt bytes
        raise ImageError(f"broken: {error}" if str(error) else f"broken: {type(error).__name__}") from error


_BOMB = "more than {} pixels (decompression bomb?)"


@cache
def _formats() -> tuple[str, ...]:
    """The supported formats, whatever a file's extension."""
    Image.preinit()
    for plugin in ("Avif", "Jpeg2K", "Mpo", "Tiff", "WebP"):
        with suppress(ImportError):  # AVIF needs Pillow 11.3
            __import__(f"PIL.{plugin}ImagePlugin")
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(source: bytes | Image.Image | Pixels) -> Image.Image:
    """Open a Pillow image; the pixels of files are not decoded yet."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not source.size or (source.ndim != 2 and source.shape[2:] not in ((3,), (4,))):
            raise ImageError(
                f"an array of {source.dtype} {list(source.shape)} is no image: give uint8 [H,W], [H,W,3] or [H,W,4]"
            )
        return Image.fromarray(source)
    image = Image.open(io.BytesIO(source), formats=_formats())
    # Between one and two times its limit Pillow only warns. Making that warning an error would change the filters of
    # the whole process, and code that resets them would undo it.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ImageError(_BOMB.format(Image.MAX_IMAGE_PIXELS))
    return image


def _orientation(image: Image.Image) -> int:
    image.load()  # in a PNG the tag may follow the pixels; of a TIFF Pillow has removed it by then
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken tag does not make the image unusable
        return 1


def _turned(image: Image.Image, turn: int) -> Image.Image:
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def _turned_box(box: Box, size: tuple[int, int], turn: int) -> Box:
    """Where the box of an image is after the image is rotated or flipped."""
    (left, upper, right, lower), (width, height) = box, size
    if turn in (5, 6, 7, 8):
        left, upper, right, lower, width, height = upper, left, lower, right, height, width
    if turn in (2, 3, 6, 7):
        left, right = width - right, width - left
    if turn in (3, 4, 7, 8):
        upper, lower = height - lower, height - upper
    return left, upper, right, lower


def _to_rgb(image: Image.Image) -> Image.Image:
    frame = image.tile[0][1] if isinstance(image, GifImagePlugin.GifImageFile) and image.tile else None
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        rgb = image
    elif image.mode == "F":
        raise ImageError("a 32-bit float image has no defined white: convert it to 8 bits")
    elif image.mode.startswith("I"):
        rgb = _from_integers(image)
    elif image.has_transparency_data:
        rgb = _on_background(image)
    else:
        rgb = image.convert("RGB")
    if frame not in (None, (0, 0, *image.size)) and "transparency" not in image.info:
        # The first frame does not cover the canvas; Pillow fills the rest with the palette's first colour.
        part, rgb = rgb.crop(frame), Image.new("RGB", image.size, BACKGROUND)
        rgb.paste(part, frame[:2])
    return rgb


def _from_integers(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.max() > 65535 or values.min() < 0:
        raise ImageError("a 32-bit integer image has no defined white: convert it to 8 bits")
    tags = getattr(image, "tag_v2", {})  # only a TIFF has them
    levels = _LEVELS[values * 16 if tags.get(258) == (12,) else values]
    if tags.get(262) == 0:  # "white is zero", which Pillow applies to 8 bits only
        levels = 255 - levels
    if isinstance(transparent := image.info.get("transparency"), int):
        levels = np.where(values == transparent, np.uint8(255), levels)
    return Image.fromarray(levels).convert("RGB")


def _on_background(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    flat = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
    flat.alpha_composite(rgba)
    return flat.convert("RGB")
