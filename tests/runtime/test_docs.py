"""The documents say what is so: their code runs, their tables name every file, key and column, their commands parse."""

import importlib.util
import json
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import typing
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

import clipret
from clipret import Bundle, Encoder, EncoderConfig, Gallery, Searcher
from clipret.bundle import FileEntry, ImageSpec, Manifest, TextSpec
from clipret.cli import main
from clipret.gallery.info import GalleryInfo
from clipret_export.cli import main as export
from clipret_training.cli import main as train

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENGLISH = [*sorted(file for file in DOCS.glob("*.md") if ".zh" not in file.suffixes), ROOT / "README.md"]


def blocks(file: Path, kind: str) -> list[str]:
    """The code of a page, block by block."""
    return re.findall(rf"^```{kind}\n(.*?)^```", file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def column(file: Path, heading: str) -> list[str]:
    """What the first column of the tables under a heading names."""
    text = ("\n" + file.read_text(encoding="utf-8")).partition(f"\n{heading}\n")[2]
    text = re.split(r"\n## ", text)[0]
    lines = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for line in lines for name in re.findall(r"`([^`]+)`", line)]


@pytest.fixture
def workplace(tiny_bundle: Path, colour_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages speak of: a bundle, images, lists, texts, in the working folder."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    files = [file.relative_to(tmp_path) for file in sorted(colour_folder.rglob("*.*"))]
    head = "path,caption,camera,hour,color"
    lines = [
        f"{file},{file.parent.name} car,{'AB'[at % 2]}3,{2 * at},{file.parent.name}" for at, file in enumerate(files)
    ]
    (tmp_path / "list.csv").write_text("\n".join([head, *lines]) + "\n")
    gaps = [line.rpartition(",")[0] + "," if at % 3 == 2 else line for at, line in enumerate(lines)]
    (tmp_path / "captions.csv").write_text("\n".join([head, *gaps]) + "\n")
    (tmp_path / "queries.csv").write_text("caption,color\na red car,red\nsomething blue,blue\n")
    (tmp_path / "texts.txt").write_text("a red car\ngrey\n红色\n")
    (tmp_path / "training-captions.txt").write_text("red\nblue car\nblack\nwhite\n")
    (tmp_path / "vocabulary.json").write_text(json.dumps({"slots": {"color": ["red", "green", "blue", "grey"]}}))
    (tmp_path / "rules.toml").write_text(blocks(DOCS / "query.md", "toml")[0])
    shutil.copytree(colour_folder / "red", tmp_path / "more")
    shutil.copy(colour_folder / "blue" / "0.jpg", tmp_path / "car.jpg")
    with zipfile.ZipFile(tmp_path / "holiday.zip", "w") as file:
        file.write(colour_folder / "blue" / "1.jpeg", "beach.jpeg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("workplace")
def test_the_code_of_the_python_page_runs() -> None:
    names: dict[str, Any] = {}
    for code in blocks(DOCS / "python.md", "python"):
        if "clipret.server.run" in code and not importlib.util.find_spec("fastapi"):
            continue
        exec(compile(code, "python.md", "exec"), names)
    assert names["hits"][0][0].path.startswith("images/red/")
    assert len(names["again"]) == len(names["gallery"]) < 12


def test_the_python_page_names_everything_public() -> None:
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    assert [name for name in clipret.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.usefixtures("workplace")
def test_the_code_of_the_format_pages_reads_what_clipret_reads() -> None:
    runner = CliRunner()
    assert runner.invoke(main, ["index", "bundle", "list.csv", "gallery"]).exit_code == 0
    assert runner.invoke(main, ["remove", "gallery", "images/red/0.jpg", "3"]).exit_code == 0
    names: dict[str, Any] = {}
    for page in ("bundle.md", "gallery.md"):
        for code in blocks(DOCS / page, "python"):
            exec(compile(code, page, "exec"), names)
    names["database"].close()
    bundle = Bundle.open("bundle")
    assert names["fingerprint"] == bundle.fingerprint == names["info"]["fingerprint"]
    encoder = Encoder(bundle, EncoderConfig(device="cpu", threads=1))
    np.testing.assert_allclose(names["embeddings"].shape, (10, bundle.manifest.embedding_dim))
    with Gallery.open("gallery") as gallery:
        searcher = Searcher(gallery, encoder)
        [hits] = searcher.search_embeddings(names["query"][None], 3)
    assert [hit.path for hit in hits] == names["best_paths"]
    assert sorted(names["paths"]) == sorted(names["ids"].tolist())


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of the JSON that a dataclass becomes."""
    names = {field.name: field.encode_name for field in msgspec.structs.fields(cls)}
    for field, hint in typing.get_type_hints(cls).items():
        name = names[field]
        if hint in (ImageSpec, TextSpec):
            yield from keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_the_bundle_page_names_every_key_and_file(tiny_bundle: Path) -> None:
    assert sorted(column(DOCS / "bundle.md", "## bundle.json")) == sorted(keys(Manifest))
    assert set(FileEntry.__struct_fields__) == {"bytes", "sha256"}
    listed = column(DOCS / "bundle.md", "# Bundle format")
    assert {file.name for file in tiny_bundle.iterdir()} <= set(listed)


@pytest.mark.usefixtures("workplace")
def test_the_gallery_page_names_every_key_table_and_column() -> None:
    assert CliRunner().invoke(main, ["index", "bundle", "images", "gallery"]).exit_code == 0
    assert column(DOCS / "gallery.md", "## gallery.json") == list(keys(GalleryInfo))
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    with sqlite3.connect("gallery/gallery.db") as database:
        told = {
            name: [(field, kind) for _, field, kind, *_ in database.execute(f"PRAGMA table_info({name})")]
            for (name,) in database.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
            )
        }
    database.close()
    assert sorted(told) == ["metadata", "rows", "shards"]
    assert told.pop("metadata") == [("id", "INTEGER")]
    for name, fields in told.items():
        table = text.partition(f"Table `{name}`")[2].partition("\n\n")[2].partition("\n\n")[0]
        assert re.findall(r"^\| `(\w+)` \| (\w+) \|", table, re.MULTILINE) == fields
    listed = column(DOCS / "gallery.md", "# Gallery format")
    assert {re.sub(r"\d{6}", "000001", file.name) for file in Path("gallery").iterdir()} <= set(listed)


def commands(file: Path, *kinds: str) -> Iterator[tuple[list[str], str | None]]:
    """The words of each command of ours that a page shows, and the file that it writes to with >."""
    for kind in kinds:
        for block in blocks(file, kind):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                if words := re.match(r"(?:\$ )?(?:.* --no-python )?(clipret-(?:search|train|export)\b.*)", line):
                    split = shlex.split(words[1], comments=True)
                    into = split.index(">") if ">" in split else len(split)
                    yield split[:into], split[into + 1] if into < len(split) else None


GROUPS = {"clipret-search": main, "clipret-train": train, "clipret-export": export}


@pytest.mark.parametrize("file", ENGLISH, ids=lambda file: file.name)
def test_every_command_that_a_page_shows_can_be_given(file: Path) -> None:
    """Its options and arguments are those that the command takes."""
    for words, _ in commands(file, "sh", "console"):
        if "…" in words:
            words.remove("…")
        command: click.Command = GROUPS[words[0]]
        context, rest = click.Context(command, info_name=words[0], **command.context_settings), words[1:]
        while isinstance(command, click.Group) and rest:
            if words[0] == "clipret-export" and rest[0] not in command.commands:
                rest = ["export", *rest]  # what that command does by itself
            name, *rest = rest
            found = command.get_command(context, name)
            assert found is not None, words
            command = found
            context = click.Context(command, info_name=name, parent=context)
        try:
            command.make_parser(context).parse_args(list(rest))
        except click.UsageError as error:
            pytest.fail(f"{file.name}: {shlex.join(words)}: {error.format_message()}")


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("page", ["install.md", "galleries.md", "query.md", "answers.md"])
def test_the_commands_of_a_guide_run(page: str) -> None:
    for words, into in commands(DOCS / page, "sh"):
        if "rows.parquet" in words and not importlib.util.find_spec("pyarrow"):
            continue
        result = CliRunner().invoke(main, words[1:], prog_name=words[0])
        assert result.exit_code == 0, (words, result.stderr)
        if into is not None:
            Path(into).write_text(result.stdout, encoding="utf-8")


def test_every_command_has_a_guide() -> None:
    """The index leads from each command to a heading of its own, and to its options."""
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for group in GROUPS.values():
        for name, command, _ in reference().commands(group):
            if isinstance(command, click.Group):
                continue
            link = r"\[[^]]*\]\(([\w./-]+)#([\w-]+)\)"
            row = re.search(rf"^\| `{name}` \| {link} \| {link} \|", index, re.MULTILINE)
            assert row, f"docs/README.md has no line for {name}"
            for page, anchor in ((row[1], row[2]), (row[3], row[4])):
                assert anchor in anchors(DOCS / page), (page, anchor)


def anchors(file: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", ENGLISH, ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path) -> None:
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        place = file.parent / name if name else file
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def reference() -> Any:
    """docs/make_reference.py as a module."""
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_commands_say(tmp_path: Path) -> None:
    """In a process of its own: click keeps a help option from whoever asks for it first."""
    subprocess.run([sys.executable, DOCS / "make_reference.py", tmp_path], check=True)
    made, held = (
        {file.name: file.read_text("utf-8") for file in one.iterdir()} for one in (tmp_path, DOCS / "reference")
    )
    assert held == made, "run  python docs/make_reference.py"
