"""Export and import: the same rows, paths and metadata through every format, and nothing half-written."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from clipret.bundle import Bundle
from clipret.cli.transfer import export_command, import_command
from clipret.console import Group
from clipret.errors import ClipretError
from clipret.gallery import transfer
from clipret.gallery.embeddings import open_embeddings
from clipret.gallery.gallery import Gallery, ImageRecord
from clipret.gallery.transfer import export_gallery, import_embeddings
from clipret.images.walk import read_image

D = 8


def unit_rows(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def stored(gallery: Gallery) -> tuple[list[str], np.ndarray, list[dict[str, Any]]]:
    """Paths, rows and metadata of what is live."""
    content = gallery.read()
    live = np.ones(len(content.ids), np.bool_) if content.live is None else content.live
    ids = content.ids[live]
    return gallery.paths(ids), np.concatenate(content.shards)[live], [dict(more) for more in gallery.metadata(ids)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test crosses the borders of blocks."""
    monkeypatch.setattr("clipret.gallery.transfer.BLOCK", 3)
    monkeypatch.setattr("clipret.gallery.embeddings.BLOCK", 3)


@pytest.fixture
def new(tmp_path: Path, tiny_bundle: Path) -> Gallery:
    return Gallery.create(tmp_path / "new", Bundle.open(tiny_bundle), tmp_path / "images")


@pytest.fixture
def gallery(tmp_path: Path, tiny_bundle: Path) -> Gallery:
    """Ten images in two shards, one of them deleted, one replaced, with odd names and mixed metadata."""
    gallery = Gallery.create(tmp_path / "gallery", Bundle.open(tiny_bundle), tmp_path / "images")
    names = ["a.jpg", "红色 1.jpg", "tab\there.jpg", "new\nline.jpg", 'quote".jpg', "line\u2028.jpg"]
    metadata: Sequence[Mapping[str, Any]] = [
        {"camera": f"A{n % 3}", "hour": n, "gain": n / 7, "mixed": n if n % 2 else "x"} for n in range(10)
    ]
    with gallery.writing():
        gallery.append(
            [ImageRecord(name, n, n, f"{n:032x}") for n, name in enumerate(names)], unit_rows(6), metadata[:6]
        )
        others = [ImageRecord(f"{n}.jpg", n, n, f"{n:032x}") for n in range(6, 9)] + [
            ImageRecord("a.jpg", 9, 9, "9" * 32)
        ]
        gallery.append(others, unit_rows(4, 1), [*metadata[6:8], {}, metadata[9]])
        gallery.remove(gallery.read().ids[[4]])
    return gallery


@pytest.mark.parametrize("name", ["all.npy", "all.parquet"])
def test_a_round_trip_changes_nothing(gallery: Gallery, new: Gallery, tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    assert export_gallery(gallery, tmp_path / name) == 8
    report = import_embeddings(new, open_embeddings(tmp_path / name))
    assert (report.imported, report.replaced, report.normalised, report.skipped) == (8, 0, 0, [])
    paths, rows, metadata = stored(new)
    expected_paths, expected_rows, expected_metadata = stored(gallery)
    assert paths == expected_paths
    np.testing.assert_array_equal(rows.view(np.uint16), expected_rows.view(np.uint16))
    assert metadata == expected_metadata
    assert new.images() == gallery.images()


def test_npy_is_read_by_numpy_with_a_line_for_each_row(gallery: Gallery, tmp_path: Path) -> None:
    export_gallery(gallery, tmp_path / "all.npy", where="hour > 2")
    rows = np.load(tmp_path / "all.npy")
    lines = [json.loads(line) for line in (tmp_path / "all.npy.jsonl").read_bytes().splitlines()]
    assert rows.dtype == np.float16
    assert [line["hour"] for line in lines] == [3, 5, 6, 7, 9]
    assert gallery.paths([line["id"] for line in lines]) == [line["path"] for line in lines]
    paths, expected, _ = stored(gallery)
    np.testing.assert_array_equal(rows, [expected[paths.index(line["path"])] for line in lines])


def test_parquet_has_a_type_for_each_column(gallery: Gallery, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    export_gallery(gallery, tmp_path / "all.parquet")
    table = pq.read_table(tmp_path / "all.parquet")
    types = {field.name: field.type for field in table.schema}
    assert types.pop("embedding") == pa.list_(pa.float32(), D)
    assert {name: str(type_) for name, type_ in types.items()} == {
        **{"id": "int64", "path": "string", "size": "int64", "mtime_ns": "int64", "hash": "string"},
        **{"camera": "string", "hour": "int64", "gain": "double", "mixed": "string"},
    }
    paths, rows, _ = stored(gallery)
    assert table["path"].to_pylist() == paths
    assert table["mixed"].to_pylist() == ["1", "x", "3", "5", "x", "7", None, "9"]
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist()), rows)
    assert pq.ParquetFile(tmp_path / "all.parquet").num_row_groups == 3


