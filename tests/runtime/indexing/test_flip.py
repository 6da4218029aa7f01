"""Flip averaging: the mean of an image and its horizontal flip, kept up to date like any gallery."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from clipret import Bundle, Encoder, EncoderConfig, Gallery
from clipret.cli import main


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="clipret-search")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two-coloured squares, left and right, with a column of metadata."""
    (tmp_path / "images").mkdir()
    lines = ["path,number"]
    for number, (left, right) in enumerate([("red", "blue"), ("green", "green"), ("white", "red")]):
        image = Image.new("RGB", (16, 16), left)
        image.paste(right, (8, 0, 16, 16))
        image.save(tmp_path / f"images/{number}.png")
        lines.append(f"{number}.png,{number}")
    (tmp_path / "images/images.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "images/images.csv"


def embeddings_of(path: Path) -> dict[str, np.ndarray]:
    with Gallery.open(path) as opened:
        stored = opened.read()
        embeddings = np.concatenate(stored.shards).astype(np.float64)
        live = np.ones(len(embeddings), bool) if stored.live is None else stored.live
        return dict(zip(opened.paths(stored.ids[live]), embeddings[live], strict=True))


class _LeftHalf:
    """A tower that tells left from right, which the tiny bundle's does not: it sees the left half of an image."""

    lanes = 1
    name = "left half"

    def __init__(self, tower: object) -> None:
        self._tower = tower

    def run(self, batch: np.ndarray) -> np.ndarray:
        left = batch[:, :, : batch.shape[2] // 2]
        return self._tower.run(np.ascontiguousarray(np.concatenate([left, left], axis=2)))  # type: ignore[attr-defined]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_an_embedding_is_the_unit_mean_of_both(tiny_bundle: Path, images: Path, batch_size: int) -> None:
    encoder = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu", batch_size=batch_size))
    solid = {
        colour: next(encoder.encode_images([Image.new("RGB", (16, 16), colour)])).embeddings[0]
        for colour in ("red", "green", "blue", "white")
    }
    encoder.image_towers[0] = _LeftHalf(encoder.image_tower)
    files = [images.with_name(f"{number}.png") for number in range(3)]
    found = np.concatenate([batch.embeddings for batch in encoder.encode_images(files, flip=True)])
    for row, (left, right) in zip(found, [("red", "blue"), ("green", "green"), ("white", "red")], strict=True):
        mean = solid[left] + solid[right]
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


def test_a_gallery_remembers_it_and_is_kept_up_to_date(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    flipped, encoder = tmp_path / "flipped", Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu"))
    run("index", tiny_bundle, images, flipped, "--flip")
    with Gallery.open(flipped) as opened:
        assert opened.info.flipped
        assert [one["number"] for one in opened.metadata(opened.select("number > 0"))] == [1, 2]

    def expected() -> np.ndarray:
        files = [images.with_name(f"{number}.png") for number in range(3)]
        return np.concatenate([batch.embeddings for batch in encoder.encode_images(files, flip=True)])

    np.testing.assert_allclose([embeddings_of(flipped)[f"{number}.png"] for number in range(3)], expected(), atol=1e-3)
    # Without --flip as well: embeddings of two kinds in one gallery would be compared with each other.
    image = Image.new("RGB", (16, 16), "blue")
    image.paste("white", (8, 0, 16, 16))
    image.save(images.with_name("1.png"))
    assert "1 changed" in run("index", tiny_bundle, images, flipped).stdout
    np.testing.assert_allclose([embeddings_of(flipped)[f"{number}.png"] for number in range(3)], expected(), atol=1e-3)
    run("index", tiny_bundle, images, tmp_path / "plain")
    refused = run("index", tiny_bundle, images, tmp_path / "plain", "--flip", code=1).stderr
    assert "was made without --flip" in refused
