"""Pictures: finding them, decoding them right or not at all, and bringing them to a tower's square."""

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, GifImagePlugin, Image, UnidentifiedImageError

from clipret.bundle import ImageSpec
from clipret.errors import ClipretError

__all__ = [
    "PictureError",
    "PictureFile",
    "decode",
    "find_pictures",
    "fit",
    "jpeg",
    "load",
    "read_picture",
    "thumbnail",
    "walk_pictures",
]

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]

EXTENSIONS = frozenset({".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
BACKGROUND = (255, 255, 255)  # behind transparent pixels: shops cut their goods out on white
MOST_BYTES = 1 << 30  # of one picture's file; the largest that Pillow's pixel limit lets through is smaller

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LEVELS = ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)  # of 16 bits in 8, rounded
_LONGEST = 64  # sides to one another, beyond which the whole of a resized picture is too much memory


class PictureError(ClipretError):
    """One picture that cannot be used. The message is the reason alone; whoever lists it knows the path."""


@dataclass(frozen=True)
class PictureFile:
    """A picture's bytes with what tells whether the file has changed since. `digest`: BLAKE2b-128 of the bytes, hex."""

    content: bytes
    size: int
    mtime_ns: int
    digest: str


def find_pictures(folder: Path) -> list[Path]:
    """Every file below `folder` whose name ends like a picture's, sorted by path, hidden ones left out.

    Raises ClipretError when the folder does not exist or holds none.
    """
    if not folder.is_dir():
        raise ClipretError(f"{folder} is not a folder: name a folder of pictures, a list or an archive")
    found = [folder / name for name in walk_pictures(folder)]
    if not found:
        raise no_pictures(folder)
    return found


def no_pictures(folder: Path) -> ClipretError:
    return ClipretError(f"{folder} holds no pictures ({' '.join(sorted(EXTENSIONS))}): is it the right folder?")


def walk_pictures(folder: Path) -> Iterator[str]:
    """The same pictures one by one, named relative to `folder` with /; only the folders on the way there are held.

    Links to folders are followed, but not in circles. A folder below that may not be read comes as if it were a
    picture, so that whoever reads it learns the reason and nothing is left out in silence.
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


def read_picture(path: Path) -> PictureFile:
    """Read a picture's file once. Raises PictureError for what is no regular, non-empty, readable file."""
    content, mtime_ns = _read(path)
    return PictureFile(content, len(content), mtime_ns, hashlib.blake2b(content, digest_size=16).hexdigest())


def _read(path: Path) -> tuple[bytes, int]:
    """The bytes and the time of their last change."""
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise PictureError("not a regular file")  # opening a pipe would wait for its other end
        if status.st_size > MOST_BYTES:
            raise PictureError(f"{status.st_size} bytes are too many for a picture")
        content = path.read_bytes()
    except OSError as error:
        raise PictureError(f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a zero character in the name
        raise PictureError(f"cannot be read: {error}") from None
    except MemoryError:
        raise PictureError("too large for the memory") from None
    if not content:
        raise PictureError("the file is empty")
    return content, status.st_mtime_ns


def load(source: Path | bytes | Image.Image | Pixels, spec: ImageSpec, fast: bool = False) -> Pixels:
    """A picture as the tower's input: uint8 [S,S,3], S = spec.size. Arrays are uint8 [H,W], [H,W,3] or [H,W,4] (RGBA).

    The same function feeds training's evaluation, the export's check and the search, so that none of them can differ.
    By default its pixels equal those of the reference preprocessing. `fast` lets the JPEG decoder leave out what the
    resizing would average away anyway (as Pillow's `thumbnail` does) and resamples only what the crop keeps. From 1,000
    photographs with no more than two samples for each pixel of the square (three for `longest`) that changed a value by
    0.8 levels in the mean (0.4) and 20 at most (15); with more samples it is less, see benchmarks/README.md. Where the
    picture is not that much larger than the square, and for other formats, it is 1 level at most.
    Raises PictureError when the picture cannot be decoded whole.
    """
    with _reasons():
        if isinstance(source, Path):
            source, _ = _read(source)
        image = _open(source)
        box: Box | None = None
        if fast and isinstance(source, bytes):
            # Two samples of each side for one of the square; three where the whole picture must fit into it.
            finer = 3 if spec.resize == "longest" else 2
            width, height = _resized(*image.size, spec)
            drafted = image.draft(None, (finer * width, finer * height))  # other formats do nothing here
            box = None if drafted is None else drafted[1]
        turn = _orientation(image) if spec.exif else 1
        image = _to_rgb(image)
        if not fast:
            return fit(_turned(image, turn), spec)
        return _fit_box(_turned(image, turn), spec, _turned_box(box or (0, 0, *image.size), image.size, turn))


def decode(source: bytes | Image.Image | Pixels, *, exif: bool = False) -> Image.Image:
    """An RGB picture from a file's bytes, from any Pillow picture or from an array as in `load`; of an animation the
    first frame, or that to which a Pillow picture has been sought.

    Mends what a plain `convert("RGB")` gets wrong: 16-bit grey is scaled instead of clipped to white, transparent
    pixels lie on white instead of showing whatever colour they hide. `exif` turns the picture as its tag says (Pillow
    itself always turns a TIFF).
    Raises PictureError for truncated, corrupt, over-large (decompression bombs) or unknown pictures. A JPEG that was
    overwritten in the middle, its length kept, decodes to a damaged picture: no decoder tells.
    """
    with _reasons():
        image = _open(source)
        turn = _orientation(image) if exif else 1
        return _turned(_to_rgb(image), turn)


def thumbnail(content: bytes, side: int) -> Image.Image:
    """The picture of a file's bytes for people to look at: RGB, upright, at most `side` pixels high and wide, never
    enlarged, and without its metadata. Raises PictureError as `decode` does."""
    with _reasons():
        image = _open(content)
        image.draft(None, (2 * side, 2 * side))  # a JPEG of 12 megapixels need not be decoded whole
        turn = _orientation(image)
        small = _turned(_to_rgb(image), turn)
        small.thumbnail((side, side))
        return small


def jpeg(image: Image.Image) -> bytes:
    """A thumbnail as the file that pages show."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, comment=b"")
    return buffer.getvalue()


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever Pillow raises, as a PictureError."""
    try:
        yield
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"not a picture ({', '.join(_formats())})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(_BOMB.format(Image.MAX_IMAGE_PIXELS)) from None
    except MemoryError:
        raise PictureError("too large for the memory") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on corrupt bytes
        raise PictureError(f"broken: {error}" if str(error) else f"broken: {type(error).__name__}") from None


_BOMB = "more than {} pixels (decompression bomb?)"


@cache
def _formats() -> tuple[str, ...]:
    """The formats that are read, whatever a file is called. Not all of Pillow's: by its first bytes a "picture" could
    start Ghostscript, and formats without a signature take any rubbish for a picture."""
    Image.preinit()
    for plugin in ("Avif", "Jpeg2K", "Mpo", "Tiff", "WebP"):
        with suppress(ImportError):  # AVIF came with Pillow 11.3
            __import__(f"PIL.{plugin}ImagePlugin")
    wanted = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
    return tuple(name for name in wanted if name in Image.OPEN)


def _open(source: bytes | Image.Image | Pixels) -> Image.Image:
    """A Pillow picture, its pixels not yet decoded where that can be helped."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not source.size or (source.ndim != 2 and source.shape[2:] not in ((3,), (4,))):
            raise PictureError(
                f"an array of {source.dtype} {list(source.shape)} is no picture: give uint8 [H,W], [H,W,3] or [H,W,4]"
            )
        return Image.fromarray(source)
    image = Image.open(io.BytesIO(source), formats=_formats())
    # Pillow only warns between one and two times its limit. To make that warning an error would change the filters of
    # the whole process, and whoever sets them anew would undo it.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise PictureError(_BOMB.format(Image.MAX_IMAGE_PIXELS))
    return image


def _orientation(image: Image.Image) -> int:
    image.load()  # in a PNG the tag may follow the pixels; from a TIFF Pillow has taken it by then
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken tag is not a broken picture
        return 1


def _turned(image: Image.Image, turn: int) -> Image.Image:
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def _turned_box(box: Box, size: tuple[int, int], turn: int) -> Box:
    """Where `box` of a picture of `size` lies once that is turned."""
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
        raise PictureError("a 32-bit float picture has no defined white: convert it to 8 bits")
    elif image.mode.startswith("I"):
        rgb = _from_integers(image)
    elif image.has_transparency_data:
        rgb = _on_background(image)
    else:
        rgb = image.convert("RGB")
    if frame not in (None, (0, 0, *image.size)) and "transparency" not in image.info:
        # The first frame leaves a part of the canvas free, which Pillow fills with the palette's first colour.
        part, rgb = rgb.crop(frame), Image.new("RGB", image.size, BACKGROUND)
        rgb.paste(part, frame[:2])
    return rgb


def _from_integers(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.max() > 65535 or values.min() < 0:
        raise PictureError("a 32-bit integer picture has no defined white: convert it to 8 bits")
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    levels = _LEVELS[values * 16 if tags.get(258) == (12,) else values]
    if tags.get(262) == 0:  # "white is zero", which Pillow heeds at 8 bits alone
        levels = 255 - levels
    if isinstance(hidden := image.info.get("transparency"), int):
        levels = np.where(values == hidden, np.uint8(255), levels)
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


def fit(image: Image.Image, spec: ImageSpec) -> Pixels:
    """An RGB picture brought to uint8 [S,S,3] as `spec` says.

    Sizes and offsets are rounded as in torchvision's Resize and CenterCrop and in open_clip's ResizeKeepRatio and
    CenterCropOrPad, so that pixels equal those of open_clip's own evaluation transform. Where one side is more than
    64 times the other, only what the crop keeps is resampled; that differs by one level at most.
    """
    size = spec.size
    width, height = _resized(*image.size, spec)
    if max(width, height) > _LONGEST * size:
        return _fit_box(image, spec, (0, 0, *image.size))
    image = image.resize((width, height), _FILTERS[spec.interpolation])
    if spec.resize == "shortest":
        left, top = _offset(width, size), _offset(height, size)
        image = image.crop((left, top, left + size, top + size))
    return _squared(image, spec)


def _fit_box(image: Image.Image, spec: ImageSpec, box: Box) -> Pixels:
    """The same from the part `box` of the picture, without what the crop drops: within a level of `fit`, and faster."""
    left, upper, right, lower = box
    width, height = _resized(right - left, lower - upper, spec)
    kept = min(width, spec.size), min(height, spec.size)
    x, y = _offset(width, kept[0]), _offset(height, kept[1])
    across, down = (right - left) / width, (lower - upper) / height
    left, upper = left + x * across, upper + y * down
    right, lower = min(left + kept[0] * across, image.width), min(upper + kept[1] * down, image.height)
    return _squared(image.resize(kept, _FILTERS[spec.interpolation], box=(left, upper, right, lower)), spec)


def _resized(width: float, height: float, spec: ImageSpec) -> tuple[int, int]:
    """What a picture of this size is resized to, before it is cropped or padded."""
    size = spec.size
    if spec.resize == "squash":
        return size, size
    if spec.resize == "longest":
        ratio = max(width, height) / size
        # A picture of 1 x 1000 pixels would shrink to a width of none.
        return max(round(width / ratio), 1), max(round(height / ratio), 1)
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)


def _offset(side: int, size: int) -> int:
    return round((side - size) / 2.0)


def _squared(image: Image.Image, spec: ImageSpec) -> Pixels:
    """uint8 [S,S,3], a smaller picture in the middle of the filling."""
    size, (width, height) = spec.size, image.size
    if image.size != (size, size):
        square = Image.new("RGB", (size, size), (spec.fill,) * 3)
        square.paste(image, ((size - width) // 2, (size - height) // 2))
        image = square
    return np.array(image)
