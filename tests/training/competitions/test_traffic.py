"""The challenge's label lines: what each becomes, and every way in which one can be wrong, by its number."""

import csv
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clipret.competitions.completion import Vocabulary
from clipret_training.cli import main
from clipret_training.competitions.traffic import COLORS, PERSON_ATTRIBUTES, TYPES, Label, parse_labels, rows_of
from clipret_training.synthetic.challenge import attributes_of, write_challenge
from clipret_training.synthetic.scene import Person

WOMAN = "1,0,1,0,1,0,0,0,1,0,0,1,0,1,0,0,0,0,0,0,1"
MAN = "0,1,0,0,1,1,0,0,0,0,0,0,0,1,0,0,0,0,0,0,0"
GOOD = f"""v/1.jpg$white Audi.$A white Audi drives along the road.
v/2.jpg$Truck$This is a truck.
v/3.jpg$GREY Great  Wall$A grey Great Wall.
v/1.jpg$suv.$An SUV.
p/1.jpg${WOMAN}$A woman with glasses and a backpack.
p/2.jpg${MAN}$An elderly man.
"""


def write(folder: Path, text: str) -> Path:
    (folder / "label.txt").write_text(text, encoding="utf-8")
    return folder / "label.txt"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["data", "traffic", *map(str, arguments)], prog_name="clipret-train")
    assert result.exit_code == code, result.output
    return result


def test_each_kind_of_line(tmp_path: Path) -> None:
    labels, problems = parse_labels(write(tmp_path, "\ufeff" + GOOD.replace("\n", "\r\n") + "\n\n"))
    assert problems == []
    assert labels[0] == Label(
        1, "v/1.jpg", "A white Audi drives along the road.", "vehicle", color="white", brand="Audi"
    )
    assert labels[1] == Label(2, "v/2.jpg", "This is a truck.", "vehicle", type="Truck")
    assert (labels[2].color, labels[2].brand) == ("grey", "Great Wall")
    assert (labels[3].image, labels[3].type) == ("v/1.jpg", "SUV")
    assert labels[4].attributes == (
        "female", "age 18-60", "front", "glasses", "backpack", "short sleeve", "skirt or dress",
    )  # fmt: skip
    assert len(PERSON_ATTRIBUTES) == len(set(PERSON_ATTRIBUTES)) == 21


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a.jpg$Truck", "has 2 fields between $ signs"),
        ("a.jpg$Truck$costs $5", "has 4 fields"),
        ("", "has 1 fields"),
        ("$Truck$text", "has no image"),
        ("a.jpg$ $text", "has no attribute"),
        ("a.jpg$Truck$ ", "has no text"),
        ("a.jpg$silver Audi$text", "attribute 'silver Audi' is not a type (Bus, "),
        ("a.jpg$Lorry$text", "attribute 'Lorry' is not a type"),
        ("a.jpg$white$text", "is a colour without a brand"),
        ("a.jpg$white Audi SUV$text", "has 'SUV' in place of a brand"),
        ("a.jpg$white black Audi$text", "has 'black' in place of a brand"),
        (f"a.jpg${WOMAN},0$text", "has 22 values of a person, not 21"),
        (f"a.jpg${WOMAN[:-2]}$text", "has 20 values"),
        ("a.jpg$1$text", "has 1 values"),
        (f"a.jpg${WOMAN[:-1]}2$text", "value 21 (skirt or dress) is '2': it must be 0 or 1"),
        (f"a.jpg${WOMAN.replace('1,0,1', '1,,1', 1)}$text", "value 2 (age over 60) is ''"),
        ("v/2.jpg$Bus$A bus.", "v/2.jpg is Truck on line 2 and Bus here"),
        ("v/2.jpg$Truck$This is a truck.", "is the same as line 2"),
        (f"v/2.jpg${WOMAN}$A woman.", "v/2.jpg has a different attribute on line 2"),
        ("v/1.jpg$red Audi$A red Audi.", "v/1.jpg is white on line 1 and red here"),
    ],
)
def test_lines_that_are_none(line: str, reason: str, tmp_path: Path) -> None:
    labels, problems = parse_labels(write(tmp_path, GOOD + line + "\nv/9.jpg$Bus$A bus.\n"))
    assert [label.line for label in labels] == [1, 2, 3, 4, 5, 6, 8]
    assert [problem.line for problem in problems] == [7]
    assert reason in str(problems[0])
    result = run(tmp_path / "label.txt", tmp_path / "out", code=1)
    assert "line 7: " in result.stderr
    assert "1 of 8 lines have a fault and nothing was written" in result.stderr
    assert not (tmp_path / "out").exists()


