import csv
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipret.errors import ClipretError
from clipret_training.synthetic import Scene, Style, captions, draw, write_set
from clipret_training.synthetic.camera import degrade
from clipret_training.synthetic.scene import COLORS, LIGHTS, PLACES, TYPES, Person
from clipret_training.synthetic.words import _COLORS_ZH, _TYPES_ZH, LANGS, PERSON_QUERIES, query


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """83 scenes: 67 vehicles, so each of the 66 pairs and one twice, and 16 people."""
    out = tmp_path_factory.mktemp("scenes") / "set"
    write_set(out, count=83, style="surveillance", seed=1)
    return out


def test_a_seed_gives_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    sets: list[tuple[str, Style, int, int]] = [
        ("a", "surveillance", 5, 1), ("b", "surveillance", 5, 2), ("c", "surveillance", 6, 1), ("d", "web", 5, 1),
    ]  # fmt: skip
    for name, style, seed, workers in sets:
        write_set(tmp_path / name, count=10, style=style, seed=seed, workers=workers)
    a, b, c, d = (digests(tmp_path / name) for name, *_ in sets)
    assert a == b
    assert a.keys() == c.keys() == d.keys()
    images = [digest for each in (a, c, d) for name, digest in each.items() if name.endswith(".jpg")]
    assert len(set(images)) == 30


def test_captions_and_queries_agree(drawn: Path) -> None:
    listed = rows(drawn / "captions.csv")
    assert list(listed[0]) == ["path", "lang", "caption", "kind", "color", "type"]
    assert {row["path"] for row in listed} == {str(file.relative_to(drawn)) for file in drawn.glob("images/*.jpg")}
    assert len(listed) == 83 * 6
    assert sum(row["kind"] == "person" for row in listed) == 16 * 6

    vehicles = {row["path"]: (row["color"], row["type"]) for row in listed if row["kind"] == "vehicle"}
    assert set(vehicles.values()) == {(color, kind) for color in COLORS for kind in TYPES}
    asked = rows(drawn / "queries.csv")
    for lang in LANGS:
        answers = [row for row in asked if row["lang"] == lang]
        assert sorted((row["path"], (row["color"], row["type"])) for row in answers) == sorted(vehicles.items())
        assert all(row["caption"] == query(row["color"], row["type"], lang) for row in answers)

    about_people = rows(drawn / "person_queries.csv")
    assert list(about_people[0]) == ["caption", "path", "lang"]
    assert not {row["path"] for row in about_people} & set(vehicles)
    assert len(about_people) == len({tuple(row.values()) for row in about_people})


@pytest.mark.parametrize("number", range(66))
def test_captions_of_vehicles_are_true(number: int) -> None:
    rng = np.random.default_rng(number)
    scene = Scene.vehicle(rng, number)
    for text in captions(scene, rng, "en", 4):
        words = set(text.lower().split())
        assert words & set(COLORS) <= {scene.color}
        assert words & {kind.lower() for kind in TYPES} <= {scene.type.lower()}
        assert words & {"side", "front", "rear"} <= {scene.view}
        assert words & {"night", "dusk", "overcast"} <= {scene.light}
    for text in captions(scene, rng, "zh", 4):
        assert {name for name, word in _COLORS_ZH.items() if word in text} <= {scene.color}
        assert {kind for kind, names in _TYPES_ZH.items() if any(word in text for word in names)} <= {scene.type}
    for lang in LANGS:
        color, kind = (scene.color, scene.type.lower()) if lang == "en" else (_COLORS_ZH[scene.color], "")
        first = captions(scene, rng, lang, 1)[0]
        assert color in first
        assert kind in first.lower()


