"""Indexing: a run after an interruption gives the gallery of an uninterrupted run; nothing is encoded twice."""

import io
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipret import Bundle, ClipretError, Encoder, EncoderConfig, Gallery, IndexReport, index_images
from clipret.gallery.compaction import compact_gallery
from clipret.images.walk import find_images
from clipret.sources.item import Item, broken_item
from clipret.sources.source import Source, open_source, read_stored

pytestmark = pytest.mark.slow

# Small shards, so that every run has many commits.
COMMAND = "import clipret.indexing.index as i; i._SHARD_SIZE = 8; from clipret.cli import main; main()"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An annotations file of 200 images with metadata; one in twenty is broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(200):
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(folder / f"{number:03d}.jpg")
        if number % 20 == 7:
            (folder / f"{number:03d}.jpg").write_bytes(b"\xff\xd8 half")
    lines = [f"{number:03d}.jpg,A{number % 3},{number % 24}" for number in range(200)]
    (folder / "images.csv").write_text("\n".join(["path,camera,hour", *lines]) + "\n")
    return folder


def index(folder: Path, bundle: Path, source: Path, **options: bool) -> IndexReport:
    encoder, opened = Encoder(Bundle.open(bundle), EncoderConfig(device="cpu")), open_source(source)
    exists = (folder / "gallery.json").exists()
    with Gallery.open(folder) if exists else Gallery.create(folder, encoder.bundle, opened.root) as gallery:
        return index_images(gallery, encoder, opened, **options)


def contents(folder: Path) -> tuple[list[str], np.ndarray]:
    """Paths and embeddings of the live images."""
    with Gallery.open(folder) as gallery:
        stored = gallery.read()
        live = np.ones(len(stored.ids), bool) if stored.live is None else stored.live
        embeddings = np.concatenate([np.empty((0, 8), np.float16), *stored.shards])[live]
        return gallery.paths(stored.ids[live]), embeddings


def everything(folder: Path) -> dict[str, object]:
    """Every byte of the shards and every row of the tables."""
    files: dict[str, object] = {file.name: file.read_bytes() for file in folder.glob("*.npy")}
    database = sqlite3.connect(folder / "gallery.db")
    files |= {table: database.execute(f"SELECT * FROM {table}").fetchall() for table in ("shards", "rows", "metadata")}
    database.close()
    return files | {"skipped": (folder / "skipped.tsv").read_bytes()}


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_run_killed_twenty_times_gives_the_gallery_of_an_uninterrupted_one(
    images: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    rng, killed = random.Random(0), tmp_path / "killed"

    def state() -> tuple[bool, int]:
        return (killed / "gallery.json").exists(), len(list(killed.glob("rows-*.npy")))

    def start(folder: Path) -> subprocess.Popen[bytes]:
        arguments = ["index", str(tiny_bundle), str(images / "images.csv"), str(folder), "--encoder", "batch_size=8"]
        return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], stdout=-3, stderr=-3)

    assert start(tmp_path / "whole").wait() == 0
    expected = everything(tmp_path / "whole")
    assert len(expected["rows"]) == 190  # type: ignore[arg-type]
    kills = indexed = 0
    shards = set[int]()
    while kills < 20:
        process = start(killed)
        before, deadline = state(), time.monotonic() + 60
        if kills % 5 == 0:  # at any time, also before the run has written anything
            time.sleep(rng.random() * 0.5)
        else:  # from the first file of this run on
            while process.poll() is None and state() == before and time.monotonic() < deadline:
                pass
            time.sleep(rng.random() ** 2 * 0.1)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
            shards.add(state()[1])
        if process.wait() == 0:
            assert everything(killed) == expected
            indexed = 0
            shutil.rmtree(killed)
        elif (killed / "gallery.json").exists():
            paths, embeddings = contents(killed)
            assert len(paths) == len(embeddings) == len(set(paths)) >= indexed
            indexed = len(paths)
    assert start(killed).wait() == 0
    assert everything(killed) == expected
    assert len(shards) > 5  # it was killed at many points


