"""Decode JPEGs with NVIDIA's nvImageCodec, on a GPU or with its CPU backend.

Only the decoding moves to nvImageCodec; Pillow still resizes, on the decode threads. A GPU's inverse transform and
chroma upsampling round differently from libjpeg's, so pixels differ. The difference is measured before the first image,
and a decoder that differs more than the worst case of `fast_decode` is rejected. Everything except plain, complete
JPEGs is decoded by Pillow, which also gives the reasons for images that cannot be decoded.
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

__all__ = ["MAX_DIFFERENCE", "GpuDecoder"]

MAX_DIFFERENCE = (1.0, 20)
"""Mean and maximum in levels of 255: the worst case of fast_decode, see images.decode.load."""
_END = b"\xff\xd9"


class GpuDecoder:
    """A decoder whose `load` replaces that of clipret.images.decode.

    Args:
        device: "cuda", "cuda:N", or "cpu" for the CPU backend of nvImageCodec.

    Attributes:
        levels: Mean and maximum difference from Pillow's pixels on the test images, in levels of 255.

    Raises:
        ClipretError: nvImageCodec is not installed, cannot start, or differs from Pillow by more than MAX_DIFFERENCE.
    """

    def __init__(self, device: str) -> None:
        try:
            self._library = require("nvidia.nvimgcodec", "nvjpeg")
        except (ImportError, OSError) as error:
            raise ClipretError(f"nvImageCodec does not load ({error}): use decode=pillow") from error
        kind, _, number = device.partition(":")
        self._number = int(number or 0) if kind == "cuda" else None
        self._local = threading.local()  # decoders are not thread-safe: each thread has its own
        self._check()
        self.levels = self._compare()

    def load(self, content: bytes, spec: ImageSpec) -> Pixels:
        """Decode and resize an image.

        Args:
            content: The bytes of the file.
            spec: The preprocessing.

        Returns:
            uint8 [S,S,3], where S is `spec.size`.

        Raises:
            ImageError: As for clipret.images.decode.load.
        """
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
        """Decode to uint8 [H,W,3], or None if nvImageCodec cannot decode it."""
        try:
            image = self._decoder().decode(content, params=self._local.params)
            return None if image is None else np.ascontiguousarray(image.cpu())
        except RuntimeError:  # errors of nvImageCodec and CUDA; Pillow tries next
            return None

    def _check(self) -> None:
        """Raise ClipretError if it decodes nothing: every image would silently fall back to Pillow."""
        try:
            decoded = self._decoder().decode(_samples()[0], params=self._local.params)
        except RuntimeError as error:
            raise ClipretError(f"nvImageCodec cannot start ({one_line(error)}): use decode=pillow") from error
        if decoded is None:
            raise ClipretError(
                "nvImageCodec cannot decode a JPEG on this machine (is nvidia-nvjpeg installed?): use decode=pillow"
            )

    def _compare(self) -> tuple[float, int]:
        spec, mean, largest = ImageSpec(64), 0.0, 0
        for content in _samples():
            difference = np.abs(self.load(content, spec).astype(int) - load(content, spec))
            mean, largest = max(mean, float(difference.mean())), max(largest, int(difference.max()))
        if mean > MAX_DIFFERENCE[0] or largest > MAX_DIFFERENCE[1]:
            raise ClipretError(
                f"nvImageCodec's pixels differ from Pillow's by {mean:.2f} levels on average and {largest} at most "
                f"(allowed: {MAX_DIFFERENCE[0]:g} and {MAX_DIFFERENCE[1]}): use decode=pillow"
            )
        return mean, largest


def _plain(content: bytes, spec: ImageSpec) -> bool:
    """Whether a file is a complete grey or colour JPEG; a GPU may fill missing parts with grey."""
    if not content.startswith(b"\xff\xd8") or _END not in content[-64:]:
        return False
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "MPO")) as header:
            small = Image.MAX_IMAGE_PIXELS is None or header.width * header.height <= Image.MAX_IMAGE_PIXELS
            return header.mode in ("RGB", "L") and small and not spec.exif
    except Exception:  # Pillow's parsers raise nearly anything on corrupt bytes; `load` gives the reason later
        return False


def _samples() -> list[bytes]:
    """JPEGs of a random image with each chroma subsampling, progressive, and in grey."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    sample = coarse.resize((322, 242), Image.Resampling.BICUBIC)
    variants: list[tuple[Image.Image, dict[str, Any]]] = [(sample, {"subsampling": number}) for number in (0, 1, 2)]
    variants += [(sample, {"progressive": True}), (sample.convert("L"), {})]
    files = []
    for image, options in variants:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90, **options)
        files.append(buffer.getvalue())
    return files
