import io
import os
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from clipret.bundle import ImageSpec
from clipret.errors import ClipretError
from clipret.images.decode import decode, load
from clipret.images.resize import fit
from clipret.images.walk import ImageError, find_images, read_image, walk_images

RAMP = np.linspace(0, 65535, 60 * 90).reshape(60, 90).astype(np.uint16)
SPEC = ImageSpec(32)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def drawn(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth blobs with edges and noise: neither symmetrical nor flat."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), 2)
    pixels = np.asarray(coarse).astype(int) + rng.integers(-20, 21, (height, width, 1))
    pixels[height // 5 : height // 3, width // 7 : width // 2] = (250, 240, 20)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def grey_tiff(values: npt.NDArray[np.uint16], bits: int, photometric: int) -> bytes:
    """An uncompressed TIFF of kinds that Pillow reads but does not write."""
    data = values.astype("<u2").tobytes()
    if bits == 12:
        first, second = values.reshape(-1, 2).astype(int).T
        data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag > 270 else 3, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF", "white-is-zero TIFF", "12-bit TIFF", "array"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    expected = np.round(RAMP / 257)
    source: bytes | Image.Image
    if kind == "white-is-zero TIFF":
        source = grey_tiff(65535 - RAMP, 16, 0)
    elif kind == "12-bit TIFF":
        source, expected = grey_tiff(RAMP >> 4, 12, 1), np.round((RAMP >> 4) * 16 / 257)
    elif kind == "big-endian TIFF":
        source = encoded(Image.frombytes("I;16B", (90, 60), RAMP.astype(">u2").tobytes()), "TIFF")
        assert Image.open(io.BytesIO(source)).mode == "I;16B"
    elif kind == "array":
        source = Image.fromarray(RAMP)
    else:
        source = encoded(Image.fromarray(RAMP), kind)
    pixels = np.asarray(decode(source))
    np.testing.assert_array_equal(pixels[..., 0], expected)
    assert (pixels[..., :1] == pixels).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "La", "RGBa"])
