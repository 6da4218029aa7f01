import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from clipret_training.cli import main


@pytest.fixture
def captions(colour_folder: Path) -> Path:
    file = colour_folder.parent / "captions.tsv"
    rows = [
        f"{path.relative_to(colour_folder)}\ta {path.parent.name} thing" for path in sorted(colour_folder.rglob("*.*"))
    ]
    file.write_text("image\tcaption\n" + "\n".join(rows) + "\n")
    return file


def fit(captions: Path, out: Path, *more: str) -> list[str]:
    root = captions.parent / "images"
    base = ["fit", str(captions), "--set", f"image_root={root}", "--model", "clipret-small", "--out", str(out)]
    return [*base, "--epochs", "1", "--set", "threads=1", "--set", "val_split=0.3", *more]


def test_fit_prints_a_table_and_names_what_it_skipped(captions: Path, tmp_path: Path) -> None:
    (captions.parent / "images" / "red" / "0.jpg").write_bytes(b"broken")
    result = CliRunner().invoke(main, fit(captions, tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert "recall@10" in result.stdout
    assert "text to image" in result.stdout
    assert "unreadable images: 1, listed in" in result.stderr
    assert "epoch   1" in result.stderr


def test_fit_json_is_the_metrics_file_s_line(captions: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, fit(captions, tmp_path / "run", "--json", "--set", "augment=surveillance"))
    value = json.loads(result.stdout)
    assert value["last"] == json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert value["skipped"] == 0


def test_an_error_is_one_line_and_status_1(captions: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, fit(captions, tmp_path / "run", "--set", "where=colour = 1"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "its columns are image, caption" in result.stderr


def test_data_scenes_calls_the_painter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}
    monkeypatch.setattr(
        "clipret_training.synthetic.write_set", lambda out, **given: seen.update(given, out=out), raising=False
    )
    arguments = ["data", "scenes", str(tmp_path / "s"), "--count", "3", "--style", "surveillance", "--seed", "7"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert seen == {"out": tmp_path / "s", "count": 3, "style": "surveillance", "seed": 7, "workers": 1}


def test_help_teaches_and_does_not_import_torch() -> None:
    code = (
        "import sys; from clipret_training.cli import main\n"
        "try: main(['fit', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--set val_where=\"lang = 'en' and split = 'val'\"" in done.stdout
    assert "Continue an interrupted run" in done.stdout


def test_recipes_are_listed_and_printed() -> None:
    listed = CliRunner().invoke(main, ["models"])
    assert "vit-bigg-14-traffic" in listed.stdout
    printed = CliRunner().invoke(main, ["models", "--recipe", "small"])
    assert "crop_size = 64" in printed.stdout
    unknown = CliRunner().invoke(main, ["models", "--recipe", "big"])
    assert unknown.exit_code == 1
    assert "there is no recipe 'big'" in unknown.stderr


def test_options_without_a_flag_go_through_set(captions: Path, tmp_path: Path) -> None:
    given = fit(captions, tmp_path / "run", "--set", "resize=squash", "--set", "jitter=0", "--recipe", "small")
    result = CliRunner().invoke(main, [*given, "--set", "captions=2"])
    assert result.exit_code == 0, result.output
    params = (tmp_path / "run" / "params.toml").read_text()
    assert 'resize = "squash"' in params
    assert "captions = 2" in params
    assert json.loads((tmp_path / "run" / "model.json").read_text())["image"]["resize"] == "squash"
    for wrong, message in (
        ("jiter=0", "no option 'jiter': did you mean jitter"),
        ("jitter=wild", "jitter is 'wild'"),
        ("jitter", "is not NAME=VALUE"),
    ):
        refused = CliRunner().invoke(main, fit(captions, tmp_path / "other", "--set", wrong))
        assert refused.exit_code == 1
        assert message in refused.stderr


def test_set_gives_what_has_an_argument_too(captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run whose paths were given as seen from one folder is gone on with from another."""
    monkeypatch.chdir(captions.parent)
    (tmp_path / "elsewhere").mkdir()
    values = ("data=captions.tsv", "model=clipret-small", "image_root=images", "epochs=1", "threads=1")
    command = ["fit", "--out", str(tmp_path / "run"), "--set", "val_split=0.3"]
    first = CliRunner().invoke(main, [*command, *(word for value in values for word in ("--set", value))])
    assert first.exit_code == 0, first.output
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = CliRunner().invoke(main, ["fit", "--resume", "--out", str(tmp_path / "run")])
    assert again.exit_code == 0, again.output


def test_a_run_is_gone_on_with_by_its_folder(captions: Path, tmp_path: Path) -> None:
    first = CliRunner().invoke(main, fit(captions, tmp_path / "run", "--resume"))
    assert first.exit_code == 0, first.output
    again = CliRunner().invoke(main, ["fit", "--resume", "--out", str(tmp_path / "run"), "--json"])
    assert json.loads(again.stdout)["last"] == json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    refused = CliRunner().invoke(main, fit(captions, tmp_path / "run"))
    assert refused.exit_code == 1
    assert "pass --resume to continue" in refused.stderr


def test_resume_says_what_a_folder_is_that_is_no_run(tmp_path: Path) -> None:
    gone = CliRunner().invoke(main, ["fit", "--resume", "--out", str(tmp_path / "gone")])
    assert f"{tmp_path / 'gone'} is no run folder (no params.toml)" in gone.stderr
    (tmp_path / "params.toml").write_text('soup = "uniform"\ningredients = ["a", "b"]\n')
    soup = CliRunner().invoke(main, ["fit", "--resume", "--out", str(tmp_path)])
    assert f"{tmp_path} is a soup and not the run of a training: train from it with  --model {tmp_path}" in soup.stderr


@pytest.mark.parametrize("kind", ["scenes", "challenge"])
def test_a_seed_is_no_negative_number(tmp_path: Path, kind: str) -> None:
    result = CliRunner().invoke(main, ["data", kind, str(tmp_path / "out"), "--seed", "-5"])
    assert result.exit_code == 2
    assert "-5 is not in the range x>=0" in result.stderr


def test_a_list_with_only_missing_images_is_refused(captions: Path, tmp_path: Path) -> None:
    captions.write_text(captions.read_text().replace("/", "/gone-"))
    result = CliRunner().invoke(main, fit(captions, tmp_path / "run"))
    assert result.exit_code == 1
    assert "No such file" in result.stderr
    assert "check image_root" in result.stderr
    assert not (tmp_path / "run").exists()