def test_contradictions_are_found_among_all_lines_of_an_image(tmp_path: Path) -> None:
    text = "a$Bus$one\na$red Audi$two\na$blue Audi$three\na$red Audi$two\n"
    _, problems = parse_labels(write(tmp_path, text))
    assert [str(problem) for problem in problems] == [
        "line 3: a is red on line 2 and blue here: correct one of them",
        "line 4: is the same as line 2: remove it",
    ]


def test_the_command_writes_what_fit_reads(tmp_path: Path) -> None:
    labels = write(tmp_path, GOOD)
    for name in ("v/1.jpg", "v/2.jpg", "v/3.jpg", "p/1.jpg", "p/2.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    result = run(labels, tmp_path / "out", "--image-root", tmp_path / "images", "--val-share", 0)
    assert "vehicles by colour and brand" in result.stdout
    assert "unclear persons: {'front / side / back': 1}" in result.stderr
    with (tmp_path / "out/captions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "path": "v/1.jpg",
        "caption": "A white Audi drives along the road.",
        "kind": "vehicle",
        "color": "white",
        "brand": "Audi",
        "type": "",
        "attributes": "",
        "split": "train",
    }
    assert rows[4]["attributes"].split("; ")[:2] == ["female", "age 18-60"]
    vocabulary = Vocabulary.read(tmp_path / "out/vocabulary.json")
    assert list(vocabulary.slots) == ["color", "brand", "type"]
    assert vocabulary.slots["brand"] == ("Audi", "Great Wall")
    assert len(vocabulary.slots["color"]) == 11
    assert json.loads((tmp_path / "out/vocabulary.json").read_text())["persons"] == list(PERSON_ATTRIBUTES)
    counts = json.loads((tmp_path / "out/statistics.json").read_text())
    assert (counts["lines"], counts["images"], counts["persons"]) == (6, 5, 2)
    assert counts["type"] == {"Truck": 1, "SUV": 1}
    (tmp_path / "images/v/3.jpg").unlink()
    missing = run(labels, tmp_path / "out2", "--image-root", tmp_path / "images", code=1)
    assert "line 3: " in missing.stderr
    assert "has no image v/3.jpg" in missing.stderr


def test_lines_may_be_left_out_and_the_vocabulary_extended(tmp_path: Path) -> None:
    labels = write(tmp_path, GOOD + "a.jpg$silver Audi.$A silver Audi.\nb.jpg$silver audi$Another.\n")
    counts = json.loads(run(labels, tmp_path / "out", "--skip", "--json").stdout)
    assert (counts["lines"], counts["skipped"]) == (6, 2)
    value = json.loads((tmp_path / "out/vocabulary.json").read_text())
    value["slots"]["color"].append("silver")
    (tmp_path / "more.json").write_text(json.dumps(value | {"other": {"color": ["gold"]}}))
    result = run(labels, tmp_path / "more", "--vocabulary", tmp_path / "more.json")
    assert "brands spelt in several ways: ['Audi', 'audi']" in result.stderr
    again = json.loads((tmp_path / "more/vocabulary.json").read_text())
    assert again["slots"]["color"][-1] == "silver"
    assert again["slots"]["brand"] == ["Audi", "Great Wall", "audi"]
    assert again["other"] == {"color": ["gold"]}


def test_many_faults_are_counted(tmp_path: Path) -> None:
    result = run(write(tmp_path, "a$b$c\n" * 30), tmp_path / "out", "--skip", code=1)
    assert sum("label.txt line " in line for line in result.stderr.splitlines()) == 20
    assert "10 more lines have a fault" in result.stderr
    assert "no line without a fault" in result.stderr
    assert "is empty" in run(write(tmp_path, "\n \n"), tmp_path / "out", code=1).stderr
    (tmp_path / "label.txt").write_bytes(b"a$Truck$\xff\n")
    assert "is not UTF-8 (byte 8)" in run(tmp_path / "label.txt", tmp_path / "out", code=1).stderr
    assert "cannot be read" in run(tmp_path / "none.txt", tmp_path / "out", code=1).stderr


def test_held_out_images_stay_so_when_others_are_added() -> None:
    labels = [Label(n, f"{n}.jpg", "a bus", "vehicle", type="Bus") for n in range(2000)]
    first = {row["path"]: row["split"] for row in rows_of(labels[:1000], 0.2, 0)}
    then = {row["path"]: row["split"] for row in rows_of(labels, 0.2, 0)}
    assert first == {path: then[path] for path in first}
    assert 340 < list(then.values()).count("val") < 460
    assert first != {row["path"]: row["split"] for row in rows_of(labels[:1000], 0.2, 1)}


def test_what_a_drawn_person_s_label_says() -> None:
    girl = Person(
        True, "child", "back", "red", "blue", bag="backpack", sleeves="short", pattern="plaid", garment="skirt"
    )
    assert attributes_of(girl) == (
        "female", "age under 18", "back", "backpack", "short sleeve", "upper plaid", "skirt or dress",
    )  # fmt: skip
    man = Person(False, "elder", "front", "red", "blue", hat=True, glasses=True, garment="coat")
    assert attributes_of(man) == ("age over 60", "front", "hat", "glasses", "long sleeve", "long coat")


def test_drawn_files_are_the_challenge_s(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["data", "challenge", str(tmp_path / "a"), "--train", "90", "--test", "40", "--seed", "3"]
    )
    assert result.exit_code == 0, result.output
    labels, problems = parse_labels(tmp_path / "a/train_label.txt", images=tmp_path / "a/train_images")
    assert problems == []
    assert len(labels) == 90
    vehicles = [label for label in labels if label.kind == "vehicle"]
    assert len(vehicles) == 72
    # A line says one half, and its text no more than that; which half changes from one round of pairs to the next.
    assert {bool(label.color) for label in vehicles} == {True, False}
    for label in vehicles:
        assert bool(label.color) != bool(label.type)
        assert bool(label.color) == bool(set(re.findall(r"\w+", label.text.lower())) & set(COLORS))
        assert bool(label.type) == bool(set(re.findall(r"\w+", label.text)) & set(TYPES))
    with (tmp_path / "a/test_images.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    with (tmp_path / "a/test_queries.csv").open(newline="") as file:
        queries = list(csv.DictReader(file))
    assert [query["caption"] for query in queries] == (tmp_path / "a/test_text.txt").read_text().splitlines()
    assert len(images) == len(list((tmp_path / "a/test_images").iterdir())) == 40
    for query in queries:
        if query["kind"] == "vehicle":
            assert query["color"] in query["caption"].lower()
            assert query["type"] in query["caption"]
            assert any((one["color"], one["type"]) == (query["color"], query["type"]) for one in images)
        else:
            asked = set(query["attributes"].split("; "))
            assert asked <= set(PERSON_ATTRIBUTES)
            assert any(asked <= set(one["attributes"].split("; ")) for one in images)
    write_challenge(tmp_path / "b", train=90, test=40, seed=3, workers=2)
    for file in sorted((tmp_path / "a").rglob("*.*")):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
