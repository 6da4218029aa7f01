import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from clipret.bundle import ImageSpec
from clipret.errors import ClipretError
from clipret.images.decode import load
from clipret.pairs import PairSet, read_pairs
from clipret_training.annotations import Annotations, split_pairs
from clipret_training.data.augment import Augment, Augmenter
from clipret_training.data.batches import ImageReader, Texts
from clipret_training.loss import positive_mask
from clipret_training.models.load import load_model

SPEC = ImageSpec(size=16)
ROWS = [
    ("red/0.jpg", "a red image"),
    ("red/0.jpg", "crimson"),
    ("red/1.jpeg", "a red image"),
    ("blue/0.jpg", 'a "blue" one, quoted'),
]


def write_list(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("path\ttitle\n" + "".join(f"{name}\t{caption}\n" for name, caption in rows), encoding="utf-8")
    return path


def test_rows_are_grouped_by_image_and_by_title(tmp_path: Path) -> None:
    pairs = read_pairs(write_list(tmp_path / "list.tsv", ROWS), image_root=Path("root"))
    assert pairs.paths == (Path("root/red/0.jpg"), Path("root/red/1.jpeg"), Path("root/blue/0.jpg"))
    assert pairs.captions == ("a red image", "crimson", 'a "blue" one, quoted')
    assert pairs.of_image == ((0, 1), (0,), (2,))
    assert pairs.of_caption() == [[0, 1], [0], [2]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", 'file,caption,lang\na.jpg,"red, and round",en\nb.jpg,蓝色,zh\n'),
        (
            "list.jsonl",
            '{"image": "a.jpg", "text": "red, and round", "lang": "en"}\n{"image": "b.jpg", "lang": "zh"}\n',
        ),
    ],
)
def test_other_formats_columns_and_where(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    pairs = read_pairs(tmp_path / name, where="lang = 'en'")
    assert (pairs.paths, pairs.captions) == ((tmp_path / "a.jpg",), ("red, and round",))


def test_an_empty_caption_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match=r"empty title \(b\.jpg\)"):
        read_pairs(write_list(tmp_path / "list.tsv", [("a.jpg", "a"), ("b.jpg", " ")]))


def listed(*paths: Path) -> Annotations:
    return Annotations(PairSet(paths, ("a",), ((0,),) * len(paths)), ((),) * len(paths))


def texts_of(pairs: PairSet, groups: tuple[tuple[int, ...], ...]) -> Texts:
    return Texts(load_model("clipret-small", captions=pairs.captions * 20), Annotations(pairs, groups))


def test_keys_make_positives_many_to_many() -> None:
    pairs = PairSet((Path("a"), Path("b"), Path("c")), ("x", "y", "z"), ((0, 1), (0,), (2,)))
    texts = texts_of(pairs, ((), (), ()))
    images, captions = texts.keys([0, 1, 2], torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 2, 1]))
    expected = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(positive_mask(images, captions), expected)


def test_rows_of_a_group_are_positives_of_each_other() -> None:
    pairs = PairSet((Path("a"), Path("b"), Path("c"), Path("d")), ("w", "x", "y", "z"), ((0,), (1,), (2,), (3,)))
    texts = texts_of(pairs, ((5,), (), (5, 6), (6,)))
    images, captions = texts.keys([0, 1, 2, 3], torch.arange(4), torch.arange(4))
    expected = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(positive_mask(images, captions), expected)


def test_captions_come_in_turn() -> None:
    pairs = PairSet((Path("a"), Path("b")), ("u", "v", "w", "x", "y", "z"), ((0, 1, 2, 3, 4), (5,)))
    texts = texts_of(pairs, ((), ()))
    epochs = [texts.sample([1, 0], 2, epoch) for epoch in range(1, 6)]
    assert [captions[0].item() for captions, _ in epochs] == [5] * 5
    assert [owners.tolist() for _, owners in epochs] == [[0, 1, 1]] * 5
    seen = torch.cat([captions[1:] for captions, _ in epochs])
    assert seen[:5].sort().values.tolist() == [0, 1, 2, 3, 4]  # all of them before the first comes again
    assert torch.equal(seen[:5], seen[5:])
    assert len(texts.sample([0], 9, 1)[0]) == 5


def test_captions_in_groups_by_length_come_back_in_order() -> None:
    captions = tuple(" ".join(["red", "car", "dog", "sea"][: 1 + n % 4]) + f" {n}" for n in range(40))
    texts = texts_of(PairSet((Path("a"),), captions, (tuple(range(40)),)), ((),))
    chosen = torch.randperm(40, generator=generator())
    batch = texts.batch(chosen)
    assert len({part.shape[1] for part in batch.groups}) > 1  # short ones are not padded for the longest
    assert sum(part.numel() for part in batch.groups) < texts.ids(chosen).numel()
    ends = [part[:, :2].float() for part in batch.groups]
    assert torch.equal(batch.ordered(ends), texts.ids(chosen)[:, :2].float())


