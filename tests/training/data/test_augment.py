import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from clipret.bundle import ImageSpec
from clipret.errors import ClipretError
from clipret.images.decode import load
from clipret_training.data import pixel_ops
from clipret_training.data.augment import Augmenter

FILL = 116


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photographs(count: int, width: int, height: int) -> list[Image.Image]:
    """Smooth shapes in colour with some grain, so that JPEG has something to keep and something to lose."""
    rng = np.random.default_rng(3)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
        grain = rng.normal(0, 6, (height, width, 3))
        images.append(Image.fromarray((np.array(coarse) + grain).clip(0, 255).astype(np.uint8)))
    return images


def as_tensor(images: list[Image.Image]) -> Tensor:
    """float32 [B,3,H,W]"""
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2).float() / 255


def as_pixels(images: list[Image.Image]) -> Tensor:
    """uint8 [B,H,W,3]"""
    return torch.stack([torch.from_numpy(np.array(image)) for image in images])


def strength(value: float, count: int = 3) -> Tensor:
    return torch.full((count,), value)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: pixel_ops.adjust(x, brightness=strength(0.6)), lambda p: ImageEnhance.Brightness(p).enhance(0.6)),
        (lambda x: pixel_ops.adjust(x, contrast=strength(0.5)), lambda p: ImageEnhance.Contrast(p).enhance(0.5)),
        (lambda x: pixel_ops.adjust(x, saturation=strength(1.4)), lambda p: ImageEnhance.Color(p).enhance(1.4)),
        (lambda x: pixel_ops.sharpen(x, strength(1.8)), lambda p: ImageEnhance.Sharpness(p).enhance(1.8)),
        (lambda x: pixel_ops.sharpen(x, strength(0.2)), lambda p: ImageEnhance.Sharpness(p).enhance(0.2)),
        (lambda x: pixel_ops.posterize(x, strength(5.0)), lambda p: ImageOps.posterize(p, 5)),
        (lambda x: pixel_ops.solarize(x, strength(0.7)), lambda p: ImageOps.solarize(p, 179)),
    ],
    ids=["brightness", "contrast", "saturation", "sharper", "softer", "posterize", "solarize"],
)  # fmt: skip
def test_changes_are_pillows(ours: Any, theirs: Any) -> None:
    images = photographs(3, 24, 20)
    expected = as_tensor([theirs(image) for image in images])
    assert (ours(as_tensor(images)).clamp(0, 1) - expected).abs().max() <= 2.5 / 255  # Pillow rounds in between


@pytest.mark.parametrize("quality", [10, 40, 75])
def test_jpeg_loses_what_libjpeg_loses(quality: int) -> None:
    images = photographs(10, 60, 44)  # sides that are no multiples of a block, more images than go at once
    expected = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        expected.append(Image.open(file).convert("RGB"))
    x = as_tensor(images)
    ours = pixel_ops.jpeg(x, strength(float(quality), 10)).clamp(0, 1)
    lost = (as_tensor(expected) - x).abs().mean()
    assert (ours - as_tensor(expected)).abs().mean() < 0.25 * lost
    assert (ours - x).abs().mean() == pytest.approx(float(lost), rel=0.1)


def test_each_image_has_its_own_quality() -> None:
    x = as_tensor(photographs(2, 32, 32))
    both = pixel_ops.jpeg(x, torch.tensor([10.0, 80.0]))
    torch.testing.assert_close(both[1:], pixel_ops.jpeg(x[1:], torch.tensor([80.0])))
    assert (both[0] - x[0]).abs().mean() > 2 * (both[1] - x[1]).abs().mean()


def test_a_turned_image_shows_nothing_from_beyond_its_edge() -> None:
    x = torch.zeros(2, 3, 40, 40)
    x[:, :, 10:30] = 1  # a wide image between two bars
    for degrees in (-20.0, 5.0, 20.0):
        turned = pixel_ops.rotate(x, torch.tensor([degrees, 0.0]), torch.ones(2), torch.full((2,), 0.5))
        assert turned[0, :, 11:29].min() > 0.99
        torch.testing.assert_close(turned[1], x[1])
    gradient = torch.linspace(0, 1, 40).expand(1, 3, 40, 40)
    turned = pixel_ops.rotate(gradient, torch.tensor([10.0]), torch.ones(1), torch.ones(1))
    expected = as_tensor([Image.fromarray((gradient[0] * 255).byte().permute(1, 2, 0).numpy()).rotate(10)])
    ours, theirs = (torch.sign(y[0, 0, 30, 20] - y[0, 0, 10, 20]) for y in (turned, expected))
    assert ours == theirs  # turned the same way


def test_low_light_is_darker_and_noisier() -> None:
    x = torch.full((2, 3, 64, 64), 0.5)
    dark = pixel_ops.low_light(x, torch.tensor([0.04, 0.5]), generator())
    assert dark[0].mean() == pytest.approx(0.5 * 0.04**0.5, rel=0.05)
    relative = dark.flatten(1).std(dim=1) / dark.flatten(1).mean(dim=1)
    assert relative[0] > 2 * relative[1] > 0


