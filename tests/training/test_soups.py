"""`clipret-train soup` on run folders with small random models; the weights differ in a known way."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from clipret_training.cli import main
from clipret_training.models.load import load_model
from clipret_training.run import RunFolder

CAPTIONS = ["a red thing", "a green thing", "a blue thing", "a grey thing"]


def write_run(folder: Path, seed: int, shift: float, model: str = "clipret-small") -> Path:
    """The weights of `seed`, drawn out by `shift`; as if it had been trained from `model`."""
    loaded = load_model("clipret-small", seed=seed, captions=CAPTIONS)
    for parameter in loaded.model.parameters():
        parameter.data += shift
    run = RunFolder.create(folder, {"data": "list.csv", "model": model}, loaded)
    run.save(loaded, "best")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    start = write_run(tmp_path / "start", 1, 0.0)
    return [start, *(write_run(tmp_path / f"run{n}", 1, 0.01 * n, str(start)) for n in (1, 2))]


@pytest.fixture
def val(colour_folder: Path) -> Path:
    file = colour_folder / "val.csv"
    rows = [f"{path.relative_to(colour_folder)},a {path.parent.name} thing" for path in colour_folder.rglob("*.*")]
    file.write_text("\n".join(["path,caption", *sorted(row for row in rows if "val.csv" not in row)]) + "\n")
    return file


def soup(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["soup", *map(str, arguments)])


def shift_of(run: Path, start: Path) -> float:
    ours: Any = load_model(str(run)).model
    theirs: Any = load_model(str(start)).model
    moved = [(a - b).mean() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    assert max(moved) - min(moved) < 1e-5
    return float(torch.stack(moved).mean().detach())


def test_the_mean_of_runs_is_a_run(runs: list[Path], tmp_path: Path) -> None:
    result = soup(*runs, "--out", tmp_path / "soup", "--how", "uniform")
    assert result.exit_code == 0, result.output
    assert shift_of(tmp_path / "soup", runs[0]) == pytest.approx(0.01, rel=1e-3)
    made = tomllib.loads((tmp_path / "soup" / "params.toml").read_text())
    assert made == {"soup": "uniform", "ingredients": [str(run) for run in runs]}
    assert "Next:  clipret-export" in result.stdout
    again = soup(*runs, "--out", tmp_path / "soup", "--how", "uniform")
    assert again.exit_code == 1
    assert "not empty" in again.stderr


def test_between_a_run_and_what_it_started_from(runs: list[Path], tmp_path: Path) -> None:
    assert soup(runs[2], "--out", tmp_path / "a", "--how", "wise", "--alpha", "0.25").exit_code == 0
    assert shift_of(tmp_path / "a", runs[0]) == pytest.approx(0.005, rel=1e-3)
    given = soup(runs[2], "--out", tmp_path / "b", "--how", "wise", "--original", runs[1])
    assert given.exit_code == 0, given.output
    assert shift_of(tmp_path / "b", runs[0]) == pytest.approx(0.015, rel=1e-3)


def test_a_greedy_soup_is_no_worse_than_its_best_run(runs: list[Path], val: Path, tmp_path: Path) -> None:
    result = soup(*runs, "--out", tmp_path / "soup", "--how", "greedy", "--val", val, "--threads", "1")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "soup" / "metrics.jsonl").read_text().splitlines()]
    assert [line["weights"] for line in lines] == [*map(str, runs), "the soup"]
    found = {line["weights"]: (line["text_to_image"]["recall_at_10"], line["mean_recall"]) for line in lines}
    assert found["the soup"] >= max(found.values())
    ingredients = tomllib.loads((tmp_path / "soup" / "params.toml").read_text())["ingredients"]
    table = {line.split()[0]: line.split()[-1] for line in result.stdout.splitlines() if "%" in line}
    assert {name for name, taken in table.items() if taken == "yes"} == set(ingredients)
    assert result.stderr.count("\n") == 5  # three runs alone, two tries


def test_other_models_and_senseless_questions(runs: list[Path], val: Path, tmp_path: Path) -> None:
    other = load_model("clipret-small", captions=["entirely different words"])
    RunFolder.create(tmp_path / "other", {"model": "clipret-small"}, other).save(other, "best")
    out = ["--out", tmp_path / "soup"]
    for arguments, message in (
        ([runs[0], tmp_path / "other", *out, "--how", "uniform"], "differ in their tokenizers"),
        ([*runs, *out, "--how", "wise"], "not 3: name one"),
        ([runs[0], *out, "--how", "uniform"], "name more than one"),
        ([*runs, *out, "--how", "greedy"], "pass --val"),
        ([*runs, *out, "--how", "uniform", "--original", runs[0]], "--original belongs to --how wise"),
        ([runs[0], *out, "--how", "wise"], "started from random weights"),
        ([runs[0] / "checkpoints" / "best.safetensors", *out, "--how", "wise"], "is no run folder"),
        ([*runs, *out, "--how", "greedy", "--val", val.parent / "none.csv"], "none.csv"),
    ):
        result = soup(*arguments)
        assert result.exit_code == 1, result.output
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "soup").exists()
