"""The commands as a user runs them, from images to metrics."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from clipret import Bundle, Encoder, Gallery, Searcher
from clipret.cli import main
from clipret.cli.app import COMMANDS


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="clipret-search")
    assert result.exit_code == code, result.stderr
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result


def fails(*arguments: object) -> str:
    """The one line on stderr of a command that exits 1 and prints nothing on stdout."""
    result = run(*arguments, code=1)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("clipret-search: ")
    return lines[0]


@pytest.fixture
def gallery(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> Path:
    run("index", tiny_bundle, colour_folder, tmp_path / "gallery")
    return tmp_path / "gallery"


def test_the_named_colour_comes_first(gallery: Path) -> None:
    found = json.loads(run("query", gallery, "a red car", "红色", "Green", "-k", 3, "--json").stdout)
    colours = [{Path(hit["path"]).parent.name for hit in result["hits"]} for result in found]
    assert colours == [{"red"}, {"red"}, {"green"}]
    assert [hit["rank"] for hit in found[0]["hits"]] == [1, 2, 3]
    assert Path(found[0]["hits"][0]["file"]).is_file()


def test_the_table_has_a_line_for_each_image(gallery: Path) -> None:
    lines = run("query", gallery, "blue", "-k", 100).stdout.splitlines()
    assert lines[0].split() == ["rank", "score", "path"]
    assert len(lines) == 1 + 12
    assert lines[1].split()[2].startswith("blue/")


def test_results_equal_a_brute_force_over_the_stored_rows(gallery: Path, tiny_bundle: Path) -> None:
    searcher = Searcher(Gallery.open(gallery), Encoder(Bundle.open(tiny_bundle)))
    hits = searcher.search(["red blue", "grey"], 12)
    rows = np.concatenate(searcher.stored.shards).astype(np.float64)
    for text, found in zip(["red blue", "grey"], hits, strict=True):
        scores = rows @ searcher.encoder.encode_texts([text])[0].astype(np.float64)
        expected = sorted(zip(-scores, searcher.stored.ids, strict=True))
        assert [hit.id for hit in found] == [number for _, number in expected]
        np.testing.assert_allclose([hit.score for hit in found], -np.array(expected)[:, 0], atol=1e-6)


def test_rows_do_not_depend_on_batch_or_threads(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    for name, options in [("a", ["--encoder", "batch_size=1"]), ("b", ["--encoder", "batch_size=7,threads=3"])]:
        run("index", tiny_bundle, colour_folder, tmp_path / name, *options)
    a, b = (np.load(tmp_path / name / "rows-000001.npy") for name in "ab")
    np.testing.assert_array_equal(a, b)


def test_bad_images_are_skipped_counted_and_named(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    whole = (colour_folder / "red/0.jpg").read_bytes()
    (colour_folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (colour_folder / "empty.png").touch()
    (colour_folder / "text.gif").write_text("no image")
    result = run("index", tiny_bundle, colour_folder, tmp_path / "gallery")
    assert "12 images (12 added, 0 changed, 0 unchanged, 3 skipped)" in result.stdout
    assert "skipped half.jpg: broken" in result.stderr
    report = (tmp_path / "gallery/skipped.tsv").read_text().splitlines()
    assert report[0] == "path\treason"
    assert {line.split("\t")[0] for line in report[1:]} == {"half.jpg", "empty.png", "text.gif"}


def test_indexing_again_encodes_only_what_is_new_or_changed(
    gallery: Path, tiny_bundle: Path, colour_folder: Path
) -> None:
    shutil.copy(colour_folder / "red/0.jpg", colour_folder / "grey/0.jpg")
    os.utime(colour_folder / "grey/0.jpg", ns=(1, 1))
    shutil.copy(colour_folder / "red/0.jpg", colour_folder / "new.jpg")
    report = json.loads(run("index", tiny_bundle, colour_folder, gallery, "--json").stdout)
    assert (report["added"], report["changed"], report["unchanged"], report["total"]) == (1, 1, 11, 13)
    found = json.loads(run("query", gallery, "red", "-k", 20, "--json").stdout)[0]["hits"]
    assert {hit["path"] for hit in found[:5]} == {"red/0.jpg", "red/1.jpeg", "red/2.png", "grey/0.jpg", "new.jpg"}
    assert len(found) == 13


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_odd_file_names(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in (b"new\nline.jpg", b"tab\there.jpg", "红色 '\"<b>.jpg".encode(), b"-k.jpg", b"bad\xff.jpg"):
        shutil.copy(colour_folder / "red/0.jpg", os.fsencode(folder) + b"/" + name)
    result = run("index", tiny_bundle, folder, tmp_path / "g")
    assert "4 images (4 added, 0 changed, 0 unchanged, 1 skipped)" in result.stdout
    assert result.stderr == "skipped bad\\udcff.jpg: its name is not UTF-8: rename it\n"
    again = json.loads(run("index", tiny_bundle, folder, tmp_path / "g", "--json").stdout)
    assert (again["unchanged"], again["skipped"][0]["path"]) == (4, "bad\udcff.jpg")
    table = run("query", tmp_path / "g", "red", "--html", tmp_path / "page.html").stdout
    assert len(table.splitlines()) == 1 + 4
    assert "new\\nline.jpg" in table


def test_a_list_with_filter_and_duplicates(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    rows = [
        "red/0.jpg,train",
        "red/0.jpg,train",
        "./red/0.jpg,train",
        "blue/1.jpeg,train",
        "red/2.png,val",
        "gone.jpg,train",
    ]
    (colour_folder / "list.csv").write_text("\n".join(["filepath,split", *rows]))
    result = run("index", tiny_bundle, colour_folder / "list.csv", tmp_path / "g", "--where", "split = 'train'")
    assert "2 images (2 added, 0 changed, 0 unchanged, 1 skipped)" in result.stdout
    assert "gone.jpg: cannot be read: No such file" in result.stderr


def test_eval_by_hand(gallery: Path, colour_folder: Path, tmp_path: Path) -> None:
    rows = [f"a {colour} thing,{colour}/{n}" for colour in ("red", "blue") for n in ("0.jpg", "1.jpeg", "2.png")]
    (colour_folder / "queries.csv").write_text("\n".join(["caption,path", *rows, "green,red/0.jpg", "white,lost.jpg"]))
    result = run("eval", gallery, colour_folder / "queries.csv", "--json", "--html", tmp_path / "page.html")
    metrics = json.loads(result.stdout)
    # red and blue find their three first; "green" is said to be answered by a red image, which is found late
    assert metrics["queries"] == 3
    assert metrics["recall_at_1"] == pytest.approx(2 / 3)
    assert metrics["median_rank"] == 1
    assert metrics["missing_images"] == 1
    assert metrics["queries_left_out"] == 1
    assert "1 queries left out" in result.stderr
    page = (tmp_path / "page.html").read_text()
    assert "a red thing" in page
    assert "3 of the first 10 right" in page


def test_query_by_image_with_filters(gallery: Path, colour_folder: Path) -> None:
    def found(*arguments: object) -> list[str]:
        result = json.loads(run("query", gallery, *arguments, "--json").stdout)[0]
        return [hit["path"] for hit in result["hits"]]

    assert {path.split("/")[0] for path in found("--image", colour_folder / "blue/1.jpeg", "-k", 3)} == {"blue"}
    mixed = found("red", "--image", colour_folder / "blue/1.jpeg", "-k", 6)
    assert {path.split("/")[0] for path in mixed} == {"red", "blue"}
    without = found("red blue", "--minus", "red", "--minus-weight", 1, "-k", 3)
    assert {path.split("/")[0] for path in without} == {"blue"}
    narrowed = found("red", "-k", 20, "--where", "path like 'red/%'", "--exclude", "red/0.jpg")
    assert narrowed == [path for path in found("red", "-k", 3) if path != "red/0.jpg"]
    assert found("red", "--min-score", 2) == []
    assert found("red", "--prompts", "a {} car", "--prompts", "{}", "-k", 3) == found("red", "-k", 3)
    assert "is neither a template" in fails("query", gallery, "red", "--prompts", "a car")
    assert len(json.loads(run("query", gallery, "red", "red", "--json").stdout)) == 2
    assert "not a finite number" in run("query", gallery, "red", "--min-score", "nan", code=2).stderr
    assert "its columns are id, path" in fails("query", gallery, "red", "--where", "camera = 1")


def test_remove_compact_info(gallery: Path, colour_folder: Path, tiny_bundle: Path) -> None:
    ids = Gallery.open(gallery).ids_by_path()
    assert "12" in run("info", gallery).stdout
    assert "holds no image 999" in fails("remove", gallery, 999)
    assert "holds no image lost.jpg" in fails("remove", gallery, "lost.jpg")
    assert "name images" in run("remove", gallery, code=2).stderr
    result = run("remove", gallery, "red/0.jpg", ids["red/1.jpeg"], "--where", "path like 'blue/%'")
    assert result.stdout == f"{gallery}: 5 removed, 7 images left\n"
    facts = json.loads(run("info", gallery, "--json").stdout)
    assert (facts["images"], facts["deleted embeddings"], facts["shards"]) == (7, 5, 1)
    assert facts["columns"] == ["id", "path", "size", "mtime_ns", "hash"]
    for unknown in ("²", "0", "9" * 30, ids["red/0.jpg"]):  # the last one is deleted already
        assert "holds no image" in fails("remove", gallery, unknown)
    expected = run("query", gallery, "blue", "-k", 12).stdout
    assert "5 deleted embeddings dropped" in run("compact", gallery).stdout
    assert run("query", gallery, "blue", "-k", 12).stdout == expected
    assert json.loads(run("info", gallery, "--json").stdout)["deleted embeddings"] == 0
    shutil.copy(colour_folder / "grey/0.jpg", colour_folder / "twin.jpg")
    run("index", tiny_bundle, colour_folder, gallery)
    assert "grey/0.jpg\ntwin.jpg" in run("info", gallery, "--duplicates").stdout


def test_a_page_for_a_query(gallery: Path, tmp_path: Path) -> None:
    run("query", gallery, "<b>red</b>", "--html", tmp_path / "page.html", "-k", 2)
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;red" in page
    assert "data:image/" in page


def test_errors_are_one_line_and_write_nothing(
    tiny_bundle: Path, colour_folder: Path, gallery: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    new = tmp_path / "new"
    assert "holds no images" in fails("index", tiny_bundle, empty, new)
    assert "is not a bundle" in fails("index", empty, colour_folder, new)
    assert "does not exist" in fails("index", tiny_bundle, tmp_path / "nowhere", new)
    (tmp_path / "list.csv").write_text("photo,words\na.jpg,b\n")
    assert "its columns are photo, words" in fails("index", tiny_bundle, tmp_path / "list.csv", new)
    broken = Path(shutil.copytree(tiny_bundle, tmp_path / "broken"))
    (broken / "image.onnx").write_bytes((broken / "image.onnx").read_bytes()[:-1] + b"\0")
    assert "has changed since the export" in fails("index", broken, colour_folder, new)
    assert "device 'tpu' is unknown" in fails("index", tiny_bundle, colour_folder, new, "--device", "tpu")
    assert not new.exists()
    assert "is blank" in fails("query", gallery, " \t ")
    assert "is no gallery" in fails("query", empty, "red")
    assert "cannot be read" in fails("eval", gallery, tmp_path / "gone.csv")
    assert "has none of the 1 images" in fails(
        "eval", gallery, tmp_path / "list.csv", "--column", "caption=words,image=photo"
    )


def test_a_folder_of_nothing_but_broken_images(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.jpg").touch()
    result = run("index", tiny_bundle, tmp_path / "p", tmp_path / "g", code=1)
    assert "none of the 1 images could be used; the first: a.jpg: the file is empty" in result.stderr


def test_another_bundle_is_refused(gallery: Path, tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    manifest = json.loads((other / "bundle.json").read_text())
    manifest["text"]["clean"] = "clip"
    (other / "bundle.json").write_text(json.dumps(manifest))
    assert "made with another bundle" in fails("index", other, colour_folder, gallery)
    assert "made with another bundle" in fails("query", gallery, "red", "--bundle", other)


def test_a_corrected_first_run_takes_its_own_folder(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\nred/0.jpg\n")
    assert "none of the 1 images" in fails("index", tiny_bundle, tmp_path / "list.csv", tmp_path / "gallery")
    run("index", tiny_bundle, tmp_path / "list.csv", tmp_path / "gallery", "--image-root", colour_folder)
    with Gallery.open(tmp_path / "gallery") as gallery:
        assert gallery.paths([1]) == ["red/0.jpg"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_no_number_is_refused(value: str, gallery: Path, tiny_bundle: Path, colour_folder: Path) -> None:
    query = ("query", gallery, "red")
    for option in ("--minus-weight", "--min-score"):
        assert "Invalid value for '" + option in run(*query, option, value, code=2).stderr
    for setting in ("strength", "temperature", "adapt_weight"):
        told = run(*query, "--rerank", f"hubness=nnn,{setting}={value}", code=2).stderr
        assert f"{setting} must be a finite number" in told
    words = ("index", tiny_bundle, colour_folder, gallery, "--encoder", f"image_timeout={value}")
    assert "image_timeout must be a finite number" in run(*words, code=2).stderr
    assert "--limit" in run("serve", gallery, "--limit", f"timeout={value}", code=2).stderr


def test_a_page_is_no_folder(gallery: Path, tmp_path: Path) -> None:
    assert "is a directory" in run("query", gallery, "red", "--html", tmp_path, code=2).stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_results_that_cannot_be_written(gallery: Path) -> None:
    command = [sys.executable, "-m", "clipret.cli", "query", str(gallery), "red", "--device", "cpu"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "clipret-search: the output or the working folder cannot be used (No space left on device): free space, or "
        "choose another path\n"
    )


def test_usage_errors_exit_2(gallery: Path) -> None:
    assert "name at least one text" in run("query", gallery, code=2).stderr
    assert "0 is not in the range" in run("query", gallery, "red", "-k", 0, code=2).stderr


def test_a_path_goes_before_an_id(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    for name, colour in (("2", "red"), ("1", "blue")):
        shutil.copy(colour_folder / colour / "0.jpg", tmp_path / name)
    (tmp_path / "list.csv").write_text("path\n2\n1\n")
    run("index", tiny_bundle, tmp_path / "list.csv", tmp_path / "g")
    run("remove", tmp_path / "g", "1")
    assert list(Gallery.open(tmp_path / "g").ids_by_path()) == ["2"]


@pytest.mark.skipif(sys.platform == "win32", reason="HOME decides on other systems")
def test_nothing_is_written_to_the_home_folder(gallery: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-m", "clipret.cli", "query", str(gallery), "red"]
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(command, check=True, capture_output=True, env=environment | {"HOME": str(home)})
    assert not list(home.rglob("*onnxruntime*"))


def test_help_has_an_example_for_every_command() -> None:
    for command in (name for section in COMMANDS.values() for name in section):
        text = run(command, "--help").stdout
        assert f"clipret-search {command} " in text.partition("Example:")[2]


def test_neither_torch_nor_onnx_is_loaded() -> None:
    heavy = {"torch", "onnx", "tqdm", "ftfy", "onnxruntime", "numpy.random", "click.shell_completion"}
    heavy.add("clipret.evaluation.report")
    code = f"import sys, clipret.cli.app; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_public_names_are_sorted_and_there() -> None:
    import clipret

    assert clipret.__all__ == sorted(clipret.__all__)
    assert all(hasattr(clipret, name) for name in clipret.__all__)
