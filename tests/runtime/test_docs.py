"""The documents say what is so: their code runs, their tables name every file, key and column, their commands parse."""

import dataclasses
import importlib.util
import re
import shutil
import sqlite3
import typing
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import clipret
from clipret import Bundle, Encoder, Gallery, Searcher
from clipret.bundle import FileEntry, ImageSpec, Manifest, TextSpec
from clipret.cli import main
from clipret.gallery import GalleryInfo

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
    """What the pages speak of: a bundle, pictures, lists, texts, in the working folder."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    files = [file.relative_to(tmp_path) for file in sorted(colour_folder.rglob("*.*"))]
    lines = [f"{file},{file.parent.name} car,{'AB'[at % 2]}3,{2 * at}" for at, file in enumerate(files)]
    (tmp_path / "list.csv").write_text("\n".join(["path,title,camera,hour", *lines]) + "\n")
    (tmp_path / "captions.csv").write_text("\n".join(["path,title,camera,hour", *lines]) + "\n")
    (tmp_path / "texts.txt").write_text("a red car\ngrey\n红色\n")
    (tmp_path / "training-titles.txt").write_text("red\nblue car\nblack\nwhite\n")
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
        if "clipret.server" in code and not importlib.util.find_spec("fastapi"):
            continue
        exec(compile(code, "python.md", "exec"), names)
    assert names["hits"][0][0].path.startswith("pictures/red/")
    assert len(names["again"]) == len(names["gallery"]) < 12


def test_the_python_page_names_everything_public() -> None:
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    assert [name for name in clipret.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.usefixtures("workplace")
def test_the_code_of_the_format_pages_reads_what_clipret_reads() -> None:
    runner = CliRunner()
    assert runner.invoke(main, ["index", "bundle", "list.csv", "gallery"]).exit_code == 0
    assert runner.invoke(main, ["remove", "gallery", "pictures/red/0.jpg", "3"]).exit_code == 0
    names: dict[str, Any] = {}
    for page in ("bundle.md", "gallery.md"):
        for code in blocks(DOCS / page, "python"):
            exec(compile(code, page, "exec"), names)
    names["database"].close()
    bundle = Bundle.open("bundle")
    assert names["fingerprint"] == bundle.fingerprint == names["info"]["fingerprint"]
    encoder = Encoder(bundle, device="cpu", threads=1)
    np.testing.assert_allclose(names["rows"].shape, (10, bundle.manifest.embedding_dim))
    with Gallery.open("gallery") as gallery:
        searcher = Searcher(gallery, encoder)
        [hits] = searcher.search_rows(names["query"][None], 3)
    assert [hit.path for hit in hits] == names["found"]
    assert sorted(names["paths"]) == sorted(names["ids"].tolist())


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of the JSON that a dataclass becomes."""
    for name, hint in typing.get_type_hints(cls).items():
        if hint in (ImageSpec, TextSpec):
            yield from keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_the_bundle_page_names_every_key_and_file(tiny_bundle: Path) -> None:
    assert sorted(column(DOCS / "bundle.md", "## bundle.json")) == sorted(keys(Manifest))
    assert {field.name for field in dataclasses.fields(FileEntry)} == {"bytes", "sha256"}
    listed = column(DOCS / "bundle.md", "# The bundle")
    assert {file.name for file in tiny_bundle.iterdir()} <= set(listed)


@pytest.mark.usefixtures("workplace")
def test_the_gallery_page_names_every_key_table_and_column() -> None:
    assert CliRunner().invoke(main, ["index", "bundle", "pictures", "gallery"]).exit_code == 0
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
    listed = column(DOCS / "gallery.md", "# The gallery")
    assert {re.sub(r"\d{6}", "000001", file.name) for file in Path("gallery").iterdir()} <= set(listed)
