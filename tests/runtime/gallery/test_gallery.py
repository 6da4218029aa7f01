import json
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from clipret.bundle import Bundle
from clipret.errors import ClipretError
from clipret.gallery.compaction import compact_gallery
from clipret.gallery.gallery import Gallery, ImageRecord


def image(name: str) -> ImageRecord:
    return ImageRecord(name, 10, 20, "ab")


def unit_rows(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def gallery(tmp_path: Path, tiny_bundle: Path) -> Gallery:
    return Gallery.create(tmp_path / "gallery", Bundle.open(tiny_bundle), tmp_path / "images")


def test_rows_come_back_in_order_with_their_ids(gallery: Gallery) -> None:
    first, second = unit_rows(3), unit_rows(2, 1)
    with gallery.writing():
        gallery.append([image(name) for name in "abc"], first)
        gallery.append([image(name) for name in "de"], second)
    again = Gallery.open(gallery.path)
    stored = again.read()
    np.testing.assert_array_equal(np.concatenate(stored.shards), np.concatenate([first, second]).astype(np.float16))
    assert stored.live is None
    assert again.paths(stored.ids) == list("abcde")
    assert len(again) == 5
    assert again.ids_by_path()["d"] == stored.ids[3]


def test_a_changed_image_takes_the_old_ones_place(gallery: Gallery) -> None:
    with gallery.writing():
        gallery.append([image("a"), image("b")], unit_rows(2))
        gallery.append([image("a")], unit_rows(1, 1))
    stored = gallery.read()
    assert stored.live is not None
    assert stored.live.tolist() == [False, True, True]
    assert len(gallery) == 2


def test_readable_with_numpy_and_sqlite_alone(gallery: Gallery) -> None:
    with gallery.writing():
        gallery.append([image("x/y.jpg")], unit_rows(1))
    assert np.load(gallery.path / "rows-000001.npy").shape == (1, 8)
    with sqlite3.connect(gallery.path / "gallery.db") as database:
        assert database.execute("SELECT path, shard FROM rows").fetchall() == [("x/y.jpg", 1)]
    database.close()


def test_what_no_transaction_names_never_happened(gallery: Gallery) -> None:
    """A writer killed between renaming a shard and the commit leaves a file; readers ignore it, the next writer
    sweeps it and may use its number."""
    with gallery.writing():
        gallery.append([image("a")], unit_rows(1))
    np.save(gallery.path / "rows-000002.npy", unit_rows(9).astype(np.float16))
    (gallery.path / "rows.deadbeef.tmp").write_bytes(b"half")
    assert len(Gallery.open(gallery.path).read().shards) == 1
    with gallery.writing():
        assert not list(gallery.path.glob("*.tmp"))
        gallery.append([image("b")], unit_rows(1, 1))
    assert [len(shard) for shard in gallery.read().shards] == [1, 1]


def test_a_failed_commit_changes_nothing(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with gallery.writing():
        gallery.append([image("a")], unit_rows(1))
        with monkeypatch.context() as patch:
            patch.setattr("numpy.save", full)
            with pytest.raises(ClipretError, match=r"No space left on device.*committed before is kept"):
                gallery.append([image("b")], unit_rows(1, 1))
        assert sorted(gallery.images()) == ["a"]
        assert not list(gallery.path.glob("*.tmp"))
        with pytest.raises(ClipretError, match="not finite"):
            gallery.append([image("c")], np.full((1, 8), np.nan, np.float32))
        gallery.append([image("d")], unit_rows(1, 2))
    assert sorted(gallery.images()) == ["a", "d"]


def test_two_writers_are_refused(gallery: Gallery) -> None:
    other = Gallery.open(gallery.path)
    with gallery.writing(), pytest.raises(ClipretError, match="another process is writing"), other.writing():
        pass
    with other.writing():
        pass


def test_a_bundle_with_another_fingerprint_is_refused(gallery: Gallery, tiny_bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    manifest = json.loads((other / "bundle.json").read_text())
    manifest["image"]["resize"] = "squash"
    (other / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(ClipretError, match="made with another bundle"):
        gallery.bundle(other)


def test_the_bundle_is_found_after_both_have_moved(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "old/bundle")
    Gallery.create(tmp_path / "old/gallery", Bundle.open(tmp_path / "old/bundle"), tmp_path)
    (tmp_path / "old").rename(tmp_path / "new")
    gallery = Gallery.open(tmp_path / "new/gallery")
    assert gallery.bundle().path == tmp_path / "new/bundle"
    shutil.rmtree(tmp_path / "new/bundle")
    with pytest.raises(ClipretError, match="name it with --bundle"):
        gallery.bundle()


def test_damage_is_named(gallery: Gallery, tmp_path: Path) -> None:
    with gallery.writing():
        gallery.append([image("a")], unit_rows(1))
    np.save(gallery.path / "rows-000001.npy", np.zeros((4, 8), np.float16))
    with pytest.raises(ClipretError, match=r"holds float16 \[4, 8\], the database says float16 \[1, 8\]"):
        gallery.read()
    (gallery.path / "rows-000001.npy").write_bytes(b"not an array")
    with pytest.raises(ClipretError, match="cannot be read"):
        gallery.read()
    gallery.close()
    (gallery.path / "gallery.db").write_bytes(b"x" * 5000)
    with pytest.raises(ClipretError, match=r"gallery\.db is damaged"):
        len(gallery)
    gallery.close()
    (gallery.path / "gallery.db").unlink()
    with pytest.raises(ClipretError, match=r"gallery\.db cannot be opened"):
        len(gallery)
    info = json.loads((gallery.path / "gallery.json").read_text())
    (gallery.path / "gallery.json").write_text(json.dumps(info | {"bundle_relative": None}))
    with pytest.raises(ClipretError, match=r"is damaged \(bundle_relative is None"):
        Gallery.open(gallery.path)
    (gallery.path / "gallery.json").write_text("{}")
    with pytest.raises(ClipretError, match="is damaged"):
        Gallery.open(gallery.path)
    with pytest.raises(ClipretError, match="is no gallery"):
        Gallery.open(tmp_path)


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(ClipretError, match="is not empty and no gallery"):
        Gallery.create(tmp_path, Bundle.open(tiny_bundle), tmp_path)


def test_paths_outside_the_root_are_absolute(gallery: Gallery, tmp_path: Path) -> None:
    assert gallery.stored_path(tmp_path / "images/a/../b.jpg") == "b.jpg"
    assert gallery.stored_path(tmp_path / "elsewhere/b.jpg") == str(tmp_path / "elsewhere/b.jpg")
    assert gallery.file("b.jpg") == tmp_path / "images/b.jpg"


def fill(gallery: Gallery, counts: list[int]) -> np.ndarray:
    """Shards of so many images each, named by their number through all of them, with metadata."""
    rows = unit_rows(sum(counts))
    start = 0
    with gallery.writing():
        for count in counts:
            numbers = range(start, start + count)
            gallery.append(
                [image(f"{n}.jpg") for n in numbers],
                rows[start : start + count],
                [{"camera": f"A{n % 2}", "Hour": str(n)} for n in numbers],
            )
            start += count
    return rows.astype(np.float16)


def test_codes_belong_to_their_rows(gallery: Gallery) -> None:
    rows = fill(gallery, [3, 40, 2, 1])
    stored = gallery.read()
    assert [len(quantized.values) for quantized in stored.quantized] == [3, 40, 2, 1]
    start = 0
    for quantized in stored.quantized:
        again = quantized.center + np.float32(quantized.scale) * (quantized.values.astype(np.float32) - 128)
        lost = np.linalg.norm(rows[start : start + len(again)].astype(np.float32) - again, axis=1)
        assert lost.max() <= quantized.residual
        assert quantized.residual < 0.05
        start += len(again)
    # The second shard has many more rows than the first, so the center is its own; the later ones keep it.
    centers = [quantized.center.tobytes() for quantized in stored.quantized]
    assert centers[0] != centers[1] == centers[2] == centers[3]


def test_removed_images_are_gone_at_once_and_their_ids_are_never_used_again(gallery: Gallery) -> None:
    fill(gallery, [3, 2])
    ids = gallery.read().ids
    with gallery.writing():
        assert gallery.remove([ids[4], ids[1], 999]) == 2
        assert gallery.remove([ids[4]]) == 0
    assert sorted(gallery.images()) == ["0.jpg", "2.jpg", "3.jpg"]
    live = gallery.read().live
    assert live is not None
    assert live.tolist() == [True, False, True, True, False]
    assert compact_gallery(gallery) == 2
    with gallery.writing():
        gallery.append([image("new")], unit_rows(1))
    assert gallery.read().ids.tolist() == [ids[0], ids[2], ids[3], ids[4] + 1]
    with pytest.raises(ClipretError, match="holds no image 2 any more: open the gallery again"):
        gallery.paths([ids[1]])


def test_compaction_changes_nothing_that_is_live(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipret.gallery.compaction._ROWS", 4)
    rows = fill(gallery, [1, 1, 5, 1, 2])
    before = gallery.read()
    with gallery.writing():
        gallery.remove(before.ids[[0, 6]])
    assert compact_gallery(gallery) == 2
    after = gallery.read()
    keep = [1, 2, 3, 4, 5, 7, 8, 9]
    assert [len(shard) for shard in after.shards] == [4, 4]
    assert after.live is None
    np.testing.assert_array_equal(after.ids, before.ids[keep])
    np.testing.assert_array_equal(np.concatenate(after.shards), rows[keep])
    np.testing.assert_array_equal(np.concatenate(before.shards), rows)  # a search that was open goes on
    assert gallery.paths(gallery.select("camera = 'A1' and hour > 4")) == ["5.jpg", "7.jpg", "9.jpg"]
    assert len(list(gallery.path.glob("*.npy"))) == 4
    with sqlite3.connect(gallery.path / "gallery.db") as database:
        shards = database.execute("SELECT shard, count(*) FROM rows GROUP BY shard").fetchall()
    database.close()
    assert [count for _, count in shards] == [4, 4]


def test_compaction_of_nothing(gallery: Gallery) -> None:
    assert compact_gallery(gallery) == 0
    fill(gallery, [2])
    with gallery.writing():
        gallery.remove(gallery.read().ids)
    assert compact_gallery(gallery) == 2
    assert gallery.read().shards == []
    assert len(gallery) == 0


def test_lost_codes_are_made_anew(gallery: Gallery) -> None:
    rows = fill(gallery, [3])
    (gallery.path / "codes-000001.npy").unlink()
    with pytest.raises(ClipretError, match=r"codes-000001\.npy is missing: .*compact"):
        gallery.read()
    compact_gallery(gallery)
    np.testing.assert_array_equal(np.concatenate(gallery.read().shards), rows)


def test_images_are_found_by_any_name(gallery: Gallery, tmp_path: Path) -> None:
    fill(gallery, [2])
    number = gallery.ids_by_path()["1.jpg"]
    assert gallery.id_of("1.jpg") == gallery.id_of(str(tmp_path / "images/x/../1.jpg")) == number
    with pytest.raises(ClipretError, match=r"holds no image 7\.jpg"):
        gallery.id_of("7.jpg")


def test_metadata_columns_grow_and_values_are_replaced(gallery: Gallery) -> None:
    fill(gallery, [2])
    first, second = gallery.read().ids
    with gallery.writing():
        gallery.update({int(first): (image("moved.jpg"), {"HOUR": 7, 'odd "name"': None, "plate": "粤B12345"})})
    assert gallery.columns() == ["camera", "Hour", 'odd "name"', "plate"]
    assert gallery.metadata([second, first]) == [
        {"camera": "A1", "Hour": 1, 'odd "name"': None, "plate": None},
        {"camera": "A0", "Hour": 7, 'odd "name"': None, "plate": "粤B12345"},
    ]
    assert gallery.select("hour between 5 and 9 and plate like '粤%'").tolist() == [first]
    assert gallery.paths([first]) == ["moved.jpg"]


def test_a_new_version_of_an_image_keeps_what_was_known_of_it(gallery: Gallery) -> None:
    fill(gallery, [2])
    with gallery.writing():
        gallery.append([image("1.jpg")], unit_rows(1, 1), [{"colour": "red\ud800"}])
    number = gallery.ids_by_path()["1.jpg"]
    assert gallery.metadata([number]) == [{"camera": "A1", "Hour": 1, "colour": "red?"}]


def test_what_a_user_keeps_in_the_folder_stays(gallery: Gallery) -> None:
    fill(gallery, [1])
    for name in ("rows-all.npy", "codes-2026.npy.jsonl", "notes.tmp"):
        (gallery.path / name).touch()
    with gallery.writing():
        pass
    assert {"rows-all.npy", "codes-2026.npy.jsonl", "notes.tmp"} <= {file.name for file in gallery.path.iterdir()}


def test_the_number_of_a_shard_is_never_used_again(gallery: Gallery) -> None:
    fill(gallery, [2])
    with gallery.writing():
        gallery.remove(gallery.read().ids)
    compact_gallery(gallery)
    with gallery.writing():
        gallery.append([image("new")], unit_rows(1))
    assert not (gallery.path / "rows-000001.npy").exists()
    assert len(gallery.read().shards) == 1


def test_a_root_is_found_again_by_any_of_its_names(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a/images").mkdir(parents=True)
    gallery = Gallery.create(tmp_path / "g", Bundle.open(tiny_bundle), tmp_path / "a/../a/images")
    assert gallery.stored_path(tmp_path / "a/images/x.jpg") == "x.jpg"


def test_a_double_quoted_name_is_no_text(gallery: Gallery) -> None:
    fill(gallery, [4])
    assert len(gallery.select("\"camera\" = 'A0' and path <> 'a \"b\" c'")) == 2
    with pytest.raises(ClipretError, match=r"none of id, path, .*put strings in single quotes"):
        gallery.select("\"camrea\" <> 'A0'")


def test_a_database_in_use_is_not_called_damaged(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(gallery, [1])
    gallery.close()
    connect = sqlite3.connect
    monkeypatch.setattr("clipret.gallery.database.sqlite3.connect", lambda *a, **k: connect(*a, **k | {"timeout": 0}))
    other = connect(gallery.path / "gallery.db", isolation_level=None)
    assert len(gallery) == 1
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ClipretError, match="is in use by another process"):
        len(gallery)
    other.close()
    assert len(gallery) == 1


def test_threads_may_share_a_gallery(gallery: Gallery) -> None:
    fill(gallery, [50])

    def work(_: int) -> int:
        return len(gallery.select("camera = 'A1'")) + len(gallery.read().ids) + len(gallery.paths([1, 2]))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(200))) == {25 + 50 + 2}
