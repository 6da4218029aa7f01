"""The searcher: what a query may be made of, and which rows it may find."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipret import Bundle, ClipretError, Encoder, EncoderConfig, Gallery, Searcher
from clipret.search.searcher import Part, Query


@pytest.fixture
def gallery(listed_gallery: Path) -> Path:
    return listed_gallery


@pytest.fixture
def searcher(gallery: Path, tiny_bundle: Path) -> Searcher:
    return Searcher(Gallery.open(gallery), Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu")))


def paths(hits: list) -> list[str]:
    return [hit.path for hit in hits]


def test_an_image_is_a_query(searcher: Searcher, colour_folder: Path) -> None:
    file = colour_folder / "green/1.jpeg"
    with Image.open(file) as image:
        asked = [file, file.read_bytes(), image, np.asarray(image)]
        found = searcher.search([Query((Part(image),)) for image in asked], 3)
    for hits in found:
        assert {hit.path.split("/")[0] for hit in hits} == {"green"}
        assert {hit.path: hit.score for hit in hits}["green/1.jpeg"] == pytest.approx(1, abs=2e-3)
    assert found[0] == found[1] == found[2] == found[3]


def test_parts_are_added_with_their_weights(searcher: Searcher, colour_folder: Path) -> None:
    text = searcher.embed(["red"])[0]
    image = searcher.embed([Query((Part(colour_folder / "blue/0.jpg"),))])[0]
    mixed = searcher.embed([Query((Part("red"), Part(colour_folder / "blue/0.jpg", 0.5)))])[0]
    expected = text + 0.5 * image
    np.testing.assert_allclose(mixed, expected / np.linalg.norm(expected), atol=1e-6)
    colours = [path.split("/")[0] for path in paths(searcher.search([Query((Part("red"), Part("blue")))], 6)[0])]
    assert set(colours) == {"red", "blue"}


def test_a_negative_part_pushes_away(searcher: Searcher) -> None:
    plain, without = searcher.search(["red blue", Query((Part("red blue"), Part("red", -1)))], 3)
    assert {path.split("/")[0] for path in paths(without)} == {"blue"}
    assert paths(plain) != paths(without)


def test_a_query_that_points_nowhere_is_an_error(searcher: Searcher) -> None:
    with pytest.raises(ClipretError, match=r"\+1 x 'red' -1 x 'red' has parts that cancel out"):
        searcher.search([Query((Part("red"), Part("red", -1)))])
    with pytest.raises(ClipretError, match="without parts"):
        searcher.search([Query(())])


def test_bad_queries_are_errors(searcher: Searcher, tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match="blank"):
        searcher.search(["red", " "])
    (tmp_path / "half.jpg").write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(ClipretError, match=r"half\.jpg cannot be a query: "):
        searcher.search([Query((Part(tmp_path / "half.jpg"),))])


def test_templates_are_averaged_as_unit_rows(gallery: Path, tiny_bundle: Path) -> None:
    encoder = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu"))
    searcher = Searcher(Gallery.open(gallery), encoder, templates=["a {} car", "the colour {}"])
    rows = encoder.encode_texts(["a red car", "the colour red"]).astype(np.float64)
    mean = rows.mean(axis=0)
    np.testing.assert_allclose(searcher.embed(["red"])[0], mean / np.linalg.norm(mean), atol=1e-6)
    with pytest.raises(ClipretError, match=r"template 'a car' has no \{\}"):
        Searcher(Gallery.open(gallery), encoder, templates=["a car"])


def test_a_text_is_embedded_once(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = searcher.encoder.encode_texts

    def counted(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return original(texts)

    monkeypatch.setattr(searcher.encoder, "encode_texts", counted)
    first = searcher.search(["red", "green", "red"], 2)
    again = searcher.search(["green", "blue", Query((Part("red"), Part("green")))], 2)
    assert asked == ["red", "green", "blue"]
    assert first[0] == first[2]
    assert first[1] == again[0]


def test_a_text_needs_no_image_tower(gallery: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "image.onnx").unlink()
    searcher = Searcher(Gallery.open(gallery), Encoder(Bundle.open(bundle), EncoderConfig(device="cpu")))
    assert len(searcher.search(["red"], 3)[0]) == 3


def test_filters_ids_and_scores_narrow_what_is_found(searcher: Searcher) -> None:
    everything = searcher.search(["red"], 12)[0]
    some = searcher.search(["red"], 12, where="colour <> 'red' and number < 2")[0]
    assert paths(some) == [hit.path for hit in everything if not hit.path.startswith("red") and "2.png" not in hit.path]
    assert [hit.rank for hit in some] == list(range(1, 7))
    unwanted = [everything[0].id, everything[2].id]
    rest = searcher.search(["red"], 3, exclude=unwanted)[0]
    assert paths(rest) == [everything[1].path, everything[3].path, everything[4].path]
    good = searcher.search(["red"], 12, min_score=everything[4].score)[0]
    assert paths(good) == paths(everything[:5])
    assert searcher.search(["red"], 3, where="colour = 'pink'") == [[]]
    with pytest.raises(ClipretError, match="colour, number"):
        searcher.search(["red"], where="color = 'red'")


def test_a_resident_searcher_finds_the_same(gallery: Path, searcher: Searcher) -> None:
    resident = Searcher(Gallery.open(gallery), searcher.encoder, resident=True)
    assert resident.search(["red", "blue grey"], 12) == searcher.search(["red", "blue grey"], 12)