@pytest.mark.parametrize("seed", range(40))
def test_captions_of_people_are_true(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = Scene.pedestrian(rng)
    person = scene.person
    assert person is not None
    for text in captions(scene, rng, "en", 4):
        words = text.replace(",", "").split()
        assert set(words) & set(COLORS) <= {person.upper, person.lower}
        assert ("woman" in words or "girl" in words) == person.female
        assert ("hat" in words) <= person.hat
        assert ("glasses" in words) <= (person.glasses and person.view != "back")
        assert ("behind" in words) <= (person.view == "back")
        assert ("striped" in words) <= (person.pattern == "stripes")
    for text in captions(scene, rng, "zh", 4):
        assert {name for name, word in _COLORS_ZH.items() if word in text} <= {person.upper, person.lower}


@pytest.mark.parametrize("lang", LANGS)
def test_captions_differ_and_are_whole(lang: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        texts = captions(Scene.sample(rng), rng, "en" if lang == "en" else "zh", 3)
        assert len(set(texts)) == 3
        for text in texts:
            assert text == text.strip()
            assert not any(
                flaw in text for flaw in ("  ", "{", "}", " ,", "、的", "None", "a orange", "a SUV", "a MPV")
            )


def test_captions_end_where_there_is_no_more_to_say() -> None:
    plain = Scene(
        "person", person=Person(female=True, age="adult", view="front", upper="red", lower="blue", garment="coat")
    )
    for lang in LANGS:
        assert len(set(captions(plain, np.random.default_rng(0), lang, 4))) == 4
        with pytest.raises(ClipretError, match="use 4 at most"):
            captions(plain, np.random.default_rng(0), lang, 5)


def test_queries_are_grammatical() -> None:
    assert query("red", "Sedan", "en") == "a red sedan"
    assert query("orange", "SUV", "en") == "an orange SUV"
    assert query("red", "Sedan", "zh") == "一辆红色的轿车"
    person = Person(female=True, age="adult", view="back", upper="orange", lower="blue", bag="backpack")
    assert [english for english, _, answers in PERSON_QUERIES if answers(person)] == [
        "a person in an orange top", "a woman with a backpack", "a person seen from behind",
    ]  # fmt: skip


def test_samples_cover_the_vocabulary_in_the_right_shares() -> None:
    rng = np.random.default_rng(0)
    scenes = [Scene.sample(rng) for _ in range(1000)]
    assert 150 < sum(scene.kind == "person" for scene in scenes) < 250
    assert {scene.place for scene in scenes} == set(PLACES)
    assert {scene.light for scene in scenes} == set(LIGHTS)
    assert len({(scene.color, scene.type) for scene in scenes if scene.kind == "vehicle"}) == 66


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize(
    ("kind", "view", "light"),
    [
        ("Sedan", "side", "day"),
        ("Microbus", "front", "overcast"),
        ("Bus", "side", "dusk"),
        ("SUV", "rear", "dusk"),
        ("Minivan", "side", "night"),
        ("Truck", "rear", "night"),
    ],
)
def test_the_body_has_its_colour(color: str, kind: str, view: str, light: str) -> None:
    """The mean of all pixels that depend on the colour is closer to its name than to any other, in any light.

    Brightness counts half: shade and dusk change it, and it is not what tells pink from white.
    """

    def pixels(name: str) -> np.ndarray:
        scene = Scene("vehicle", name, kind, view, None, "street", light)
        return np.asarray(draw(scene, np.random.default_rng(4), "web")).astype(int)

    one, other = pixels(color), pixels("red" if color != "red" else "blue")
    body = one[np.abs(one - other).max(axis=2) > 20]
    assert len(body) > 0.05 * one.size / 3
    away = body.mean(axis=0) - np.array(list(COLORS.values()))
    distances = np.linalg.norm(away - 0.5 * away.mean(axis=1, keepdims=True), axis=1)
    assert list(COLORS)[int(distances.argmin())] == color


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("female", False), ("age", "child"), ("age", "elder"), ("upper", "green"), ("lower", "white"), ("hat", True),
        ("glasses", True), ("bag", "backpack"), ("bag", "hand bag"), ("bag", "shoulder bag"), ("sleeves", "short"),
        ("pattern", "stripes"), ("pattern", "plaid"), ("pattern", "logo"), ("garment", "skirt"), ("garment", "dress"),
        ("garment", "coat"), ("view", "side"), ("view", "back"),
    ],
)  # fmt: skip
def test_every_attribute_of_a_person_is_to_be_seen(attribute: str, value: object) -> None:
    given = {"female": True, "age": "adult", "view": "front", "upper": "red", "lower": "blue"}
    changed: dict[str, object] = {**given, attribute: value}
    one, other = (
        draw(Scene("person", person=Person(**fields)), np.random.default_rng(1), "web")  # type: ignore[arg-type]
        for fields in (given, changed)
    )
    difference = np.abs(np.asarray(one, int) - np.asarray(other, int)).max(axis=2)
    assert (difference > 25).sum() > 20


def test_camera_strength() -> None:
    rng = np.random.default_rng(0)
    clean = draw(Scene.vehicle(rng, 30), rng, "web")

    def change(strength: float) -> float:
        changed = [degrade(clean, np.random.default_rng(n), strength).resize(clean.size) for n in range(5)]
        return float(np.mean([np.abs(np.asarray(image, int) - np.asarray(clean, int)).mean() for image in changed]))

    assert change(0.0) < 4 < change(0.5) < change(1.0)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (200, 10)])
def test_camera_takes_any_size(size: tuple[int, int]) -> None:
    for seed in range(12):
        image = degrade(Image.new("RGB", size, (200, 30, 30)), np.random.default_rng(seed))
        assert image.mode == "RGB"
        assert image.width <= size[0]
        assert image.height <= size[1]


def test_surveillance_crops_have_odd_shapes(drawn: Path) -> None:
    ratios = []
    for file in drawn.glob("images/*.jpg"):
        with Image.open(file) as image:
            ratios.append(image.width / image.height)
    assert 0.3 < min(ratios) < 0.6
    assert 2.2 < max(ratios) < 3.2


def test_a_folder_in_use_is_refused_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.doc").touch()
    with pytest.raises(ClipretError, match="is not empty"):
        write_set(tmp_path / "full", count=1, style="web", seed=0)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clipret_training.synthetic.write._answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_set(tmp_path / "new", count=2, style="web", seed=0)
    assert [file.name for file in tmp_path.iterdir()] == ["full"]


def test_scenes_need_no_torch() -> None:
    code = "import sys; import clipret_training.synthetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