@pytest.mark.parametrize(("flip", "low", "high"), [(0.0, 0, 0), (0.5, 20, 44), (1.0, 64, 64), (None, 0, 0)])
def test_flip_is_a_share_of_the_images(flip: float | None, low: int, high: int) -> None:
    pixels = as_pixels(photographs(64, 16, 16))
    plain = pixels.permute(0, 3, 1, 2).float() / 255
    x = Augmenter("none", 16, 1.0, 0.0, flip=flip)(pixels, generator())
    flipped = sum(torch.equal(one, other.flip(2)) for one, other in zip(x, plain, strict=True))
    same = sum(torch.equal(one, other) for one, other in zip(x, plain, strict=True))
    assert low <= flipped <= high
    assert flipped + same == 64
    resized = Augmenter("none", 8, 1.0, 0.0, flip=flip)(pixels, generator())
    unflipped = Augmenter("none", 8, 1.0, 0.0)(pixels, generator())
    assert sum(torch.equal(one, other.flip(2)) for one, other in zip(resized, unflipped, strict=True)) == flipped


@pytest.mark.parametrize("size", [20, 32])
def test_an_area_of_one_is_the_whole_image(size: int) -> None:
    pixels = as_pixels(photographs(4, 32, 32))
    whole = Augmenter("photo", size, 1.0, 0.0, flip=0.0)(pixels, generator())
    torch.testing.assert_close(whole, Augmenter("none", size, 1.0, 0.0)(pixels, generator()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 30), (31, 48), (48, 48)])
def test_padded_images_are_padded_anew(shape: tuple[int, int], tmp_path: Any) -> None:
    """In plain red between grey bars: nothing else may be seen, and the bars are those of a whole image."""
    Image.new("RGB", shape, (255, 0, 0)).save(tmp_path / "red.png")
    square = load(tmp_path / "red.png", ImageSpec(size=48, resize="longest", fill=FILL))
    pixels = torch.from_numpy(square).repeat(32, 1, 1, 1)
    x = Augmenter("photo", 40, 0.2, 0.0, rotation=10.0, fill=FILL)(pixels, generator())
    bar = (x - FILL / 255).abs().amax(dim=1) < 1e-6  # [B,40,40]
    red = (x - torch.tensor([1.0, 0.0, 0.0])[:, None, None]).abs().amax(dim=1) < 1e-5
    assert (bar | red).all()
    rows, columns = bar.all(dim=2), bar.all(dim=1)  # [B,40]
    assert not (rows.any(dim=1) & columns.any(dim=1)).any()  # above and below, or at the sides
    for side in (rows, columns):  # alike on both sides but for a pixel
        before, behind = (way.long().cumprod(dim=1).sum(dim=1) for way in (side, side.flip(1)))
        assert set((behind - before).tolist()) <= {0, 1}
    assert len({int(count) for count in (rows | columns).sum(dim=1)}) > 1  # crops differ in shape
    whole = Augmenter("photo", 48, 1.0, 0.0, flip=0.0, fill=FILL)(pixels, generator())
    torch.testing.assert_close(whole[0], pixels[0].permute(2, 0, 1).float() / 255, rtol=0, atol=1e-5)


def test_an_image_that_is_all_fill_stays() -> None:
    pixels = torch.full((2, 24, 24, 3), FILL, dtype=torch.uint8)
    assert Augmenter("surveillance", 16, 0.5, 0.3, fill=FILL)(pixels, generator()).isfinite().all()


def test_random_changes_are_made_and_decided_by_the_generator() -> None:
    pixels = as_pixels(photographs(64, 24, 24))
    plain = Augmenter("none", 24, 1.0, 0.0)(pixels, generator())
    augment = Augmenter("none", 24, 1.0, 0.0, random_ops=2, magnitude=1.0)
    x = augment(pixels, generator(5))
    assert ((x - plain).flatten(1).abs().mean(dim=1) > 1e-3).sum() > 60
    assert 0 <= x.min() < x.max() <= 1
    assert torch.equal(x, augment(pixels, generator(5)))
    assert not torch.equal(x, augment(pixels, generator(6)))
    weak = Augmenter("none", 24, 1.0, 0.0, random_ops=2, magnitude=0.1)(pixels, generator(5))
    assert (weak - plain).abs().mean() < 0.5 * (x - plain).abs().mean()


def test_surveillance_is_darker_than_photo_and_in_range() -> None:
    pixels = as_pixels(photographs(64, 32, 32))
    photo = Augmenter("photo", 32, 0.5, 0.2)(pixels, generator())
    poor = Augmenter("surveillance", 32, 0.5, 0.2)(pixels, generator())
    assert poor.mean() < 0.9 * photo.mean()
    assert 0 <= poor.min() < poor.max() <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "cartoon"}, "kind is 'cartoon': it must be one of none, photo"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"rotation": 90.0}, "rotation is 90.0"),
        ({"magnitude": -1.0}, "magnitude is -1.0"),
        ({"area": 0.0}, "area is 0.0: it must be a finite number above 0 up to 1"),
        ({"random_ops": -1}, "random_ops is -1"),
    ],
)
def test_values_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ClipretError, match=message):
        Augmenter(**({"kind": "photo", "size": 8, "area": 0.5, "jitter": 0.1} | given))
