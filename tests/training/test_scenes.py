import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipret.errors import ClipretError
from clipret.training.scenes import Scene, captions, draw, write_set
from clipret.training.scenes.camera import degrade
from clipret.training.scenes.scene import COLORS, TYPES
from clipret.training.scenes.words import query


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_a_seed_gives_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    for name, seed, workers in [("a", 5, 1), ("b", 5, 2), ("c", 6, 1)]:
        write_set(tmp_path / name, count=12, style="surveillance", seed=seed, workers=workers)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert not {a[name] for name in a if name.endswith(".jpg")} & set(c.values())


def test_captions_are_true_and_queries_have_all_their_answers(tmp_path: Path) -> None:
    write_set(tmp_path / "set", count=170, style="web", seed=1)
    listed = rows(tmp_path / "set/captions.csv")
    assert {row["path"] for row in listed} == {f"images/{n:06d}.jpg" for n in range(170)}
    for row in listed:
        assert (tmp_path / "set" / row["path"]).is_file()
        if row["kind"] == "vehicle" and row["lang"] == "en":
            words = row["title"].lower().replace(",", "").split()
            named = (set(words) & set(COLORS)) - ({"grey"} if "on a grey day" in row["title"] else set())
            assert named <= {row["color"]}, row
            assert {kind.lower() for kind in TYPES} & set(words) <= {row["type"].lower()}, row
    vehicles = {row["path"]: (row["color"], row["type"]) for row in listed if row["kind"] == "vehicle"}
    assert set(vehicles.values()) == {(color, kind) for color in COLORS for kind in TYPES}
    asked = rows(tmp_path / "set/queries.csv")
    for lang in ("en", "zh"):
        answers = [(row["path"], (row["color"], row["type"])) for row in asked if row["lang"] == lang]
        assert sorted(answers) == sorted(vehicles.items())
        assert all(row["title"] == query(row["color"], row["type"], lang) for row in asked if row["lang"] == lang)


def test_queries_are_grammatical() -> None:
    assert query("red", "Sedan", "en") == "a red sedan"
    assert query("orange", "SUV", "en") == "an orange SUV"
    assert query("yellow", "Truck", "zh") == "一辆黄色的卡车"


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("kind", TYPES)
def test_the_body_has_its_colour(color: str, kind: str) -> None:
    """By day, the mean of all pixels that depend on the colour is closer to its name than to any other."""

    def drawn(name: str) -> np.ndarray:
        scene = Scene("vehicle", name, kind, None, "street", "day", mirrored=False)
        return np.asarray(draw(scene, np.random.default_rng(4), "web")).astype(int)

    one, other = drawn(color), drawn("red" if color != "red" else "blue")
    body = one[(one != other).any(axis=2)]
    assert len(body) > 0.03 * one.size / 3
    distances = ((body.mean(axis=0) - np.array(list(COLORS.values()))) ** 2).sum(axis=1)
    assert list(COLORS)[int(distances.argmin())] == color


def test_captions_differ_and_people_have_some() -> None:
    rng = np.random.default_rng(0)
    for n in range(40):
        scene = Scene.pedestrian(rng) if n % 2 else Scene.vehicle(rng, n)
        for lang in ("en", "zh"):
            texts = captions(scene, rng, lang, 3)
            assert len(set(texts)) == 3
            assert all(text == text.strip() and "  " not in text and "{" not in text for text in texts)


def test_camera_strength() -> None:
    rng = np.random.default_rng(0)
    clean = draw(Scene.vehicle(rng, 30), rng, "web")

    def change(strength: float) -> float:
        changed = [degrade(clean, np.random.default_rng(n), strength).resize(clean.size) for n in range(5)]
        return float(np.mean([np.abs(np.asarray(image, int) - np.asarray(clean, int)).mean() for image in changed]))

    assert change(0.0) < 4 < change(0.5) < change(1.0)


def test_surveillance_crops_have_odd_shapes() -> None:
    ratios = []
    for n in range(40):
        rng = np.random.default_rng(n)
        scene = Scene.pedestrian(rng) if n % 4 == 0 else Scene.vehicle(rng, n)
        image: Image.Image = draw(scene, rng, "surveillance")
        ratios.append(image.width / image.height)
    assert min(ratios) < 0.6
    assert max(ratios) > 2.2


def test_a_folder_in_use_is_refused_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.doc").touch()
    with pytest.raises(ClipretError, match="is not empty"):
        write_set(tmp_path / "full", count=1, style="web", seed=0)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clipret.training.scenes.write._answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_set(tmp_path / "new", count=2, style="web", seed=0)
    assert [file.name for file in tmp_path.iterdir()] == ["full"]