def test_ctrl_c_keeps_encoded_images(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (20, 15), "red").save(buffer, "JPEG")
    for number in range(80):  # no two files are equal
        (tmp_path / f"p/{number:03d}.jpg").write_bytes(buffer.getvalue() + str(number).encode())
    arguments = ["index", str(tiny_bundle), str(tmp_path / "p"), str(tmp_path / "g"), "--encoder", "batch_size=2"]
    # The process waits after its second shard, so that the signal always comes in the middle of the work.
    waiting = (
        "import time; from pathlib import Path; from clipret import Gallery as G; append, n = G.append, []; "
        "wait = lambda: (Path('waits').touch(), time.sleep(100)); "
        "G.append = lambda *args: (append(*args), n.append(1), len(n) == 2 and wait()) and None"
    )
    command = [sys.executable, "-c", f"{waiting}; {COMMAND}", *arguments]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, cwd=tmp_path)
    while process.poll() is None and not (tmp_path / "waits").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout, stderr) == (130, b"", b"clipret-search: interrupted\n")
    paths, embeddings = contents(tmp_path / "g")
    assert 8 <= len(paths) == len(embeddings) < 80
    run = subprocess.run([sys.executable, "-c", COMMAND, *arguments], stdout=-1, check=True)
    assert b": 80 images" in run.stdout
    paths, embeddings = contents(tmp_path / "g")
    assert sorted(paths) == [f"{number:03d}.jpg" for number in range(80)]
    assert len(embeddings) == 80