def test_split_is_by_image_and_seeded() -> None:
    pairs = PairSet(tuple(Path(f"{n}") for n in range(10)), ("even", "odd"), tuple((n % 2,) for n in range(10)))
    annotations = Annotations(pairs, ((),) * 10)
    train, val = (part.pairs for part in split_pairs(annotations, 0.2, seed=1))
    assert (len(train.paths), len(val.paths)) == (8, 2)
    assert set(train.paths) | set(val.paths) == set(pairs.paths)
    assert all(
        val.captions[val.of_image[n][0]] == ("even", "odd")[int(path.name) % 2] for n, path in enumerate(val.paths)
    )
    assert split_pairs(annotations, 0.2, seed=1)[1].pairs == val
    assert split_pairs(annotations, 0.2, seed=2)[1].pairs != val
    with pytest.raises(ClipretError, match="val_split"):
        split_pairs(annotations, 0.01, seed=1)
    with pytest.raises(ClipretError, match=r"one image and none to hold out for validation: pass another .* --val"):
        split_pairs(annotations.subset([0]), 0.1, seed=1)


@pytest.mark.parametrize("cache_limit", [0, 1 << 30])
def test_images_equal_the_search_s_and_bad_ones_are_skipped(colour_folder: Path, cache_limit: int) -> None:
    paths = [colour_folder / "red" / "0.jpg", colour_folder / "bad.jpg", colour_folder / "blue" / "1.jpeg"]
    paths[1].write_bytes(b"not an image")
    images = ImageReader(listed(*paths), SPEC, threads=2, cache_limit=cache_limit)
    batches = list(images.batches([2, 1, 0], batch_size=8))
    assert [chosen for chosen, _ in batches] == [[2, 0]]
    assert np.array_equal(batches[0][1].numpy(), np.stack([load(paths[2], SPEC), load(paths[0], SPEC)]))
    assert list(images.skipped) == [1]
    assert "bad.jpg: not an image" in images.example()


def test_streamed_batches_are_the_cached_ones(colour_folder: Path) -> None:
    paths = sorted(path for path in colour_folder.rglob("*") if path.is_file())
    order = list(range(len(paths)))[::-1]
    cached = list(ImageReader(listed(*paths), SPEC, threads=1, cache_limit=1 << 30).batches(order, 5))
    streamed = list(ImageReader(listed(*paths), SPEC, threads=3, cache_limit=0).batches(order, 5))
    assert [len(chosen) for chosen, _ in cached] == [5, 5, 2]
    for (a, x), (b, y) in zip(cached, streamed, strict=True):
        assert a == b
        assert torch.equal(x, y)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_resizing_is_pillows_bilinear() -> None:
    pixels = torch.randint(0, 256, (2, 40, 40, 3), generator=generator(), dtype=torch.uint8)
    small = Augmenter("none", 24, 1.0, 0.0)(pixels, generator())  # [B,3,24,24]
    for image, result in zip(pixels, small, strict=True):
        image = Image.fromarray(image.numpy()).resize((24, 24), Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        assert (result * 255 - expected).abs().max() <= 1.5  # Pillow rounds after each of its two passes


@pytest.mark.parametrize("kind", ["photo", "surveillance"])
def test_augmentation_is_decided_by_its_generator(kind: Augment) -> None:
    pixels = torch.randint(0, 256, (4, 20, 20, 3), generator=generator(), dtype=torch.uint8)
    augment = Augmenter(kind, 16, 0.35, 0.3)
    first = augment(pixels, generator(1))
    assert first.shape == (4, 3, 16, 16)
    assert 0 <= float(first.min()) < float(first.max()) <= 1
    assert torch.equal(first, augment(pixels, generator(1)))
    assert not torch.equal(first, augment(pixels, generator(2)))


def test_crops_keep_channels_and_differ_between_images() -> None:
    left_red = torch.zeros(64, 20, 20, 3, dtype=torch.uint8)
    left_red[:, :, :10, 0] = 255
    x = Augmenter("photo", 10, 0.5, 0.0)(left_red, generator())
    assert float(x[:, 1:].max()) < 1e-6  # red stays red
    red_on_the_left = x[:, 0, :, :3].mean(dim=(1, 2)) > x[:, 0, :, -3:].mean(dim=(1, 2))
    assert 10 < int(red_on_the_left.sum()) < 54  # half of them are flipped
    assert len({round(float(v), 4) for v in x.mean(dim=(1, 2, 3))}) > 32


def test_captions_of_a_fixed_length_go_in_parts_where_a_batch_does() -> None:
    pairs = PairSet((Path("a"),), ("red", "blue", "a red car"), ((0, 1, 2),))
    loaded = load_model("clipret-small", captions=pairs.captions * 20)
    fixed = dataclasses.replace(loaded, text=msgspec.structs.replace(loaded.text, pad_to="context"))
    texts = Texts(fixed, Annotations(pairs, ((),)))
    batch = texts.batch(torch.tensor([2, 0, 1]), 2)
    assert [len(part) for part in batch.groups] == [2, 1]
    assert torch.equal(batch.ordered(batch.groups), texts.ids(torch.tensor([2, 0, 1])))


def test_larger_images_make_sharper_crops(tmp_path: Path) -> None:
    """A crop out of an image of the model's own size has fewer details than the model will see."""
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    Image.fromarray(np.repeat(checks[:, :, None], 3, axis=2).astype(np.uint8)).save(tmp_path / "checks.png")
    contrast = []
    for scale in (1, 2):
        images = ImageReader(
            listed(tmp_path / "checks.png"), ImageSpec(32 * scale), threads=1, cache_limit=1 << 20, fast=True
        )
        (_, pixels), *_ = images.batches([0], 1)
        contrast.append(float(Augmenter("photo", 32, 0.25, 0.0)(pixels, generator(3)).std()))
    assert contrast[1] > 2 * contrast[0]
