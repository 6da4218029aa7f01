"""Flip averaging: the mean of a picture and its mirror image, resumed and kept up to date."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from clipret import Bundle, ClipretError, Encoder, EncoderConfig, Gallery
from clipret.cli import main
from clipret.indexing.flip import mirror_gallery


class Halves(Encoder):
    """An encoder that tells left from right, which the tiny bundle's does not: its row is the left half's."""

    def encode_images(self, items, read=None):  # type: ignore[no-untyped-def]
        def left(item: object) -> np.ndarray:
            pixels = np.asarray(Image.open(item)) if read is None else read(item)
            return np.ascontiguousarray(pixels[:, : pixels.shape[1] // 2])

        return super().encode_images(items, left)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="clipret-search")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def gallery(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Two-coloured squares, left and right, with a column of metadata."""
    (tmp_path / "pictures").mkdir()
    lines = ["path,number"]
    for number, (left, right) in enumerate([("red", "blue"), ("green", "green"), ("white", "red")]):
        image = Image.new("RGB", (16, 16), left)
        image.paste(right, (8, 0, 16, 16))
        image.save(tmp_path / f"pictures/{number}.png")
        lines.append(f"{number}.png,{number}")
    (tmp_path / "pictures/list.csv").write_text("\n".join(lines) + "\n")
    run("index", tiny_bundle, tmp_path / "pictures/list.csv", tmp_path / "gallery")
    return tmp_path / "gallery"


def rows(path: Path) -> dict[str, np.ndarray]:
    with Gallery.open(path) as opened:
        stored = opened.read()
        every = np.concatenate(stored.shards).astype(np.float64)
        live = np.ones(len(every), bool) if stored.live is None else stored.live
        return dict(zip(opened.paths(stored.ids[live]), every[live], strict=True))


def test_rows_are_unit_means_with_the_mirror_image(gallery: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    encoder = Halves(Bundle.open(tiny_bundle), EncoderConfig(device="cpu"))
    with Gallery.open(gallery) as opened:
        assert mirror_gallery(opened, tmp_path / "mirrored", encoder) == (3, [])
    own, made = rows(gallery), rows(tmp_path / "mirrored")
    assert list(made) == list(own)
    for name, right in (("0.png", "blue"), ("1.png", "green"), ("2.png", "red")):
        mirrored = next(Encoder(encoder.bundle).encode_images([Image.new("RGB", (16, 16), right)])).rows[0]
        mean = own[name] + mirrored
        np.testing.assert_allclose(made[name], mean / np.linalg.norm(mean), atol=1e-3)
    with Gallery.open(tmp_path / "mirrored") as opened:
        assert [one["number"] for one in opened.metadata(opened.select("number > 0"))] == [1, 2]


def test_it_goes_on_and_follows_the_gallery(
    gallery: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipret.indexing.flip._ROWS", 1)
    encoder, out = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu")), tmp_path / "mirrored"

    def two(starts):  # type: ignore[no-untyped-def]
        for number, start in enumerate(starts):
            if number == 2:
                raise KeyboardInterrupt
            yield start

    with Gallery.open(gallery) as opened, pytest.raises(KeyboardInterrupt):
        mirror_gallery(opened, out, encoder, two)
    assert list(rows(out)) == ["0.png", "1.png"]
    assert run("mirror", gallery, out).stdout == f"{out}: 1 pictures added, 0 skipped\n"
    assert run("mirror", gallery, out).stdout == f"{out}: 0 pictures added, 0 skipped\n"
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "pictures/1.png")
    result = run("mirror", gallery, tmp_path / "other")
    assert "1.png: it has changed since it was indexed" in result.stderr
    assert result.stdout.endswith("2 pictures added, 1 skipped\n")
    run("index", tiny_bundle, tmp_path / "pictures/list.csv", gallery)
    assert run("mirror", gallery, out).stdout.endswith("1 pictures added, 0 skipped\n")
    np.testing.assert_allclose(rows(out)["1.png"], rows(gallery)["1.png"], atol=1e-3)


def test_what_cannot_be_mirrored(gallery: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    encoder = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu"))
    Gallery.create(tmp_path / "elsewhere", encoder.bundle, tmp_path, mirrored=True).close()
    with Gallery.open(gallery) as opened, pytest.raises(ClipretError, match="holds pictures of"):
        mirror_gallery(opened, tmp_path / "elsewhere", encoder)
    plain = tmp_path / "plain"
    run("index", tiny_bundle, tmp_path / "pictures/list.csv", plain)
    assert "without their mirror images" in run("mirror", gallery, plain, code=1).stderr
    # Rows of two kinds in one gallery would be compared with each other.
    run("mirror", gallery, tmp_path / "mirrored")
    refused = run("index", tiny_bundle, tmp_path / "pictures/list.csv", tmp_path / "mirrored", code=1)
    assert "index the gallery that it was made from" in refused.stderr
    assert "is mirrored already" in run("mirror", tmp_path / "mirrored", tmp_path / "twice", code=1).stderr
    for file in (tmp_path / "pictures").glob("*.png"):
        file.unlink()
    assert "none of the 3 pictures" in run("mirror", gallery, tmp_path / "new", code=1).stderr
