from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipret.bundle import ImageSpec
from clipret.errors import ClipretError
from clipret.images import load
from clipret.pairs import PairSet, read_pairs
from clipret.training.augment import Augment, Augmenter
from clipret.training.data import Pictures, positives, split_pairs

SPEC = ImageSpec(size=16)
ROWS = [
    ("red/0.jpg", "a red picture"),
    ("red/0.jpg", "crimson"),
    ("red/1.jpeg", "a red picture"),
    ("blue/0.jpg", 'a "blue" one, quoted'),
]


def write_list(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("path\ttitle\n" + "".join(f"{name}\t{title}\n" for name, title in rows), encoding="utf-8")
    return path


def test_rows_are_grouped_by_picture_and_by_title(tmp_path: Path) -> None:
    pairs = read_pairs(write_list(tmp_path / "list.tsv", ROWS), image_root=Path("root"))
    assert pairs.paths == (Path("root/red/0.jpg"), Path("root/red/1.jpeg"), Path("root/blue/0.jpg"))
    assert pairs.titles == ("a red picture", "crimson", 'a "blue" one, quoted')
    assert pairs.of_picture == ((0, 1), (0,), (2,))
    assert pairs.of_title() == [[0, 1], [0], [2]]


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
    assert (pairs.paths, pairs.titles) == ((tmp_path / "a.jpg",), ("red, and round",))


def test_an_empty_title_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match=r"empty title \(b\.jpg\)"):
        read_pairs(write_list(tmp_path / "list.tsv", [("a.jpg", "a"), ("b.jpg", " ")]))


def test_positives_are_many_to_many() -> None:
    pairs = PairSet((Path("a"), Path("b"), Path("c")), ("x", "y", "z"), ((0, 1), (0,), (2,)))
    of_picture = [torch.tensor(titles) for titles in pairs.of_picture]
    expected = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(positives(of_picture, torch.tensor([0, 1, 2, 0]))[:, :3], expected[:, :3])
    assert positives(of_picture, torch.tensor([0, 1, 2, 0]))[1].tolist() == [True, False, False, True]


def test_split_is_by_picture_and_seeded() -> None:
    pairs = PairSet(tuple(Path(f"{n}") for n in range(10)), ("even", "odd"), tuple((n % 2,) for n in range(10)))
    train, val = split_pairs(pairs, 0.2, seed=1)
    assert (len(train.paths), len(val.paths)) == (8, 2)
    assert set(train.paths) | set(val.paths) == set(pairs.paths)
    assert all(
        val.titles[val.of_picture[n][0]] == ("even", "odd")[int(path.name) % 2] for n, path in enumerate(val.paths)
    )
    assert split_pairs(pairs, 0.2, seed=1)[1] == val
    assert split_pairs(pairs, 0.2, seed=2)[1] != val
    with pytest.raises(ClipretError, match="--val-split"):
        split_pairs(pairs, 0.01, seed=1)


@pytest.mark.parametrize("cache_limit", [0, 1 << 30])
def test_pictures_equal_the_search_s_and_bad_ones_are_skipped(colour_folder: Path, cache_limit: int) -> None:
    paths = [colour_folder / "red" / "0.jpg", colour_folder / "bad.jpg", colour_folder / "blue" / "1.jpeg"]
    paths[1].write_bytes(b"not a picture")
    pictures = Pictures(paths, SPEC, threads=2, cache_limit=cache_limit)
    batches = list(pictures.batches([2, 1, 0], batch_size=8))
    assert [chosen for chosen, _ in batches] == [[2, 0]]
    assert np.array_equal(batches[0][1].numpy(), np.stack([load(paths[2], SPEC), load(paths[0], SPEC)]))
    assert list(pictures.skipped) == [1]
    assert "bad.jpg: not a picture" in pictures.example()


def test_streamed_batches_are_the_cached_ones(colour_folder: Path) -> None:
    paths = sorted(path for path in colour_folder.rglob("*") if path.is_file())
    order = list(range(len(paths)))[::-1]
    cached = list(Pictures(paths, SPEC, threads=1, cache_limit=1 << 30).batches(order, 5))
    streamed = list(Pictures(paths, SPEC, threads=3, cache_limit=0).batches(order, 5))
    assert [len(chosen) for chosen, _ in cached] == [5, 5, 2]
    for (a, x), (b, y) in zip(cached, streamed, strict=True):
        assert a == b
        assert torch.equal(x, y)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_resizing_is_pillows_bilinear() -> None:
    pixels = torch.randint(0, 256, (2, 40, 40, 3), generator=generator(), dtype=torch.uint8)
    small = Augmenter("none", 24, 1.0, 0.0)(pixels, generator())  # [B,3,24,24]
    for picture, result in zip(pixels, small, strict=True):
        image = Image.fromarray(picture.numpy()).resize((24, 24), Image.Resampling.BILINEAR)
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


def test_crops_keep_channels_and_differ_between_pictures() -> None:
    left_red = torch.zeros(64, 20, 20, 3, dtype=torch.uint8)
    left_red[:, :, :10, 0] = 255
    x = Augmenter("photo", 10, 0.5, 0.0)(left_red, generator())
    assert float(x[:, 1:].max()) < 1e-6  # red stays red
    red_on_the_left = x[:, 0, :, :3].mean(dim=(1, 2)) > x[:, 0, :, -3:].mean(dim=(1, 2))
    assert 10 < int(red_on_the_left.sum()) < 54  # half of them are mirrored
    assert len({round(float(v), 4) for v in x.mean(dim=(1, 2, 3))}) > 32