@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_faiss_finds_what_brute_force_finds(gallery: Gallery, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    export_gallery(gallery, tmp_path / "all.faiss")
    index = faiss.read_index(str(tmp_path / "all.faiss"))
    queries = unit_rows(5, 2)
    scores, ids = index.search(queries, 8)
    paths, rows, _ = stored(gallery)
    expected = queries.astype(np.float64) @ rows.astype(np.float64).T
    order = np.argsort(-expected, axis=1)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, 1), atol=1e-6)
    listed = {
        line["id"]: line["path"]
        for line in map(json.loads, (tmp_path / "all.faiss.jsonl").read_text().split("\n")[:-1])
    }
    assert [[listed[number] for number in row] for row in ids] == [[paths[at] for at in row] for row in order]


@pytest.mark.parametrize("name", ["all.npy", "all.parquet", "all.faiss"])
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_a_full_disk_leaves_the_old_file(
    gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for suffix, module in [(".parquet", "pyarrow"), (".faiss", "faiss")]:
        if name.endswith(suffix):
            pytest.importorskip(module)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ClipretError, match=rf"{name} cannot be written: No space left"):
        export_gallery(gallery, tmp_path / "out" / name)
    assert [(file.name, file.read_text()) for file in (tmp_path / "out").iterdir()] == [(name, "old")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["all.npy", "all.parquet", "all.faiss"])
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_a_write_that_fails_is_an_error(
    gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for suffix, module in [(".parquet", "pyarrow"), (".faiss", "faiss")]:
        if name.endswith(suffix):
            pytest.importorskip(module)
    monkeypatch.setattr(Path, "open", lambda *_: open("/dev/full", "wb", buffering=0))  # noqa: PTH123, SIM115
    with pytest.raises(ClipretError, match="No space left"):
        export_gallery(gallery, tmp_path / name)


def test_export_refuses_what_it_cannot_do(gallery: Gallery, new: Gallery, tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match=r"of no known kind: end its name in \.parquet, \.npy or \.faiss"):
        export_gallery(gallery, tmp_path / "rows.csv")
    with pytest.raises(ClipretError, match="is a folder"):
        export_gallery(gallery, tmp_path, kind="npy")
    with pytest.raises(ClipretError, match="holds no image with hour > 99: nothing to export"):
        export_gallery(gallery, tmp_path / "a.npy", where="hour > 99")
    with pytest.raises(ClipretError, match="camera"):  # the columns that there are
        export_gallery(gallery, tmp_path / "a.npy", where="colour = 1")
    with pytest.raises(ClipretError, match="holds no images: nothing to export"):
        export_gallery(new, tmp_path / "a.npy")
    with pytest.raises(ClipretError, match="cannot be written: No such file"):
        export_gallery(gallery, tmp_path / "nowhere/a.npy")
    assert not (tmp_path / "a.npy").exists()


@pytest.mark.parametrize(("extra", "module"), [("parquet", "pyarrow"), ("faiss", "faiss")])
def test_a_missing_package_is_one_sentence(gallery: Gallery, tmp_path: Path, extra: str, module: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from clipret.cli.transfer import export_command; from clipret.console import Group\n"
        "main = Group('clipret-search'); main.add_command(export_command); main()"
    )
    arguments = [sys.executable, "-c", code, "export", str(gallery.path), str(tmp_path / f"a.{extra}")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"clipret-search: {module} is not installed: run  pip install 'clipret[{extra}]'\n"
    assert not list(tmp_path.glob("*a.*"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_rows_of_any_length_become_unit_rows(new: Gallery, tmp_path: Path, dtype: Any) -> None:
    rows = (unit_rows(5) * np.array([[1], [3], [1], [0.01], [1]])).astype(dtype)
    np.save(tmp_path / "x.npy", rows)
    report = import_embeddings(new, open_embeddings(tmp_path / "x.npy", [f"{n}.jpg" for n in range(5)]))
    assert (report.imported, report.normalised) == (5, 2)
    _, found, _ = stored(new)
    np.testing.assert_allclose(np.linalg.norm(found.astype(np.float64), axis=1), 1, atol=2e-3)
    np.testing.assert_array_equal(found[[0, 2, 4]], rows[[0, 2, 4]].astype(np.float16))
    np.testing.assert_allclose(found, unit_rows(5), atol=1e-3)


def test_lengths_at_the_ends_of_float64(new: Gallery) -> None:
    rows = unit_rows(2).astype(np.float64) * np.array([[1e300], [1e-300]])
    import_embeddings(new, open_embeddings(rows, ["a", "b"]))
    np.testing.assert_array_equal(stored(new)[1], unit_rows(2).astype(np.float64).astype(np.float16))


def test_rows_without_a_direction_are_skipped_and_named(new: Gallery) -> None:
    rows = unit_rows(7)
    rows[1], rows[2, 3], rows[4, 0] = 0, np.nan, -np.inf
    report = import_embeddings(new, open_embeddings(rows, ["a", "zero", "nan", "b", "inf", "./a", ""]))
    assert report.skipped == [
        ("zero", "its embedding is zero"),
        ("nan", "its embedding is not finite"),
        ("inf", "its embedding is not finite"),
        ("./a", "a row before it has the same image"),
        ("", "it names no image"),
    ]
    assert report.imported == 2
    assert stored(new)[0] == ["a", "b"]
    with pytest.raises(ClipretError, match="none of the 2 rows could be used; the first: x: its embedding is zero"):
        import_embeddings(new, open_embeddings(np.zeros((2, D)), ["x", "y"]))


def test_an_image_that_the_gallery_holds_is_replaced(new: Gallery) -> None:
    import_embeddings(new, open_embeddings(unit_rows(3), ["a", "b", "c"]))
    report = import_embeddings(new, open_embeddings(unit_rows(2, 1), ["b", "d"]))
    assert (report.imported, report.replaced) == (2, 1)
    paths, rows, _ = stored(new)
    assert paths == ["a", "c", "b", "d"]
    np.testing.assert_array_equal(rows[2:], unit_rows(2, 1).astype(np.float16))


def test_images_are_known_by_their_files_where_there_are_any(new: Gallery, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = tmp_path / "images/a.png"
    Image.new("RGB", (4, 4)).save(file)
    (tmp_path / "images/empty.png").touch()
    names = ["a.png", "gone.png", "empty.png", "https://example.org//b.png"]
    import_embeddings(new, open_embeddings(unit_rows(4), names))
    content = read_image(file)
    known = new.images()
    assert known["a.png"] == ImageRecord("a.png", content.size, content.mtime_ns, content.digest)
    assert {name: (p.size, p.mtime_ns, p.hash) for name, p in known.items() if name != "a.png"} == dict.fromkeys(
        names[1:], (0, 0, "")
    )
    assert new.duplicates() == []  # the empty hash is nobody's


def test_what_an_export_recorded_counts_until_the_file_has_changed(new: Gallery, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("same.png", "changed.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
        os.utime(tmp_path / "images" / name, ns=(5, 5))
    size = (tmp_path / "images/same.png").stat().st_size
    records = [(1, "same.png", size, 5, "recorded"), (2, "changed.png", size, 6, "old"), (3, "gone.png", 7, 7, "kept")]
    lines = [
        json.dumps(dict(zip(("id", "path", "size", "mtime_ns", "hash"), record, strict=True))) for record in records
    ]
    np.save(tmp_path / "x.npy", unit_rows(3))
    (tmp_path / "x.npy.jsonl").write_text("\n".join(lines))
    import_embeddings(new, open_embeddings(tmp_path / "x.npy"))
    known = new.images()
    assert known["same.png"].hash == "recorded"
    assert known["changed.png"].hash == read_image(tmp_path / "images/changed.png").digest
    assert known["gone.png"] == ImageRecord("gone.png", 7, 7, "kept")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", 'image,camera,hour\na.jpg,A1,3\n"b,c.jpg",,4\n'),
        ("list.tsv", "image\tcamera\thour\na.jpg\tA1\t3\nb,c.jpg\t\t4\n"),
        ("list.jsonl", '{"image": "a.jpg", "camera": "A1", "hour": 3}\n{"image": "b,c.jpg", "hour": 4}\n'),
    ],
)
def test_lists_give_paths_and_metadata(new: Gallery, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    np.savez(tmp_path / "x.npz", vectors=unit_rows(2))
    import_embeddings(new, open_embeddings(tmp_path / "x.npz", tmp_path / name))
    paths, _, metadata = stored(new)
    assert paths == ["a.jpg", "b,c.jpg"]
    assert [{k: v for k, v in more.items() if v is not None} for more in metadata] == [
        {"camera": "A1", "hour": 3},
        {"hour": 4},
    ]
    assert new.select("hour > 3").tolist() == [new.ids_by_path()["b,c.jpg"]]


def test_plain_lists_and_arrays_of_strings(new: Gallery, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("a b.jpg\r\n红.jpg\r\n".encode())
    import_embeddings(new, open_embeddings(unit_rows(2), tmp_path / "list.txt"))
    np.savez(tmp_path / "x.npz", rows=unit_rows(2, 1), files=np.array(["c.jpg", "d.jpg"]), note=np.arange(3))
    import_embeddings(new, open_embeddings(tmp_path / "x.npz"), image_root=tmp_path / "images/sub")
    assert stored(new)[0] == ["a b.jpg", "红.jpg", "sub/c.jpg", "sub/d.jpg"]


def test_parquet_of_other_tools(new: Gallery, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = unit_rows(5)
    lists = [*rows[:3].tolist(), None, [*rows[4, :7].tolist(), None]]
    columns = {"file_name": list("abcde"), "clip": pa.array(lists, pa.list_(pa.float64())), "flag": [True] * 5}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    report = import_embeddings(new, open_embeddings(tmp_path / "x.parquet"))
    assert [path for path, _ in report.skipped] == ["d", "e"]
    paths, found, metadata = stored(new)
    assert paths == ["a", "b", "c"]
    np.testing.assert_array_equal(found, rows[:3].astype(np.float16))
    assert metadata == [{"flag": 1}] * 3

    pq.write_table(pa.table({**columns, "other": columns["clip"]}), tmp_path / "x.parquet")
    with pytest.raises(ClipretError, match=r"lists of floats are clip, other; name one with --column embedding=NAME"):
        open_embeddings(tmp_path / "x.parquet")
    assert open_embeddings(tmp_path / "x.parquet", embedding_column="other").dimension == D
    with pytest.raises(ClipretError, match="leave the list of paths out"):
        open_embeddings(tmp_path / "x.parquet", ["a"])
    pq.write_table(pa.table({"flag": [1], "clip": [[1.0]]}), tmp_path / "y.parquet")
    with pytest.raises(ClipretError, match="its columns are flag"):
        open_embeddings(tmp_path / "y.parquet")
    pq.write_table(pa.table({"path": list("ab"), "clip": [[1.0] * D, [1.0]]}), tmp_path / "y.parquet")
    with pytest.raises(ClipretError, match="from row 0: an embedding of 1 values, the first has 8"):
        import_embeddings(new, open_embeddings(tmp_path / "y.parquet"))
    (tmp_path / "y.parquet").write_text("nothing of the kind")
    with pytest.raises(ClipretError, match="cannot be read"):
        open_embeddings(tmp_path / "y.parquet")


def test_parquet_of_another_bundle_is_refused(gallery: Gallery, new: Gallery, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    export_gallery(gallery, tmp_path / "x.parquet")
    embeddings = open_embeddings(tmp_path / "x.parquet")
    assert embeddings.fingerprint == gallery.info.fingerprint
    other = Gallery(new.path, msgspec.structs.replace(new.info, fingerprint="f" * 64))
    with pytest.raises(ClipretError, match="comes from another bundle"):
        import_embeddings(other, embeddings)


def test_import_refuses_what_does_not_fit(new: Gallery, tmp_path: Path) -> None:
    def refused(match: str, *arguments: Any) -> None:
        with pytest.raises(ClipretError, match=match):
            import_embeddings(new, open_embeddings(*arguments))

    np.save(tmp_path / "x.npy", unit_rows(2))
    (tmp_path / "list.csv").write_text("path\na\nb\nc\n")
    refused("has 2 rows, its list 3 paths", tmp_path / "x.npy", tmp_path / "list.csv")
    refused("name a list with --paths", tmp_path / "x.npy")
    refused("has rows of 4 values, gallery .* of 8: import what the same model made", np.ones((1, 4)), ["a"])
    refused(r"holds int8 \[2, 8\]: embeddings are floats \[N,D\]", np.ones((2, D), np.int8), ["a", "b"])
    refused(r"holds float64 \[0, 8\]", np.ones((0, D)), [])
    refused("of no known kind", tmp_path / "list.csv")
    refused("cannot be read", tmp_path / "gone.npy")
    for name in ("broken.npy", "broken.npz"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 half")
        refused("cannot be read", tmp_path / name)
    np.savez(tmp_path / "x.npz", a=unit_rows(1), b=unit_rows(1))
    refused(r"holds 2 arrays of floats \[N,D\] and 0 of strings", tmp_path / "x.npz", ["a"])
    np.save(tmp_path / "objects.npy", np.array([None, "a"]), allow_pickle=True)
    refused("cannot be read", tmp_path / "objects.npy", ["a", "b"])
    assert len(new) == 0


def run(*arguments: object, code: int = 0) -> Result:
    main: click.Group = Group("clipret-search")
    main.add_command(export_command)
    main.add_command(import_command)
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="clipret-search")
    assert result.exit_code == code, result.stderr
    return result


def test_the_commands(gallery: Gallery, tiny_bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "all.npy"
    assert run("export", gallery.path, target).stdout == f"{target}: 8 embeddings\n"
    result = run("import", tiny_bundle, target, tmp_path / "copy")
    assert result.stdout == (
        f"{tmp_path / 'copy'}: 8 images (8 imported, 0 of them replaced, 0 normalised, 0 skipped)\n"
    )
    rows = np.load(target)
    rows[0], rows[1] = 0, rows[1] * 2
    np.save(target, rows)
    again = run("import", tiny_bundle, target, tmp_path / "copy", "--json")
    assert again.stderr == "skipped 红色 1.jpg: its embedding is zero\n"
    assert json.loads(again.stdout) == {
        **{"imported": 7, "replaced": 7, "normalised": 1, "total": 8},
        "skipped": [{"path": "红色 1.jpg", "reason": "its embedding is zero"}],
    }


def test_a_refused_import_makes_no_gallery(tiny_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 4)))
    (tmp_path / "list.txt").write_text("a\nb\n")
    result = run("import", tiny_bundle, tmp_path / "x.npy", tmp_path / "g", "--paths", tmp_path / "list.txt", code=1)
    assert result.stderr.startswith("clipret-search: ")
    assert "has embeddings of 4 values" in result.stderr
    assert not (tmp_path / "g").exists()


def test_import_holds_a_block_of_rows_at_a_time(new: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    unit = transfer._unit
    monkeypatch.setattr(transfer, "_unit", lambda block: (lengths.append(len(block)), unit(block))[1])
    import_embeddings(new, open_embeddings(unit_rows(8), [str(n) for n in range(8)]))
    assert lengths == [3, 3, 2]
    assert [len(shard) for shard in new.read().shards] == [3, 3, 2]
