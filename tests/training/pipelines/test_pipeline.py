"""Pipelines: what is done, what is kept, what is done again; and the two that clipret has, from raw files to
answers."""

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clipret.errors import ClipretError
from clipret_training.cli import main
from clipret_training.pipelines.pipeline import Pipeline, run_pipeline

STEPS = """# for tests
[values]
bundle = "{bundle}"
images = "{images}"
texts = "{folder}/texts.txt"
queries = ""
more = []

[[step]]
name = "index"
run = ["clipret-search", "index", "{{bundle}}", "{{images}}", "{{out}}/gallery"]
makes = "{{out}}/gallery"
keeps = true

[[step]]
name = "measure"
run = ["clipret-search", "eval", "{{out}}/gallery", "{{queries}}", "--image-root", "{{images}}", "--json"]
measures = true
needs = ["queries"]

[[step]]
name = "search"
run = ["clipret-search", "query", "{{out}}/gallery", "--texts", "{{texts}}", "--json", "{{more}}"]
into = "{{out}}/found.json"
makes = "{{out}}/found.json"

[[step]]
name = "measure found"
run = ["clipret-search", "eval", "{{out}}/gallery", "{{queries}}", "--image-root", "{{images}}", "--json", "--wrong"]
measures = true
needs = ["queries", "more"]
"""