def test_transparent_pixels_lie_on_white(mode: str) -> None:
    rgba = Image.new("RGBA", (4, 4), (200, 10, 10, 0))
    rgba.putpixel((0, 0), (0, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    if mode == "PA":
        image = Image.frombytes("PA", (4, 4), bytes([0, 255, 0, 128, *[1, 0] * 14]))  # colour, alpha, colour, …
        image.putpalette([0, 0, 0, 200, 10, 10])
    else:
        image = rgba.quantize() if mode == "P" else (rgba.convert("LA") if mode == "La" else rgba).convert(mode)
    source = encoded(image) if mode in ("RGBA", "LA", "P") else image
    pixels = np.asarray(decode(source))
    assert pixels[0, 0].max() < 3
    assert abs(pixels[0, 1].astype(int) - 127).max() < 3
    assert pixels[2, 2].min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16"])
def test_a_transparent_colour_is_white(mode: str) -> None:
    black = np.zeros((4, 4), dtype=np.uint16 if mode == "I;16" else np.uint8)
    black[1, 2] = 1 if mode == "P" else 65535 if mode == "I;16" else 255
    image = Image.fromarray(black)
    if mode == "P":
        image = Image.frombytes("P", (4, 4), black.tobytes())
        image.putpalette([0, 0, 0, 90, 90, 90])
    elif mode in ("1", "RGB"):
        image = image.convert(mode)
    hidden: object = (255, 255, 255) if mode == "RGB" else int(black[1, 2])
    source = encoded(image, transparency=hidden)
    assert "transparency" in Image.open(io.BytesIO(source)).info
    assert np.asarray(decode(source)).sum() == 3 * 255
    hidden = (0, 0, 0) if mode == "RGB" else 0
    assert np.asarray(decode(encoded(image, transparency=hidden))).sum() == (
        16 * 765 if mode != "P" else 15 * 765 + 270
    )


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    image = drawn(40, 30)
    np.testing.assert_array_equal(np.asarray(decode(encoded(image.convert("RGBA")))), np.asarray(image))


def test_one_bit_images_are_black_and_white() -> None:
    image = Image.fromarray(np.eye(9, dtype=np.uint8) * 255)
    for kind in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(np.asarray(decode(encoded(image.convert("1"), kind)))[..., 1], np.asarray(image))


def test_cmyk_as_adobe_writes_it() -> None:
    red = Image.new("RGB", (16, 16), (250, 20, 20))
    content = encoded(red.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in content
    assert abs(np.asarray(decode(content)).astype(int) - (250, 20, 20)).max() < 12


def test_ycck_as_adobe_writes_it() -> None:
    # Y, Cb and Cr encode the ink of each colour, 255 - R and so on; K is stored inverted. Pillow writes four planes as
    # they are, inverted, and marks them 0 (CMYK) where such a file says 2.
    y, cb, cr = Image.new("RGB", (16, 16), (255 - 250, 255 - 20, 255 - 20)).convert("YCbCr").getpixel((0, 0))  # type: ignore[misc]
    planes = Image.new("CMYK", (16, 16), (255 - int(y), 255 - int(cb), 255 - int(cr), 0))
    content = bytearray(encoded(planes, "JPEG", quality=95))
    content[content.index(b"Adobe") + 11] = 2
    assert abs(np.asarray(decode(bytes(content))).astype(int) - (250, 20, 20)).max() < 12


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    if kind == "AVIF" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "lime")]
    movie = encoded(frames[0], kind, save_all=True, append_images=frames[1:], disposal=2)
    assert Image.open(io.BytesIO(movie)).n_frames == 3  # type: ignore[attr-defined]
    assert abs(np.asarray(decode(movie))[3, 3].astype(int) - (255, 0, 0)).max() < 3


def test_what_the_first_frame_of_a_gif_leaves_free_is_white() -> None:
    content = bytearray(encoded(Image.new("RGB", (8, 6), (200, 0, 0)), "GIF"))
    content[6:10] = struct.pack("<HH", 20, 16)  # the canvas
    at = content.index(0x2C, 13)
    content[at + 1 : at + 5] = struct.pack("<HH", 5, 4)  # where the frame lies
    pixels = np.asarray(decode(bytes(content)))
    expected = np.full((16, 20, 3), 255)
    expected[4:10, 5:13] = (200, 0, 0)
    np.testing.assert_array_equal(pixels, expected)


def test_a_phone_s_pair_of_images_is_its_first() -> None:
    content = encoded(drawn(64, 48), "MPO", save_all=True, append_images=[drawn(64, 48, 1)])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    np.testing.assert_array_equal(np.asarray(decode(content)), np.asarray(decode(encoded(drawn(64, 48), "JPEG"))))
    assert load(content, ImageSpec(8), fast=True).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_only_on_request(kind: str, turn: int) -> None:
    image, exif = drawn(40, 24), Image.Exif()
    exif[0x0112] = turn
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(image, kind, exif=exif, **options)
    raw = np.asarray(decode(encoded(image, kind, **options)))
    swapped = raw.transpose(1, 0, 2)
    turned = [
        raw,
        raw[:, ::-1],
        raw[::-1, ::-1],
        raw[::-1],
        swapped,
        swapped[:, ::-1],
        swapped[::-1, ::-1],
        swapped[::-1],
    ]
    np.testing.assert_array_equal(np.asarray(decode(content, exif=True)), turned[turn - 1])
    if kind != "TIFF":  # which Pillow turns by itself, once
        np.testing.assert_array_equal(np.asarray(decode(content)), raw)


def test_a_broken_exif_block_is_no_broken_image() -> None:
    content = encoded(drawn(40, 24), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode(content, exif=True).size == (40, 24)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_a_truncated_file_is_an_error_never_half_an_image(kind: str, options: dict[str, object]) -> None:
    whole = encoded(drawn(50, 40), kind, **options)
    expected = np.asarray(decode(whole))
    refused = 0
    for length in range(1, len(whole), max(len(whole) // 97, 1)):
        for fast in (False, True):
            try:
                load(whole[:length], ImageSpec(8), fast=fast)
                np.testing.assert_array_equal(np.asarray(decode(whole[:length])), expected)  # only its end is missing
            except ImageError:
                refused += 1
    assert refused > 150


def test_a_damaged_png_is_refused() -> None:
    damaged = bytearray(encoded(drawn(50, 40)))
    damaged[len(damaged) // 2] ^= 0xFF
    with pytest.raises(ImageError):
        decode(bytes(damaged))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"GIF? no.", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not an image"),
        (bytes(100), "not an image"),
        (encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "no defined white"),
        (encoded(Image.new("I", (2, 2), 70000), "TIFF"), "no defined white"),
    ],
)
def test_files_that_are_not_images_are_rejected(content: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(content)


def test_a_decompression_bomb_is_rejected_with_any_warning_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    png = encoded(drawn(90, 60))
    for limit in (4000, 2000):  # Pillow warns between one and two times its limit and raises beyond
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for action in ("ignore", "error"):
            with warnings.catch_warnings():
                warnings.simplefilter(action)
                with pytest.raises(ImageError, match="decompression bomb"):
                    decode(png)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(png).size == (90, 60)


def test_arrays() -> None:
    image = drawn(50, 40)
    pixels = np.asarray(image)
    expected = load(image, SPEC)
    np.testing.assert_array_equal(load(pixels, SPEC), expected)
    np.testing.assert_array_equal(load(np.asfortranarray(pixels), SPEC), expected)
    np.testing.assert_array_equal(load(pixels[::2, ::-1], SPEC), load(Image.fromarray(pixels[::2, ::-1].copy()), SPEC))
    opaque = np.dstack([pixels, np.full((40, 50), 255, np.uint8)])
    np.testing.assert_array_equal(load(opaque, SPEC), expected)
    assert (load(np.dstack([pixels, np.zeros((40, 50), np.uint8)]), SPEC) == 255).all()
    np.testing.assert_array_equal(load(pixels[..., 0], SPEC), load(image.getchannel("R"), SPEC))
    assert abs(load(pixels, SPEC, fast=True).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(4,), (0, 4, 3), (4, 4, 2), (3, 9, 9), (1, 4, 4, 3)])
def test_arrays_of_another_shape_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="is no image: give uint8"):
        load(np.zeros(shape, np.uint8), SPEC)


def test_arrays_of_another_type_are_rejected() -> None:
    with pytest.raises(ImageError, match="float32"):
        load(np.zeros((4, 4, 3), np.float32), SPEC)  # type: ignore[arg-type]


def test_a_pillow_image_is_not_changed() -> None:
    source = Image.open(io.BytesIO(encoded(drawn(400, 300), "JPEG")))
    load(source, SPEC, fast=True)
    assert source.size == (400, 300)


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
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_equal_those_of_the_reference(resize: str, interpolation: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    shapes = [(32, 33, 32), (37, 640, 427), (48, 101, 333), (32, 32, 32), (51, 20, 17)]
    if resize == "shortest":
        shapes.append((32, 1, 2099))
    for size, width, height in shapes:
        reference = open_clip.image_transform(
            size,
            is_train=False,
            mean=(0,) * 3,
            std=(1,) * 3,
            resize_mode=resize,
            interpolation=interpolation,
            fill_color=9,
        )
        image = drawn(width, height)
        expected = (reference(image).permute(1, 2, 0) * 255).round().numpy()
        spec = ImageSpec(size, resize, interpolation, fill=9)  # type: ignore[arg-type]
        np.testing.assert_allclose(load(encoded(image), spec), expected, rtol=0, atol=1 if width == 1 else 0)
        np.testing.assert_allclose(load(image, spec, fast=True), expected, rtol=0, atol=1)


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(1, 900), (900, 1), (1, 1), (33, 32), (1, 60000)])
def test_any_shape_becomes_the_square(resize: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "green")
    for fast in (False, True):
        pixels = load(image, ImageSpec(32, resize), fast=fast)  # type: ignore[arg-type]
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        assert pixels.flags.writeable
        assert tuple(pixels[15, 15]) == (0, 128, 0)


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_fast_differs_little_even_where_sides_are_odd_and_turned(resize: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    content = encoded(drawn(401, 307), "JPEG", quality=95, exif=exif)
    spec = ImageSpec(34, resize, exif=True)  # type: ignore[arg-type]
    faithful = load(content, spec).astype(int)
    difference = abs(load(content, spec, fast=True) - faithful)
    assert 0 < difference.mean() < 0.6  # taking the decoder's last, partly filled column for a whole one: 0.8 to 2.6
    assert difference.max() < 9


def test_fast_on_photographs(real_data: Path | None) -> None:
    files: list[bytes | Path] = [encoded(drawn(213 + n, 160 + n), "JPEG", quality=75 + n) for n in range(20)]
    files += find_images(real_data / "flickr8k")[:200] if real_data is not None else []
    # 40 and 26 pixels of photographs of 160: just two and three samples, the least that is ever left.
    for resize, size in [("shortest", 40), ("longest", 26), ("squash", 40)]:
        spec = ImageSpec(size, resize)  # type: ignore[arg-type]
        difference = np.stack([abs(load(f, spec, fast=True).astype(int) - load(f, spec)) for f in files])
        assert 0 < difference.mean() < 1


def test_read_image_names_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(1 << 31)  # takes no room
    for name, reason in [
        ("empty.jpg", "empty"),
        ("folder.jpg", "directory"),
        ("gone.jpg", "No such file"),
        ("dangling.jpg", "No such file"),
        ("circle.jpg", "symbolic links"),
        ("huge.jpg", "too many"),
        ("\0.jpg", "null (byte|character)"),
        ("n" * 300, "too long"),
    ]:
        for read in (read_image, lambda path: load(path, SPEC)):
            with pytest.raises(ImageError, match=reason):
                read(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_cannot_hang_the_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(tmp_path / "pipe.jpg")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users here")
def test_what_may_not_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are the owner's alone
        root, me = Path(name), os.geteuid()
        root.chmod(0o755)
        for image in ("open.png", "closed.png", "folder/inner.png"):
            (root / image).parent.mkdir(exist_ok=True)
            (root / image).write_bytes(encoded(drawn(9, 9)))
        (root / "closed.png").chmod(0)
        (root / "folder").chmod(0)
        if me == 0:
            os.seteuid(65534)  # to root nothing is closed
        try:
            assert list(walk_images(root)) == ["closed.png", "folder", "open.png"]
            for closed in ("closed.png", "folder"):
                with pytest.raises(ImageError, match="Permission denied"):
                    read_image(root / closed)
            with pytest.raises(ClipretError, match=r"folder cannot be read: Permission denied"):
                find_images(root / "folder")
        finally:
            os.seteuid(me)
            (root / "folder").chmod(0o755)


def test_find_images_is_recursive_sorted_and_skips_hidden(tmp_path: Path) -> None:
    for name in ["b/2.JPG", "a/1.png", "a/.hidden.png", ".git/3.png", "a/notes.txt", "a.b/4.webp", "a/c/5.tif"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [tmp_path / name for name in ("a/1.png", "a/c/5.tif", "a.b/4.webp", "b/2.JPG")]
    assert find_images(tmp_path) == found == sorted(found)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/1.png").touch()
    (tmp_path / "a/b/up").symlink_to(tmp_path)
    (tmp_path / "also").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert list(walk_images(tmp_path)) == ["a/1.png", "also/1.png", "gone.png"]


def test_folders_deeper_than_python_recurses(tmp_path: Path) -> None:
    deepest = tmp_path
    for _ in range(1200):
        deepest = deepest / "d"
        deepest.mkdir()
    (deepest / "1.png").touch()
    try:
        assert [name[-7:] for name in walk_images(tmp_path)] == ["d/1.png"]
    finally:
        (deepest / "1.png").unlink()
        while deepest != tmp_path:  # pytest's own cleaning recurses
            deepest.rmdir()
            deepest = deepest.parent


def test_find_images_refuses_nothing(tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match="holds no images"):
        find_images(tmp_path)
    with pytest.raises(ClipretError, match="is not a folder"):
        find_images(tmp_path / "gone")