def test_metadata_is_stored_filtered_and_updated(images: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    index(tmp_path / "g", tiny_bundle, images / "images.csv")
    with Gallery.open(tmp_path / "g") as gallery:
        assert gallery.columns() == ["camera", "hour"]
        selected = gallery.select("camera = 'A2' and hour < 6")
        assert gallery.paths(selected) == [
            f"{n:03d}.jpg" for n in range(200) if n % 3 == 2 and n % 24 < 6 and n % 20 != 7
        ]
        assert gallery.metadata(selected[:1]) == [{"camera": "A2", "hour": 2}]
        ids = gallery.ids_by_path()
    text = (images / "images.csv").read_text().replace("003.jpg,A0,3", "003.jpg,B9,3")
    (images / "images.csv").write_text(text)
    report = index(tmp_path / "g", tiny_bundle, images / "images.csv")
    assert (report.added, report.changed, report.unchanged, len(report.skipped)) == (0, 0, 190, 10)
    with Gallery.open(tmp_path / "g") as gallery:
        assert gallery.paths(gallery.select("camera = 'B9'")) == ["003.jpg"]
        assert gallery.ids_by_path() == ids
        with pytest.raises(ClipretError, match=r"no such column: color; its columns are id, path, .*, camera, hour"):
            gallery.select("color = 'red'")
        for hostile in ("1; DROP TABLE rows", "id IN (DELETE FROM rows)", "0) OR (SELECT load_extension('x')", "'"):
            with pytest.raises(ClipretError, match="--where"):
                gallery.select(hostile)
        assert len(gallery) == 190


def test_changed_numbers_are_updated(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    file = colour_folder / "images.csv"
    for price, code, stored in (("0.2", "1_0", (0.2, "1_0")), ("0.9", "10", (0.9, 10)), ("9.5", "1e999", (9.5, None))):
        file.write_text(f"path,price,code\nred/0.jpg,{price},{code}\n")
        index(tmp_path / "g", tiny_bundle, file)
        with Gallery.open(tmp_path / "g") as gallery:
            assert tuple(gallery.metadata([1])[0].values()) == stored
    written = (tmp_path / "g/gallery.db").read_bytes()
    index(tmp_path / "g", tiny_bundle, file)
    assert (tmp_path / "g/gallery.db").read_bytes() == written


def test_the_same_bytes_are_encoded_once(
    tiny_bundle: Path, colour_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tmp_path / "g", tiny_bundle, colour_folder)
    (colour_folder / "red/0.jpg").rename(colour_folder / "red/moved.jpg")
    shutil.copy(colour_folder / "blue/1.jpeg", colour_folder / "again.jpg")
    os.utime(colour_folder / "green/0.jpg", ns=(5, 5))  # touched

    def refuse(*_: object) -> np.ndarray:
        raise AssertionError("no image is new")

    monkeypatch.setattr("clipret.inference.tower.OnnxTower.run", refuse)
    report = index(tmp_path / "g", tiny_bundle, colour_folder, prune=True)
    assert (report.added, report.copied, report.unchanged, report.removed) == (2, 2, 11, 1)
    assert not report.skipped
    paths, embeddings = contents(tmp_path / "g")
    assert set(paths) == {path.relative_to(colour_folder).as_posix() for path in find_images(colour_folder)}
    np.testing.assert_array_equal(embeddings[paths.index("again.jpg")], embeddings[paths.index("blue/1.jpeg")])
    with Gallery.open(tmp_path / "g") as gallery:
        assert gallery.duplicates() == [["blue/1.jpeg", "again.jpg"]]
        assert gallery.images()["green/0.jpg"].mtime_ns == 5


def test_missing_images_are_deleted_only_with_prune(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    index(tmp_path / "g", tiny_bundle, colour_folder)
    shutil.rmtree(colour_folder / "red")
    report = index(tmp_path / "g", tiny_bundle, colour_folder)
    assert (report.removed, report.unchanged, len(contents(tmp_path / "g")[0])) == (0, 9, 12)
    report = index(tmp_path / "g", tiny_bundle, colour_folder, prune=True)
    assert (report.removed, report.unchanged, len(contents(tmp_path / "g")[0])) == (3, 9, 9)


def test_images_of_an_unreadable_folder_are_not_missing(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    index(tmp_path / "g", tiny_bundle, colour_folder)
    # As open_source gives it; not with chmod, because root may read every folder.
    rest = [item for item in open_source(colour_folder) if not item.path.startswith(("red", "blue"))]
    source = Source(colour_folder, (), None, lambda: iter([broken_item("red", "no permission"), *rest]))
    encoder = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu"))
    with Gallery.open(tmp_path / "g") as gallery:
        report = index_images(gallery, encoder, source, prune=True)
    assert report.skipped == [("red", "no permission")]
    assert report.removed == 3  # blue, which the source does not name


def test_an_image_that_broke_keeps_its_embedding(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    index(tmp_path / "g", tiny_bundle, colour_folder)
    (colour_folder / "red/0.jpg").write_bytes(b"")
    report = index(tmp_path / "g", tiny_bundle, colour_folder, prune=True)
    assert report.skipped == [("red/0.jpg", "the file is empty")]
    assert "red/0.jpg" in contents(tmp_path / "g")[0]


def test_an_archive_is_a_source_with_metadata(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard-000.tar", "w") as tar:
        for number, path in enumerate(find_images(colour_folder)):
            for name, content in (
                (f"{number:04d}{path.suffix}", path.read_bytes()),
                (f"{number:04d}.json", json.dumps({"camera": f"A{number % 2}", "hash": "mine"}).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    report = index(tmp_path / "tar", tiny_bundle, tmp_path / "shard-000.tar")
    index(tmp_path / "folder", tiny_bundle, colour_folder)
    assert report.added == 12
    (paths, embeddings), (_, expected) = contents(tmp_path / "tar"), contents(tmp_path / "folder")
    assert paths[0] == "shard-000.tar/0000.jpg"
    np.testing.assert_array_equal(embeddings, expected)
    with Gallery.open(tmp_path / "tar") as gallery:
        assert len(gallery.select("camera = 'A1' and hash_ = 'mine'")) == 6
    assert index(tmp_path / "tar", tiny_bundle, tmp_path / "shard-000.tar").unchanged == 12


def test_a_full_disk_leaves_the_last_commit(images: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """A real limit of the system: a file may have 4 KiB, and a shard of 400 embeddings is larger."""
    pytest.importorskip("resource")
    index(tmp_path / "g", tiny_bundle, images / "images.csv")
    before = everything(tmp_path / "g")
    code = (
        "import resource, sys, numpy as np; from clipret import Gallery, ClipretError; "
        "from clipret.gallery.gallery import ImageRecord; g = Gallery.open(sys.argv[1]); "
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "with g.writing():\n"
        "    g.append([ImageRecord(str(n), 1, 1, '') for n in range(400)], np.ones((400, 8), np.float16))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "g")], capture_output=True, text=True, check=False
    )
    assert "ClipretError" in done.stderr
    assert "what was committed before is kept" in done.stderr
    assert not list((tmp_path / "g").glob("*.tmp"))
    with Gallery.open(tmp_path / "g") as gallery, gallery.writing():
        pass  # deletes a shard that was written and not committed
    assert everything(tmp_path / "g") == before


def test_a_reader_sees_one_snapshot_while_another_process_writes(
    images: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    index(tmp_path / "g", tiny_bundle, images / "images.csv")
    stop, errors = threading.Event(), list[BaseException]()

    def read() -> None:
        try:
            while not stop.is_set():
                with Gallery.open(tmp_path / "g") as gallery:
                    stored = gallery.read()
                    assert (
                        len(stored.ids) == sum(map(len, stored.shards)) == sum(len(c.values) for c in stored.quantized)
                    )
                    live = len(stored.ids) if stored.live is None else int(stored.live.sum())
                    assert live in (190, 191)
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    embedding = np.ones((1, 8), np.float16)
    for number in range(20):
        with Gallery.open(tmp_path / "g") as gallery:
            with gallery.writing():
                gallery.append([type(gallery.images()["000.jpg"])("extra", number, 1, "")], embedding)
                gallery.remove([gallery.ids_by_path()["extra"]])
            compact_gallery(gallery)
    stop.set()
    reader.join()
    assert not errors


def test_a_caller_that_stops_early_leaves_no_threads(images: Path, tiny_bundle: Path) -> None:
    files = [path for path in find_images(images) if path.stat().st_size > 100]
    batches = Encoder(Bundle.open(tiny_bundle), EncoderConfig(batch_size=4)).encode_images(files)
    first = next(batches)
    assert [item.name for item in first.items] == ["000.jpg", "001.jpg", "002.jpg", "003.jpg"]
    batches.close()  # type: ignore[attr-defined]
    decoders = [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    for thread in decoders:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in decoders)


def test_images_before_the_damage_are_kept(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    def damaged() -> Iterator[Item]:
        yield broken_item("before.jpg", "no image")
        yield from list(open_source(colour_folder))[:5]
        raise ClipretError("the rest is damaged")

    encoder, source = (
        Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu")),
        Source(colour_folder, (), None, damaged),
    )
    with Gallery.create(tmp_path / "g", encoder.bundle, colour_folder) as gallery:
        with pytest.raises(ClipretError, match="the rest is damaged"):
            index_images(gallery, encoder, source)
        assert len(gallery) == 5
        assert (gallery.path / "skipped.tsv").read_text() == "path\treason\nbefore.jpg\tno image\n"


def test_no_member_leaves_its_archive(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    content = (colour_folder / "red/0.jpg").read_bytes()
    with zipfile.ZipFile(colour_folder / "evil.zip", "w") as archive:
        for name in ("../blue/0.jpg", "../../../x.jpg", "/y.jpg"):
            archive.writestr(name, content)
    with tarfile.open(colour_folder / "evil.tar", "w") as archive:
        archive.add(colour_folder / "red/0.jpg", "../blue/1.jpeg", filter=None)
    names = []
    for file in ("evil.zip", "evil.tar"):
        index(tmp_path / "g", tiny_bundle, colour_folder / file)
        names += [
            f"{file}/{name}" for name in (("blue/0.jpg", "x.jpg", "y.jpg") if ".zip" in file else ("blue/1.jpeg",))
        ]
        with Gallery.open(tmp_path / "g") as gallery:
            assert gallery.paths(gallery.read().ids) == names
            assert read_stored(Path(gallery.info.root), names[-1]).content == content


def test_an_archive_without_images_is_an_error(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    index(tmp_path / "g", tiny_bundle, colour_folder)
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ClipretError, match="names no images"):
        index(tmp_path / "g", tiny_bundle, tmp_path / "empty.tar", prune=True)
    assert len(contents(tmp_path / "g")[0]) == 12


def test_a_folder_under_another_name_is_the_same(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    index(tmp_path / "g", tiny_bundle, colour_folder)
    (tmp_path / "link").symlink_to(colour_folder)
    report = index(tmp_path / "g", tiny_bundle, tmp_path / "link")
    assert (report.added, report.unchanged) == (0, 12)


def test_a_second_annotations_file_adds_its_columns(images: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    index(tmp_path / "g", tiny_bundle, images / "images.csv")
    (images / "more.csv").write_text("path,colour\n003.jpg,red\n")
    index(tmp_path / "g", tiny_bundle, images / "more.csv")
    with Gallery.open(tmp_path / "g") as gallery:
        assert gallery.paths(gallery.select("colour = 'red' and camera = 'A0' and hour = 3")) == ["003.jpg"]
