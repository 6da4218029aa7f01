"""nvImageCodec instead of Pillow's JPEG decoder, with its CPU backend: the same library, calls and check."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipret.bundle import Bundle, ImageSpec
from clipret.errors import ClipretError
from clipret.images import nvimagecodec
from clipret.images.decode import load
from clipret.images.nvimagecodec import MAX_DIFFERENCE, GpuDecoder
from clipret.images.walk import ImageError
from clipret.inference.config import EncoderConfig
from clipret.inference.encoder import Encoder

pytest.importorskip("nvidia.nvimgcodec")

SPEC = ImageSpec(48)


@pytest.fixture(scope="module")
def decoder() -> GpuDecoder:
    return GpuDecoder("cpu")


def file_of(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def image() -> Image.Image:
    rng = np.random.default_rng(1)
    return Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((200, 150))


def test_its_difference_from_pillow_is_measured(decoder: GpuDecoder) -> None:
    assert decoder.levels[0] <= MAX_DIFFERENCE[0]
    assert decoder.levels[1] <= MAX_DIFFERENCE[1]


def test_it_decodes_plain_jpegs_and_leaves_the_rest_to_pillow(decoder: GpuDecoder, image: Image.Image) -> None:
    for mode, plain in (("RGB", True), ("L", True), ("CMYK", False)):
        content = file_of(image.convert(mode), quality=90)
        assert nvimagecodec._plain(content, SPEC) is plain
        difference = np.abs(decoder.load(content, SPEC).astype(int) - load(content, SPEC))
        assert difference.max() <= 20
    content = file_of(image, "PNG")
    assert not nvimagecodec._plain(content, SPEC)
    np.testing.assert_array_equal(decoder.load(content, SPEC), load(content, SPEC))
    assert not nvimagecodec._plain(file_of(image), ImageSpec(48, exif=True))


def test_a_truncated_image_is_an_error(decoder: GpuDecoder, image: Image.Image) -> None:
    content = file_of(image)
    for broken in (content[: len(content) // 2], content[:3], b"\xff\xd8 no image \xff\xd9", b"text"):
        with pytest.raises(ImageError):
            decoder.load(broken, SPEC)


def test_a_decoder_with_other_pixels_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = GpuDecoder._decode

    def brighter(self: GpuDecoder, content: bytes) -> np.ndarray | None:
        pixels = decode(self, content)
        return None if pixels is None else np.minimum(pixels, 252) + np.uint8(3)

    monkeypatch.setattr(GpuDecoder, "_decode", brighter)
    with pytest.raises(ClipretError, match=r"differ from Pillow's by .* levels.*use decode=pillow"):
        GpuDecoder("cpu")


def test_an_encoder_uses_it(tiny_bundle: Path, image: Image.Image) -> None:
    content = file_of(image)
    encoder = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu", threads=2, decode="gpu"))
    plain = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu", threads=2))
    one, other = (next(iter(it.encode_images([content, content]))).embeddings for it in (encoder, plain))
    np.testing.assert_allclose(one, other, atol=0.02)
    with pytest.raises(ClipretError, match="either"):
        Encoder(Bundle.open(tiny_bundle), EncoderConfig(fast_decode=True, decode="gpu"))
