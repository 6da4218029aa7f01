"""JPEGs decoded by NVIDIA's nvImageCodec: on a GPU, or with its CPU backend where there is none.

Only the decoding moves; resizing stays Pillow's, on the decode threads. A GPU's inverse transform and its upsampling of
colour round differently from libjpeg's, so pixels differ: by how much is measured before the first image, and a
decoder that differs more than `fast_decode` ever did is refused. Whatever is not a plain, whole JPEG goes to Pillow,
which also gives the reasons for what cannot be decoded.
"""

import io
import threading
from typing import Any

import numpy as np
from PIL import Image

from clipret.arrays import Pixels
from clipret.bundle import ImageSpec
from clipret.errors import ClipretError, one_line, require
from clipret.images.decode import load

__all__ = ["MOST_LEVELS", "GpuDecoder"]


MOST_LEVELS = (
    1.0,
    20,
)  # of 255, mean and largest: what fast_decode differs at its worst, see images.decode.load
_END = b"\xff\xd9"


class GpuDecoder:
    """`load` as that of clipret.images.decode. `device`: "cuda", "cuda:N", or "cpu" for nvImageCodec's own CPU backend.

    Raises ClipretError where nvImageCodec is missing, cannot start, or gives other pixels than Pillow by more than
    MOST_LEVELS on the check's images; `levels` is what was found, mean and largest.
    """

    def __init__(self, device: str) -> None:
        try:
            self._library = require("nvidia.nvimgcodec", "nvjpeg")
        except (ImportError, OSError) as error:
            raise ClipretError(f"nvImageCodec does not load ({error}): use decode=pillow") from None
        kind, _, number = device.partition(":")
        self._number = int(number or 0) if kind == "cuda" else None
        self._local = threading.local()  # a decoder for each thread: they are one thread's at a time
        self._check()
        self.levels = self._compare()

    def load(self, content: bytes, spec: ImageSpec) -> Pixels:
        """uint8 [S,S,3]. Raises ImageError as clipret.images.decode.load does."""
        pixels = self._decode(content) if _plain(content, spec) else None
        return load(content if pixels is None else pixels, spec)

    def _decoder(self) -> Any:
        if not hasattr(self._local, "decoder"):
            library = self._library
            if self._number is None:
                options = {
                    "device_id": library.NVIMGCODEC_DEVICE_CPU_ONLY,
                    "backends": [library.Backend(library.CPU_ONLY)],
                }
            else:
                options = {"device_id": self._number}
            self._local.decoder = library.Decoder(max_num_cpu_threads=1, **options)
            self._local.params = library.DecodeParams(apply_exif_orientation=False, color_spec=library.ColorSpec.SRGB)
        return self._local.decoder

    def _decode(self, content: bytes) -> Pixels | None:
        """uint8 [H,W,3], or None for what it cannot decode."""
        try:
            image = self._decoder().decode(content, params=self._local.params)
            return None if image is None else np.ascontiguousarray(image.cpu())
        except RuntimeError:  # its own errors and CUDA's; Pillow tries, and has the last word
            return None

    def _check(self) -> None:
        """Raises ClipretError unless it decodes at all: one that always falls back would be Pillow in disguise."""
        try:
            decoded = self._decoder().decode(_samples()[0], params=self._local.params)
        except RuntimeError as error:
            raise ClipretError(f"nvImageCodec cannot start ({one_line(error)}): use decode=pillow") from None
        if decoded is None:
            raise ClipretError("nvImageCodec decodes no JPEG here (is nvidia-nvjpeg installed?): use decode=pillow")

    def _compare(self) -> tuple[float, int]:
        spec, worst = ImageSpec(64), (0.0, 0)
        for content in _samples():
            difference = np.abs(self.load(content, spec).astype(int) - load(content, spec))
            worst = max(worst[0], float(difference.mean())), max(worst[1], int(difference.max()))
        if worst[0] > MOST_LEVELS[0] or worst[1] > MOST_LEVELS[1]:
            raise ClipretError(
                f"nvImageCodec's pixels differ from Pillow's by {worst[0]:.2f} levels in the mean and {worst[1]} at "
                f"most (allowed: {MOST_LEVELS[0]:g} and {MOST_LEVELS[1]}): use decode=pillow"
            )
        return worst


def _plain(content: bytes, spec: ImageSpec) -> bool:
    """Whether a file is a JPEG of grey or colour that ends as one should; a GPU may fill what is missing with grey."""
    if not content.startswith(b"\xff\xd8") or _END not in content[-64:]:
        return False
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "MPO")) as header:
            small = Image.MAX_IMAGE_PIXELS is None or header.width * header.height <= Image.MAX_IMAGE_PIXELS
            return header.mode in ("RGB", "L") and small and not spec.exif
    except Exception:  # Pillow's parsers raise nearly anything on corrupt bytes, and will again with the reason
        return False


def _samples() -> list[bytes]:
    """Drawn images in each way of storing colour, and one in grey."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    sample = coarse.resize((322, 242), Image.Resampling.BICUBIC)
    ways: list[tuple[Image.Image, dict[str, Any]]] = [(sample, {"subsampling": way}) for way in (0, 1, 2)]
    ways += [(sample, {"progressive": True}), (sample.convert("L"), {})]
    files = []
    for image, options in ways:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90, **options)
        files.append(buffer.getvalue())
    return files
