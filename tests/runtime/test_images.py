import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipret.bundle import ImageSpec
from clipret.errors import ClipretError
from clipret.images import PictureError, decode, find_pictures, fit, load, read_picture

GRADIENT = np.linspace(0, 255, 60 * 90).reshape(60, 90)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    deep = Image.fromarray((GRADIENT * 257).astype(np.uint16))
    pixels = np.asarray(decode(encoded(deep)))
    np.testing.assert_array_equal(pixels[..., 0], np.round((GRADIENT * 257).astype(np.uint16) / 257))
    assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_lie_on_white(mode: str) -> None:
    rgba = Image.new("RGBA", (4, 4), (200, 10, 10, 0))
    rgba.putpixel((0, 0), (0, 0, 0, 255))
    image = rgba.quantize() if mode == "P" else rgba.convert(mode)
    pixels = np.asarray(decode(encoded(image)))
    assert pixels[0, 0].max() < 3
    assert pixels[2, 2].min() == 255


def test_cmyk_and_animation() -> None:
    cmyk = Image.new("RGB", (8, 8), (250, 20, 20)).convert("CMYK")
    assert abs(np.asarray(decode(encoded(cmyk, "JPEG", quality=95))).reshape(-1, 3)[0] - (250, 20, 20)).max() < 12
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    movie = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(np.asarray(decode(movie))[0, 0]) == (255, 0, 0)


def test_exif_orientation_only_on_request() -> None:
    image = Image.new("RGB", (30, 10), "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    content = encoded(image, "JPEG", exif=exif)
    assert decode(content).size == (30, 10)
    assert decode(content, exif=True).size == (10, 30)


def test_what_cannot_be_decoded_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(Image.fromarray(GRADIENT.astype(np.uint8)), "JPEG")
    with pytest.raises(PictureError, match="truncated"):
        decode(whole[: len(whole) // 2])
    with pytest.raises(PictureError, match="not a picture"):
        decode(b"GIF? no.")
    with pytest.raises(PictureError, match="no defined white"):
        decode(Image.new("F", (2, 2), 0.5))
    with pytest.raises(PictureError, match="no defined white"):
        decode(Image.new("I", (2, 2), 70000))
    png = encoded(Image.fromarray(GRADIENT.astype(np.uint8)))
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    with pytest.raises(PictureError):
        decode(bytes(damaged))
    for limit in (4000, 2000):  # Pillow warns between one and two times its limit and raises beyond
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(PictureError, match="decompression bomb"):
            decode(png)


def test_read_picture_names_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in [("empty.jpg", "empty"), ("folder.jpg", "directory"), ("gone.jpg", "No such file")]:
        with pytest.raises(PictureError, match=reason):
            read_picture(tmp_path / name)


def test_shortest_crops_the_centre_and_longest_pads_it() -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 10, 20))
    cropped = fit(image, ImageSpec(20, "shortest"))
    np.testing.assert_array_equal(cropped, np.asarray(image.crop((10, 0, 30, 20))))
    padded = fit(image, ImageSpec(40, "longest", fill=7))
    assert (padded[:10] == 7).all()
    assert (padded[30:] == 7).all()
    np.testing.assert_array_equal(padded[10:30], np.asarray(image))
    squashed = fit(image, ImageSpec(20, "squash"))
    assert squashed.shape == (20, 20, 3)
    assert squashed[10, 0, 2] == 255  # the blue edge is still there


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(1, 900), (900, 1), (1, 1), (33, 32)])
def test_any_shape_becomes_the_square(resize: str, size: tuple[int, int]) -> None:
    pixels = load(Image.new("RGB", size, "green"), ImageSpec(32, resize))
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable


def test_find_pictures_is_recursive_sorted_and_skips_hidden(tmp_path: Path) -> None:
    for name in ["b/2.JPG", "a/1.png", "a/.hidden.png", ".git/3.png", "a/notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_pictures(tmp_path) == [tmp_path / "a/1.png", tmp_path / "b/2.JPG"]


def test_find_pictures_refuses_nothing(tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match="holds no pictures"):
        find_pictures(tmp_path)
    with pytest.raises(ClipretError, match="is not a folder"):
        find_pictures(tmp_path / "gone")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_cannot_hang_the_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(PictureError, match="not a regular file"):
        read_picture(tmp_path / "pipe.jpg")
