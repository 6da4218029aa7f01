import io
import json
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from clipret.errors import ClipretError
from clipret.images.walk import ImageError
from clipret.sources.item import Item, free_names, scalar
from clipret.sources.source import Source, open_source, read_stored


def image(number: int) -> bytes:
    """A PNG that differs from all others."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def make_tar(file: Path, members: Sequence[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def names(source: Source) -> list[str]:
    return [item.path for item in source]


def check(source: Source, expected: dict[str, bytes]) -> list[Item]:
    """A source has these items; each reads the expected bytes, also by its stored path; a second iteration is equal."""
    items = list(source)
    assert [item.path for item in items] == list(expected) == names(source)
    for item, content in zip(items, expected.values(), strict=True):
        file = item.read()
        assert file.content == content == item.read().content
        assert (file.size, file.mtime_ns) == (item.size, item.mtime_ns) == (len(content), file.mtime_ns)
        assert read_stored(source.root, item.path) == file
    assert len({item.read().digest for item in items}) == len(set(expected.values()))
    return items


def test_folder(tmp_path: Path) -> None:
    files = {f"{name}.png": image(at) for at, name in enumerate(["a/x", "a/y", "b/ä", "c"])}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(tmp_path)
    assert (source.root, source.columns, source.count) == (tmp_path, (), 4)
    check(source, files)
    (tmp_path / "c.png").unlink()
    item = next(iter(open_source(tmp_path / "a/x.png")))
    assert (item.path, item.read().content) == ("x.png", image(0))


def test_a_file_that_vanishes_between_the_walk_and_the_reading(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(image(number))
    items = []
    for item in open_source(tmp_path):
        items.append(item)
        (tmp_path / "1.png").unlink(missing_ok=True)  # the walk has seen its name already
    assert [(item.path, item.size is None) for item in items] == [("0.png", False), ("1.png", True), ("2.png", False)]
    with pytest.raises(ImageError, match="No such file"):
        items[1].read()


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\xe4.png")
    (tmp_path / odd).write_bytes(image(1))
    make_tar(tmp_path / "t.tar", [(odd, image(2))], tarfile.GNU_FORMAT)
    with pytest.warns(UserWarning, match=r"holds archives in addition to images \(1\): they are skipped"):
        source = open_source(tmp_path)
    assert [item.read().content for item in source] == [image(1)]
    check(open_source(tmp_path / "t.tar"), {f"t.tar/{odd}": image(2)})


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_annotations_files_give_each_image_once_with_its_metadata(tmp_path: Path, kind: str) -> None:
    (tmp_path / "sub").mkdir()
    for number in range(3):
        (tmp_path / f"sub/{number}.png").write_bytes(image(number))
    rows = [
        {"image": "sub/0.png", "camera": "A3", "Path": "p"},
        {"image": str(tmp_path / "sub/1.png"), "camera": "", "Path": "q"},
        {"image": "./sub//0.png", "camera": "again", "Path": "r"},
        {"image": "gone.png", "camera": "B", "Path": "s"},
        {"image": "", "camera": "C", "Path": "t"},
        {"image": "sub/2.png\0", "camera": "D", "Path": "u"}
        if kind == "jsonl"
        else {"image": "x", "camera": "", "Path": ""},
    ]
    file = tmp_path / f"images.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = "," if kind == "csv" else "\t"
        file.write_text("\n".join(separator.join(line) for line in [list(rows[0]), *(row.values() for row in rows)]))
    source = open_source(file, image_column="image")
    assert source.columns == ("camera", "Path_")
    items = list(source)
    assert source.count == len(items) == 5
    assert [item.path for item in items[:4]] == ["sub/0.png", "sub/1.png", "gone.png", f"images.{kind} row 5"]
    assert items[0].metadata == {"camera": "A3", "Path_": "p"}
    assert items[1].metadata == {"camera": None, "Path_": "q"}
    assert [item.read().content for item in items[:2]] == [image(0), image(1)]
    for item, reason in zip(items[2:], ["No such file", "names no image", "null |No such"], strict=True):
        with pytest.raises(ImageError, match=reason):
            item.read()
    chosen = open_source(file, image_column="image", where="camera = 'A3'")
    assert (names(chosen), chosen.count) == (["sub/0.png"], 1)
    elsewhere = open_source(file, image_column="image", image_root=tmp_path / "sub")
    assert elsewhere.root == tmp_path / "sub"


def test_webdataset_shards(tmp_path: Path) -> None:
    for shard in range(12):
        members = [
            (f"./s{shard}/000.jpg", image(2 * shard)),
            (
                f"./s{shard}/000.json",
                json.dumps({"camera": "A3", "hour": shard, "box": [1], "id": 2**70, "ok": True}).encode(),
            ),
            (f"./s{shard}/000.txt", b"a caption\n"),
            (f"./s{shard}/000.CLS", b"5"),
            (f"./s{shard}/.hidden.jpg", b"x"),
            (f"./s{shard}/001.json", b"not json"),
            (f"./s{shard}/001.seg.png", image(2 * shard + 1)),
            (f"./s{shard}/notes.bin", b"x"),
        ]
        make_tar(tmp_path / f"{shard:03d}.tar", members)
    expected: dict[str, bytes] = {}
    for shard in range(12):
        expected[f"{shard:03d}.tar/s{shard}/000.jpg"] = image(2 * shard)
        expected[f"{shard:03d}.tar/s{shard}/001.seg.png"] = image(2 * shard + 1)
    source = open_source(tmp_path / "{000..011}.tar")
    assert (source.root, source.count) == (tmp_path, None)
    items = check(source, expected)
    assert items[14].metadata == {"camera": "A3", "hour": 7, "id_": str(2**70), "ok": 1, "text": "a caption", "cls": 5}
    assert items[15].metadata == {}
    assert names(open_source(tmp_path)) == list(expected)  # a folder with only archives
    assert len(names(open_source(tmp_path / "{008..009}.tar"))) == 4


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_names_that_mislead(tmp_path: Path, kind: int) -> None:
    long = "/".join(["folder" * 9] * 6) + "/1.png"
    members = [(long, image(1)), ("/abs.png", image(2)), ("a/../b.png", image(3)), ("a//c.png", image(4))]
    found = make_tar(tmp_path / "t.tar", members, kind)
    check(
        open_source(found),
        {f"t.tar/{name}": image(at) for at, name in enumerate([long, "abs.png", "b.png", "a/c.png"], 1)},
    )


def test_what_is_no_file_in_a_tar_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind in [
            ("link.png", tarfile.SYMTYPE),
            ("same.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x.png"
            tar.addfile(info)
        info = tarfile.TarInfo("folder.png")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("empty.png"))
    items = list(open_source(tmp_path / "t.tar"))
    assert [item.path for item in items] == ["t.tar/link.png", "t.tar/same.png", "t.tar/pipe.png", "t.tar/empty.png"]
    for item, reason in zip(items, ["a link", "a link", "a link", "empty"], strict=True):
        with pytest.raises(ImageError, match=reason):
            item.read()


def test_every_cut_and_every_damaged_header_of_a_tar_ends_in_one_clear_error(tmp_path: Path) -> None:
    members = [(f"{number}.png", image(number)) for number in range(5)]
    whole = make_tar(tmp_path / "whole.tar", members, tarfile.USTAR_FORMAT).read_bytes()
    damaged = tmp_path / "damaged.tar"
    for number in range(5):  # a header and its image take 1024 bytes
        content = bytearray(whole)
        content[1024 * number + 100] ^= 0xFF
        damaged.write_bytes(content)
        found: list[Item] = []
        with pytest.raises(ClipretError, match=r"damaged\.tar is damaged"):
            found.extend(open_source(damaged))
        assert [item.path for item in found] == [f"damaged.tar/{name}" for name, _ in members[:number]]
        assert [item.read().content for item in found] == [content for _, content in members[:number]]
    for length in range(1, 5 * 1024, 97):
        damaged.write_bytes(whole[:length])
        found, error = [], ""
        try:
            for item in open_source(damaged):
                found.append(item)
        except ClipretError as raised:
            error = str(raised)
        readable = 0
        for item, (_, content) in zip(found, members, strict=False):
            try:
                assert item.read().content == content
                readable += 1
            except ImageError:
                continue
        assert readable == sum(1024 * at + 512 + len(content) <= length for at, (_, content) in enumerate(members))
        assert error or length % 1024 == 0, length


def test_no_byte_changed_in_an_archive_raises_anything_else(tmp_path: Path) -> None:
    random_bytes = random.Random(0)
    tar = make_tar(tmp_path / "t.tar", [(f"é{n}.png", image(n)) for n in range(3)])
    with zipfile.ZipFile(tmp_path / "t.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", image(number))
    for file in (tar, tmp_path / "t.zip"):
        whole = file.read_bytes()
        for _ in range(400):
            content = bytearray(whole)
            content[random_bytes.randrange(len(content))] = random_bytes.randrange(256)
            file.write_bytes(content)
            try:
                for item in open_source(file):
                    try:
                        item.read()
                    except ImageError:
                        continue
            except ClipretError:
                continue


def test_zip(tmp_path: Path) -> None:
    files = {f"{'äöü'[n % 3]}/{n}.png": image(n) for n in range(300)}
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        for number, (name, content) in enumerate(files.items()):
            archive.writestr(name, content, zipfile.ZIP_STORED if number % 2 else zipfile.ZIP_DEFLATED)
        archive.writestr("__MACOSX/._0.png", b"x")
        archive.writestr("read.me", b"x")
        archive.mkdir("folder.png")
    source = open_source(tmp_path / "t.zip")
    items = check(source, {f"t.zip/{name}": content for name, content in files.items()})
    shuffled = random.Random(0).sample(items, len(items)) * 3
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda item: item.read().content, shuffled))
    assert contents == [files[item.path.removeprefix("t.zip/")] for item in shuffled]


def test_a_damaged_member_of_a_zip_leaves_the_others(tmp_path: Path) -> None:
    file = tmp_path / "t.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", image(number))
    content = bytearray(file.read_bytes())
    content[content.index(image(1)) + 9] ^= 0xFF
    file.write_bytes(content)
    first, second, third = open_source(file)
    assert (first.read().content, third.read().content) == (image(0), image(2))
    with pytest.raises(ImageError, match="CRC"):
        second.read()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ClipretError, match="is damaged or not an archive"):
        list(open_source(file))


def test_a_member_larger_than_it_says_is_refused_in_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "bomb.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(100_000_000))
    content = file.read_bytes().replace((100_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    file.write_bytes(content)
    (item,) = open_source(file)
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(ImageError):
        item.read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_an_archive_that_is_gone_or_replaced(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "t.tar", [("a.png", image(1))])
    (item,) = open_source(tar)
    with pytest.raises(ImageError, match=r"has no member b\.png"):
        read_stored(tmp_path, "t.tar/b.png")
    make_tar(tar, [("b.png", image(2))])
    os.utime(tar, ns=(1, 1))
    assert read_stored(tmp_path, "t.tar/b.png").content == image(2)
    tar.unlink()
    with pytest.raises(ImageError, match="No such file"):
        item.read()
    with pytest.raises(ImageError):
        read_stored(tmp_path, "t.tar/b.png")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "gone does not exist"),
        ("{0..2}.tar", "1.tar does not exist: check the name and the range"),
        ("{0..99999999999}.tar", "check the range"),
        ("{2..0}.tar", "runs backwards"),
        ("x.tar.gz", "is compressed as a whole"),
        ("x.tgz", "is compressed as a whole"),
        ("x.pdf", "is not a folder, annotations file, archive or image"),
        ("no.tar", "is damaged or not an archive"),
        ("no.zip", "is damaged or not an archive"),
        ("empty", "holds no images"),
        ("images.csv", "has no image column"),
        ("gone.csv", "cannot be read"),
    ],
)
def test_what_cannot_be_opened_says_why(tmp_path: Path, name: str, message: str) -> None:
    make_tar(tmp_path / "0.tar", [])
    (tmp_path / "empty").mkdir()
    for junk in ("x.pdf", "no.tar", "no.zip", "x.tgz"):
        (tmp_path / junk).write_bytes(b"junk" * 300)
    (tmp_path / "images.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ClipretError, match=message):
        list(open_source(tmp_path / name))


def test_where_is_for_annotations_files(tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match="selects rows"):
        open_source(tmp_path, where="a = 1")


def test_memory_is_bounded_for_twenty_thousand_members(tmp_path: Path) -> None:
    content = image(1) * 20
    make_tar(tmp_path / "t.tar", [(f"{number:05d}.png", content) for number in range(20_000)])
    code = (
        "import resource, sys; from clipret.sources.source import open_source\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for number, item in enumerate(open_source(sys.argv[1])):\n"
        "    item.read()\n"
        "    if number == 1000: before = peak()\n"
        "print(number + 1, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "t.tar"], capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == 20_000
    assert grown < 2000  # KiB; its headers alone would take 20 times that, its images 200 times


def test_values_that_sqlite_takes() -> None:
    values = [True, 2**63, -(2**63), float("nan"), float("inf"), 1.5, None, "x"]
    assert [scalar(value) for value in values] == [1, str(2**63), -(2**63), None, None, 1.5, None, "x"]
    assert free_names(["ID", "id_", "hour"]) == {"ID": "ID_", "id_": "id__", "hour": "hour"}


class TestParquet:
    @pytest.fixture
    def arrow(self) -> object:
        pytest.importorskip("pyarrow")
        import pyarrow.parquet

        return pyarrow

    def write(self, arrow: object, file: Path, columns: dict[str, object], rows_a_group: int = 40) -> Path:
        table = arrow.table(columns)  # type: ignore[attr-defined]
        arrow.parquet.write_table(table, file, row_group_size=rows_a_group)  # type: ignore[attr-defined]
        return file

    @pytest.mark.parametrize("structs", [False, True])
    def test_images_as_bytes_or_as_structs(self, arrow: object, tmp_path: Path, structs: bool) -> None:
        images = [image(number) for number in range(100)]
        columns = {
            "image": [{"bytes": one, "path": None} for one in images] if structs else images,
            "hour": list(range(100)),
            "size": ["s"] * 100,
            "vector": [[1.0, 2.0]] * 100,
        }
        source = open_source(self.write(arrow, tmp_path / "p.parquet", columns))
        assert (source.columns, source.count) == (("hour", "size_"), 100)
        items = check(source, {f"p.parquet/{number:09d}": one for number, one in enumerate(images)})
        assert items[77].metadata == {"hour": 77, "size_": "s"}

    def test_shards_of_a_dataset(self, arrow: object, tmp_path: Path) -> None:
        for shard in range(3):
            self.write(arrow, tmp_path / f"train-{shard:05d}-of-00003.parquet", {"image": [image(shard)]})
        expected = {f"train-{n:05d}-of-00003.parquet/000000000": image(n) for n in range(3)}
        source = open_source(tmp_path / "train-{00000..00002}-of-00003.parquet")
        assert source.count == 3
        check(source, expected)
        check(open_source(tmp_path), expected)

    def test_of_two_columns_of_bytes_one_is_named(self, arrow: object, tmp_path: Path) -> None:
        file = self.write(arrow, tmp_path / "p.parquet", {"a": [image(1)], "b": [image(2)], "c": [1]})
        with pytest.raises(ClipretError, match="--column image=NAME"):
            open_source(file)
        with pytest.raises(ClipretError, match="holds int64, no images or paths"):
            open_source(file, image_column="c")
        source = open_source(file, image_column="b")
        assert source.columns == ("c",)
        check(source, {"p.parquet/b/000000000": image(2)})

    def test_paths_and_rows_without_an_image(self, arrow: object, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub/a.png").write_bytes(image(1))
        file = self.write(arrow, tmp_path / "p.parquet", {"path": ["sub/a.png", None, "sub/a.png"], "n": [1, 2, 3]})
        source = open_source(file)
        assert source.count is None
        first, second = source
        assert (first.path, first.read().content, first.metadata) == ("sub/a.png", image(1), {"n": 1})
        assert second.path == "p.parquet/000000001"
        with pytest.raises(ImageError, match="holds no image"):
            second.read()
        structs = [{"bytes": None, "path": "sub/a.png"}, {"bytes": b"", "path": None}, None]
        file = self.write(arrow, tmp_path / "q.parquet", {"image": structs})
        first, *others = open_source(file)
        assert (first.path, first.read().content) == ("sub/a.png", image(1))
        for item in others:
            with pytest.raises(ImageError, match=r"empty|holds no image"):
                item.read()

    def test_another_root_does_not_lose_the_file(self, arrow: object, tmp_path: Path) -> None:
        (tmp_path / "root").mkdir()
        file = self.write(arrow, tmp_path / "p.parquet", {"image": [image(1)]})
        source = open_source(file, image_root=tmp_path / "root")
        check(source, {f"{tmp_path}/p.parquet/000000000": image(1)})

    def test_damaged(self, arrow: object, tmp_path: Path) -> None:
        file = self.write(arrow, tmp_path / "p.parquet", {"image": [image(n) for n in range(200)]})
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ClipretError, match="give a Parquet file"):
            open_source(file)
        content = bytearray(whole)
        content[len(whole) // 2 : len(whole) // 2 + 400] = bytes(400)
        file.write_bytes(content)
        found: list[Item] = []
        with pytest.raises(ClipretError, match="is damaged after row"):
            found.extend(open_source(file))
        assert 40 <= len(found) < 200
        with pytest.raises(ImageError, match="has no row"):
            read_stored(tmp_path, "p.parquet/000000999")
