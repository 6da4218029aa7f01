"""What holds for every command of clipret-search: --json, exit statuses, colours; and `add`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from clipret import Gallery
from clipret.cli import main

pytestmark = pytest.mark.slow

JSON_ALWAYS = {"merge"}  # a result file is JSON
NO_RESULT = {"serve"}  # goes on until it is told to stop


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="clipret-search")
    assert result.exit_code == code, result.stderr
    return result


def answer(*arguments: object) -> Any:
    """What a command prints on stdout, which is one JSON document."""
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture
def gallery(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> Path:
    run("index", tiny_bundle, colour_folder, tmp_path / "gallery")
    return tmp_path / "gallery"


def test_every_command_that_prints_a_result_has_json() -> None:
    context = click.Context(main)
    commands = [main.get_command(context, name) for name in main.list_commands(context)]
    without = {
        command.name
        for command in commands
        if command is not None and not any("--json" in one.opts for one in command.params)
    }
    assert without == JSON_ALWAYS | NO_RESULT


def test_json_is_one_document_on_stdout(gallery: Path, tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    queries = tmp_path / "queries.csv"
    queries.write_text(f"caption,path\nred,{colour_folder}/red/0.jpg\n")
    (tmp_path / "texts.txt").write_text("red\nblue\n")
    assert answer("index", tiny_bundle, colour_folder, gallery)["unchanged"] == 12
    assert answer("info", gallery)["images"] == 12
    assert answer("query", gallery, "red", "-k", 2)[0]["query"] == "red"
    assert answer("eval", gallery, queries)["recall_at_1"] in (0, 1)
    assert answer("eval", gallery, queries, "--metric", "recall@12")["recall@12"] == 1
    exported = answer("export", gallery, tmp_path / "rows.npy")
    assert exported == {"target": str(tmp_path / "rows.npy"), "embeddings": 12}
    table = tmp_path / "rows.npy.jsonl"
    paths = [json.loads(line)["path"] for line in table.read_text().splitlines()]
    (tmp_path / "paths.txt").write_text("\n".join(paths))
    imported = answer("import", tiny_bundle, tmp_path / "rows.npy", tmp_path / "g2", "--paths", tmp_path / "paths.txt")
    assert imported["total"] == 12
    assert answer("index", tiny_bundle, colour_folder, tmp_path / "flipped", "--flip")["added"] == 12
    submitted = answer("submit", gallery, tmp_path / "texts.txt", tmp_path / "answer.json", "--format", "names=path")
    assert submitted["texts"] == 2
    merged = json.loads(run("merge", gallery, tmp_path / "flipped", "--texts", tmp_path / "texts.txt").stdout)
    assert [one["query"] for one in merged] == ["red", "blue"]
    assert answer("remove", gallery, "red/0.jpg") == {"removed": 1, "total": 11}
    assert answer("compact", gallery) == {"dropped": 1, "total": 11}
    assert answer("index", gallery, colour_folder / "red")["added"] == 1


def test_exit_statuses(gallery: Path, tmp_path: Path) -> None:
    assert run("--help").stderr == ""
    for arguments in (["info", tmp_path / "gone"], ["query", tmp_path / "gone", "red"], ["index", gallery, "gone.csv"]):
        failed = run(*arguments, code=1)
        assert failed.stdout == ""
        assert failed.stderr.startswith("clipret-search: ")
        assert len(failed.stderr.splitlines()) == 1
    for arguments in (["infos"], ["query", gallery, "--unknown"], ["index", gallery], ["index", "a", "b"]):
        assert "Usage: clipret-search" in run(*arguments, code=2).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_colours_go_to_terminals_and_not_against_no_color(
    gallery: Path, tmp_path: Path, on_terminal: Callable[..., bytes]
) -> None:
    command = [sys.executable, "-m", "clipret.cli", "info", str(gallery)]
    plain = subprocess.run(command, capture_output=True, check=True).stdout
    assert b"\033" not in plain
    shown, quiet = (on_terminal(command, NO_COLOR=value) for value in ("", "1"))
    assert shown.startswith(b"\033[1mof the gallery\033[0m\r\n")
    assert quiet.replace(b"\r\n", b"\n") == plain
    assert b"\033[31m\033[1mclipret-search\033[0m: " in on_terminal([*command[:-1], str(tmp_path)], NO_COLOR="")
    assert b"\033" not in on_terminal([*command[:-1], str(tmp_path)], NO_COLOR="1")


def test_an_addition_keeps_what_its_sources_do_not_name(gallery: Path, colour_folder: Path, tmp_path: Path) -> None:
    more, single = tmp_path / "more", tmp_path / "single.png"
    more.mkdir()
    Image.new("RGB", (9, 9), "yellow").save(more / "a.png")
    (more / "broken.jpg").write_bytes(b"\xff\xd8")
    Image.new("RGB", (9, 9), "cyan").save(single)
    Image.new("RGB", (9, 9), "black").save(colour_folder / "new.png")
    (tmp_path / "list.csv").write_text("path,kind\nimages/new.png,night\nimages/red/0.jpg,day\n")
    report = answer("index", gallery, more, single, tmp_path / "list.csv")
    assert (report["added"], report["unchanged"], report["removed"], report["total"]) == (3, 1, 0, 15)
    assert [one["path"] for one in report["skipped"]] == [str(more / "broken.jpg")]
    with Gallery.open(gallery) as opened:
        paths = opened.ids_by_path()
        assert {"new.png", str(more / "a.png"), str(single), "red/0.jpg", "grey/2.png"} <= set(paths)
        assert len(paths) == 15
        assert opened.paths(opened.select("kind = 'day'")) == ["red/0.jpg"]
    found = answer("query", gallery, "yellow", "cyan", "black", "-k", 1)
    assert [Path(one["hits"][0]["path"]).name for one in found] == ["a.png", "single.png", "new.png"]
    again = run("index", gallery, more, single, tmp_path / "list.csv").stdout
    assert "15 images (0 added, 0 changed, 4 unchanged, 1 skipped)" in again


def test_an_addition_finds_the_bundle_or_is_told(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    run("index", bundle, colour_folder / "red", tmp_path / "g")
    bundle.rename(tmp_path / "moved")
    assert "name it with --bundle" in run("index", tmp_path / "g", colour_folder / "blue", code=1).stderr
    report = answer("index", tmp_path / "g", colour_folder / "blue", "--bundle", tmp_path / "moved")
    assert (report["added"], report["total"]) == (3, 6)
    assert "name BUNDLE SOURCE... GALLERY" in run("index", tmp_path / "new", colour_folder / "blue", code=2).stderr
    assert not (tmp_path / "new").exists()


def complete(line: str) -> list[str]:
    """What bash is told that the last word of a line can become, as TYPE,VALUE."""
    words = line.split(" ")
    asked = {"_CLIPRET_SEARCH_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    result = CliRunner(env=asked).invoke(main, [], prog_name="clipret-search")
    assert result.stderr == ""
    return result.stdout.strip().splitlines()


@pytest.mark.parametrize(("shell", "sign"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete --no")])
def test_the_script_for_each_shell(shell: str, sign: str) -> None:
    asked = {"_CLIPRET_SEARCH_COMPLETE": f"{shell}_source"}
    assert sign in CliRunner(env=asked).invoke(main, [], prog_name="clipret-search").stdout


def test_the_tab_key_completes(
    listed_gallery: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert complete("clipret-search qu") == ["plain,query"]
    assert complete("clipret-search query g red --back") == ["plain,--backend"]
    assert "plain,openvino" in complete("clipret-search query g red --backend o")
    monkeypatch.chdir(tmp_path)
    assert complete("clipret-search info ga") == ["plain,gallery"]
    assert complete("clipret-search info pi") == ["dir,pi"]
    assert complete(f"clipret-search info {tmp_path}/") == [f"plain,{tmp_path}/gallery"]
    assert complete(f"clipret-search index {tiny_bundle.parent}/t") == [f"plain,{tiny_bundle}"]
    assert complete("clipret-search index b pi") == ["file,pi"]
    Path("queries.csv").write_text("caption;file;lang\nred;a.jpg;en\n")
    Path("queries.jsonl").write_text(json.dumps({"caption": "red", "language": "en"}) + "\n")
    assert complete("clipret-search eval gallery queries.csv --where la") == ["plain,lang"]
    assert complete("clipret-search eval gallery queries.jsonl --column caption=l") == ["plain,caption=language"]
    assert complete("clipret-search index bundle queries.csv new --where la") == ["plain,lang"]
    assert complete("clipret-search eval gallery gone.csv --where la") == []
    assert complete("clipret-search query gone red --where la") == []
    assert complete(f"clipret-search query {listed_gallery} red --where co") == ["plain,colour"]
    assert complete(f"clipret-search eval {listed_gallery} queries.csv --equal nu") == ["plain,number"]
    assert complete(f"clipret-search query {listed_gallery} red --prompts gone.toml --min") == [
        "plain,--minus",
        "plain,--minus-weight",
        "plain,--min-score",
    ]