@pytest.fixture
def recipe(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> Path:
    text = STEPS.format(bundle=tiny_bundle, images=colour_folder, folder=tmp_path)
    (tmp_path / "recipe.toml").write_text(text)
    (tmp_path / "texts.txt").write_text("red\nblue\n")
    (tmp_path / "queries.csv").write_text("caption,path\nred,red/0.jpg\nblue,red/1.jpeg\n")
    return tmp_path / "recipe.toml"


def states(recipe: Path, out: Path, **given: str) -> dict[str, str]:
    """The last state that each step reported."""
    seen: dict[str, str] = {}
    run_pipeline(Pipeline.read(str(recipe), given), out, lambda name, state: seen.update({name: state}))
    return seen


def test_only_what_changes_is_done_anew(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert states(recipe, out) == {"index": "done", "search": "done"}
    found = (out / "found.json").read_text()
    assert [entry["query"] for entry in json.loads(found)] == ["red", "blue"]
    assert states(recipe, out) == {"index": "kept", "search": "kept"}
    # A measurement in between changes nothing that others read.
    queries = str(tmp_path / "queries.csv")
    assert states(recipe, out, queries=queries) == {"index": "kept", "measure": "done", "search": "kept"}
    # Nor does another value of a later step.
    assert states(recipe, out, more='["-k", "3"]') == {"index": "kept", "search": "done"}
    assert len(json.loads((out / "found.json").read_text())[0]["hits"]) == 3
    assert states(recipe, out) == {"index": "kept", "search": "done"}
    assert (out / "found.json").read_text() == found
    (tmp_path / "texts.txt").write_text("red\nblue\ngreen\n")
    assert states(recipe, out) == {"index": "kept", "search": "done"}
    text = recipe.read_text().replace('"{out}/gallery"]', '"{out}/gallery", "--encoder", "batch_size=5"]')
    recipe.write_text(text)
    assert states(recipe, out) == {"index": "done", "search": "done"}


def test_a_step_that_fails_keeps_what_was_done(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    queries = str(tmp_path / "queries.csv")
    with pytest.raises(ClipretError, match="step 'measure found' ended with status 2"):
        states(recipe, out, queries=queries, more='["-k", "2"]')
    assert not json.loads((out / "steps.json").read_text())["measure found"]["done"]
    recipe.write_text(recipe.read_text().replace(', "--wrong"]', "]"))
    assert states(recipe, out, queries=queries, more='["-k", "2"]') == {
        "index": "kept",
        "measure": "kept",
        "search": "kept",
        "measure found": "done",
    }
    (out / "steps.json").write_text("{")
    with pytest.raises(ClipretError, match=r"steps.json is damaged"):
        states(recipe, out)


def test_an_interrupted_step_goes_on_with_what_it_has(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    states(recipe, out)
    records = json.loads((out / "steps.json").read_text())
    for name in ("index", "search"):
        records[name]["done"] = False
    (out / "steps.json").write_text(json.dumps(records))
    rows = (out / "gallery/rows-000001.npy").stat().st_mtime_ns
    assert states(recipe, out) == {"index": "done", "search": "done"}
    assert (out / "gallery/rows-000001.npy").stat().st_mtime_ns == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[[step]]", "[[steps]]"), r"unknown field steps; a pipeline has \[values\] and \[\[step\]\]"),
        (("[values]", "[values"), "is not TOML"),
        (('"search"\nrun', '"index"\nrun'), "has two steps 'index'"),
        (("{texts}", "{text}"), "has no value 'text': it has bundle, images"),
        (('"{more}"]', '"-{more}"]'), "more is a list and cannot be part of"),
        (("keeps = true", "keep = true"), r"step\[0\]: contains unknown field keep; .* a step has name, run"),
        (('makes = "{out}/gallery"', "makes = 1"), r"step\[0\]\.makes is 1: expected str"),
        (('"clipret-search", "query"', '"rm", "query"'), "runs 'rm': use clipret-train"),
        (('needs = ["queries"]', 'needs = ["truth"]'), "needs 'truth', which is no value"),
        (("measures = true", 'measures = true\nagainst = "start"'), "against 'start', which is no step"),
        (('name = "index"', 'name = "../index"'), "name is '../index': .* its name consists of letters"),
        (("more = []", "more = 1"), "values.more is 1: expected str"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_done(change: tuple[str, str], message: str, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace(*change))
    with pytest.raises(ClipretError, match=message):
        Pipeline.read(str(recipe))


def test_nothing_outside_the_folder_is_removed(recipe: Path, colour_folder: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace('makes = "{out}/gallery"', 'makes = "{images}"'))
    with pytest.raises(ClipretError, match="which is outside"):
        states(recipe, tmp_path / "out")
    assert len(list(colour_folder.rglob("*.*"))) == 12


def test_slots_of_captions_are_no_values(recipe: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.read(str(recipe))
    assert pipeline.filled("a {{color}} {texts}", tmp_path) == f"a {{color}} {tmp_path}/texts.txt"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["run", *map(str, arguments)], prog_name="clipret-train")
    assert result.exit_code == code, result.output
    return result


def test_the_command(recipe: Path, tmp_path: Path) -> None:
    assert "traffic retrieval" in run().stdout
    assert run("product", "--show").stdout.startswith("# product retrieval")
    assert "name the folder" in run(recipe, code=2).stderr
    assert "there is no pipeline 'trafic': did you mean traffic, product" in run("trafic", "--out", "o", code=1).stderr
    assert "has no value 'text'" in run(recipe, "--out", "o", "--set", "text=a", code=1).stderr
    assert "is not NAME=VALUE" in run(recipe, "--out", "o", "--set", "texts", code=1).stderr
    recipe.write_text(recipe.read_text().replace(', "--wrong"]', "]"))
    result = run(
        recipe, "--out", tmp_path / "out", "--set", f"queries={tmp_path}/queries.csv", "--set", 'more=["-k","4"]'
    )
    assert "step index: done" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:5] == ["step", "seconds", "CPU", "seconds", "recall_at_1"]
    assert "0.5000 (+0.0000)" in lines[4]
    assert "missing_images" not in result.stdout


def test_traffic_from_labels_to_answer(tmp_path: Path) -> None:
    """The challenge's files, drawn: one command makes an answer that its scorer takes, and measures each step."""
    drawn = tmp_path / "drawn"
    # Of fewer, too few have a colour and are held out for a precision to be measured on.
    arguments = ["data", "challenge", str(drawn), "--train", "150", "--test", "20", "--seed", "1"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    values = {
        "labels": drawn / "train_label.txt",
        "images": drawn / "train_images",
        "texts": drawn / "test_text.txt",
        "test_images": drawn / "test_images",
        "test": json.dumps([str(drawn / "test_images.csv"), "--image-root", str(drawn / "test_images")]),
        "queries": drawn / "test_queries.csv",
        "read": '["--val-share", "0.5"]',
        "fit": '["--epochs", "1", "--set", "threads=1", "--batch-size", "32"]',
        "precision": "0.1",
        "unfamiliar": "0",
        "rerank": '["--rerank", "adapt=5,hubness=nnn"]',
    }
    given = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    result = run("traffic", "--out", tmp_path / "work", *given, "--json")
    records = json.loads(result.stdout)
    assert [name for name in records if name.startswith("measure")] == [
        "measure", "measure completed", "measure re-ranking", "measure both models",
    ]  # fmt: skip
    assert all(0 <= record["metrics"]["mAP"] <= 1 for record in records.values() if record["metrics"])
    texts = (drawn / "test_text.txt").read_text().splitlines()
    answer = json.loads((tmp_path / "work/answer.json").read_text())["results"]
    assert [entry["text"] for entry in answer] == texts
    images = {file.name for file in (drawn / "test_images").iterdir()}
    for entry in answer:
        assert len(set(entry["image_names"])) == 10
        assert set(entry["image_names"]) <= images
    with (tmp_path / "work/completed.csv").open(newline="") as file:
        filled = [row for row in csv.DictReader(file) if row["filled"]]
    assert filled
    assert all(row["color"] and row["type"] and row["split"] == "train" for row in filled if ";" not in row["filled"])
    assert all(row["type"] in row["caption"] and row["color"] in row["caption"] for row in filled)
    assert "kept" not in result.stderr
    again = run("traffic", "--out", tmp_path / "work", *given)
    assert "done" not in again.stderr
    assert "measure re-ranking" in again.stdout


def test_products_from_lists_to_answer(colour_folder: Path, tmp_path: Path) -> None:
    """The contest's files, made here: tab-separated captions, a gallery that leaves the training's images out."""
    files = [file.relative_to(colour_folder).as_posix() for file in sorted(colour_folder.rglob("*.*"))]
    train = [name for name in files if not name.endswith("2.png")]
    rows = [f"{name.split('/')[0]}的东西\t{name}" for name in train]
    (tmp_path / "train.csv").write_text("\n".join(["caption\tpath", *rows]) + "\n")
    (tmp_path / "test_query.csv").write_text('caption\nred的东西\n"blue, 东西"\n')
    (tmp_path / "sample.csv").write_text("caption,path\nx,grey/2.png\n")
    values = {
        "train": tmp_path / "train.csv",
        "images": colour_folder,
        "test_queries": tmp_path / "test_query.csv",
        "sample": tmp_path / "sample.csv",
        "model": "clipret-small",
        "fit": '["--epochs", "1", "--set", "threads=1", "--set", "val_split=0.3", "--batch-size", "4"]',
        "once": '["--format", "one_to_one"]',
    }
    given = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    result = run("product", "--out", tmp_path / "work", *given)
    assert "step answer: done" in result.stderr
    with (tmp_path / "work/submit.csv").open(newline="") as file:
        answer = list(csv.DictReader(file))
    assert [row["caption"] for row in answer] == ["red的东西", "blue, 东西"]
    found = [row["path"] for row in answer]
    assert len(set(found)) == 2
    assert all(name.endswith("2.png") for name in found)
