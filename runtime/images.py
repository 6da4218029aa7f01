"""Pictures: finding them, decoding them right or not at all, and bringing them to a tower's square."""

import hashlib
import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from clipret.bundle import ImageSpec
from clipret.errors import ClipretError

__all__ = ["PictureError", "PictureFile", "decode", "find_pictures", "fit", "load", "read_picture"]

Pixels = npt.NDArray[np.uint8]

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
BACKGROUND = (255, 255, 255)  # behind transparent pixels: shops cut their goods out on white

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# Pillow only warns between one and two times its pixel limit; a warning in a decode thread helps nobody.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


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
        raise ClipretError(f"{folder} is not a folder: name a folder of pictures, or a .csv, .tsv or .jsonl list")
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in names if name[0] != "." and _extension(name) in EXTENSIONS]
    if not found:
        raise ClipretError(f"{folder} holds no pictures ({' '.join(sorted(EXTENSIONS))}): is it the right folder?")
    return sorted(found)


def _extension(name: str) -> str:
    return name[name.rfind(".") :].lower()


def read_picture(path: Path) -> PictureFile:
    """Read a picture's file once. Raises PictureError for what is no regular, non-empty, readable file."""
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise PictureError("not a regular file")  # opening a pipe would wait for its other end
        content = path.read_bytes()
    except OSError as error:
        raise PictureError(f"cannot be read: {error.strerror or error}") from None
    if not content:
        raise PictureError("the file is empty")
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return PictureFile(content, len(content), status.st_mtime_ns, digest)


def load(source: Path | bytes | Image.Image, spec: ImageSpec) -> Pixels:
    """A picture as the tower's input: uint8 [S,S,3], S = spec.size.

    The same function feeds training's evaluation, the export's check and the search, so that none of them can differ.
    Raises PictureError when the picture cannot be decoded whole.
    """
    if isinstance(source, Path):
        source = read_picture(source).content
    return fit(decode(source, exif=spec.exif), spec)


def decode(source: bytes | Image.Image, *, exif: bool = False) -> Image.Image:
    """An RGB picture from a file's bytes or from any Pillow picture, first frame of animations.

    Mends what a plain `convert("RGB")` gets wrong: 16-bit grey is scaled instead of clipped to white, transparent
    pixels lie on white instead of showing whatever colour they hide. `exif` turns the picture as its tag says.
    Raises PictureError for truncated, corrupt, over-large (decompression bombs) or unknown pictures.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))
        image.load()
        if exif:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError("not a picture that Pillow knows") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(f"more than {Image.MAX_IMAGE_PIXELS} pixels (decompression bomb?)") from None
    except MemoryError:
        raise PictureError("too large for the memory") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on corrupt bytes
        raise PictureError(f"broken: {error}" if str(error) else f"broken: {type(error).__name__}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise PictureError("a 32-bit float picture has no defined white: convert it to 8 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.max() > 65535 or values.min() < 0:
            raise PictureError("a 32-bit integer picture has no defined white: convert it to 8 bits")
        return Image.fromarray((values.astype(np.uint32) * 255 // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        flat = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
        flat.alpha_composite(rgba)
        return flat.convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, spec: ImageSpec) -> Pixels:
    """An RGB picture brought to uint8 [S,S,3] as `spec` says.

    Sizes and offsets are rounded as in torchvision's Resize and CenterCrop and in open_clip's ResizeKeepRatio and
    CenterCropOrPad, so that pixels equal those of open_clip's own evaluation transform.
    """
    size, resample = spec.size, _FILTERS[spec.interpolation]
    width, height = image.size
    if spec.resize == "squash":
        return _pixels(image.resize((size, size), resample))
    if spec.resize == "longest":
        ratio = max(width, height) / size
        # A picture of 1 x 1000 pixels would shrink to a width of none.
        width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
        square = Image.new("RGB", (size, size), (spec.fill,) * 3)
        square.paste(image.resize((width, height), resample), ((size - width) // 2, (size - height) // 2))
        return _pixels(square)
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return _pixels(image.resize((width, height), resample).crop((left, top, left + size, top + size)))


def _pixels(image: Image.Image) -> Pixels:
    return np.array(image, dtype=np.uint8)
