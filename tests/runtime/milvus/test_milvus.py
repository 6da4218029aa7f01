"""A gallery in Milvus Lite, a real database in a file: the same images found, filters, synchronisation, errors."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from clipret import Bundle, ClipretError, Encoder, EncoderConfig, Gallery, Part, Query, Searcher
from clipret.cli import main
from clipret.gallery.gallery import ImageRecord
from clipret.milvus.collection import Address, Collection, _advice
from clipret.milvus.export import MilvusReport, export_to_milvus
from clipret.milvus.filter import translate
from clipret.milvus.search import MilvusCollection, agreement, open_milvus

pytest.importorskip("pymilvus", reason="needs the extra milvus")
pytest.importorskip("milvus_lite", reason="needs the extra milvus")
# Its servers' threads and sockets end with the process, later than a test.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
]

ROWS = 3000


@pytest.fixture
def gallery(tiny_bundle: Path, tmp_path: Path) -> Iterator[Gallery]:
    """Rows without images: of two directions, many alike, with columns; some equal, some deleted."""
    bundle = Bundle.open(tiny_bundle)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((ROWS, bundle.manifest.embedding_dim)) + 3 * rng.standard_normal(
        (1, bundle.manifest.embedding_dim)
    )
    rows[1500:1510] = rows[7]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    images = [
        ImageRecord(f"{number % 7}/im_{number:04d}.jpg", 1000 + number, number, f"{number:032x}")
        for number in range(ROWS)
    ]
    metadata = [
        {
            "camera": f"A{number % 5}",
            "hour": number % 24 if number % 3 else None,
            "Größe cm": number / 10,
            "note": 'say "hi"',
        }
        for number in range(ROWS)
    ]
    with Gallery.create(tmp_path / "gallery", bundle, tmp_path) as made, made.writing():
        made.append(images[:2000], rows[:2000], metadata[:2000])
        made.append(images[2000:], rows[2000:], metadata[2000:])
        made.remove(list(range(100, 130)))
        yield made


@pytest.fixture
def address(tmp_path: Path) -> Address:
    return Address.parse(str(tmp_path / "images.db"))


@pytest.fixture
def encoder(tiny_bundle: Path) -> Encoder:
    return Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu", threads=1))


def both(gallery: Gallery, address: Address, encoder: Encoder) -> tuple[Searcher, MilvusCollection, Searcher]:
    """A searcher of the gallery; the collection and a searcher of it."""
    collection = open_milvus(str(address))
    return Searcher(gallery, encoder), collection, Searcher(collection, encoder)


QUERIES = ["red", "a blue car", Query((Part("green"), Part("red", -0.5)))]


def test_flat_finds_what_the_gallery_finds(gallery: Gallery, address: Address, encoder: Encoder) -> None:
    assert export_to_milvus(gallery, address) == MilvusReport(ROWS - 30, 0, ROWS - 30)
    exact, collection, there = both(gallery, address, encoder)
    with there:
        rows = np.concatenate([exact.embed(QUERIES), gallery.read().shards[0][[7, 500]].astype(np.float64)])
        for options in (
            {},
            {"where": "camera = 'A3' and hour < 6"},
            {"where": "path glob '3/im_*' or hour is null", "exclude": [8, 1501]},
            {"min_score": 0.9},
            {"where": "camera = 'nowhere'"},
        ):
            # The same ids, paths, files and, bit for bit, scores; ten equal rows come by age.
            assert there.search_embeddings(rows, 10, **options) == exact.search_embeddings(rows, 10, **options)
        assert there.search(QUERIES, 3) == exact.search(QUERIES, 3)
        assert collection.count() == exact.searched.count() == ROWS - 30
        assert collection.columns == exact.searched.columns
        ids = [1, 2000, 5]
        assert collection.metadata(ids) == exact.searched.metadata(ids)
        assert collection.records(ids) == exact.searched.records(ids)
        assert collection.records([100]) == {}  # it was deleted
        np.testing.assert_array_equal(collection.embedding(5), exact.searched.embedding(5))
        for searched in (collection, exact.searched):
            with pytest.raises(ClipretError, match="there is no image 100"):
                searched.embedding(100)
        assert there.id_of("3/im_0010.jpg") == exact.id_of("3/im_0010.jpg") == gallery.id_of("3/im_0010.jpg")
        for searcher in (there, exact):
            with pytest.raises(ClipretError, match="holds no image"):
                searcher.id_of("2/im_0100.jpg")
        with pytest.raises(ClipretError, match="cannot return all embeddings: search the gallery"):
            _ = there.stored


FILTERS = [
    "camera = 'A3'",
    "camera <> 'A3' and not hour = 7",
    "hour != 7",
    "not (hour < 6 or camera in ('A1', 'A2'))",
    "hour between 3 and 5",
    "hour not between 3 and 5",
    "hour = '7'",
    "7 <= hour",
    "hour is null",
    "hour notnull and id > 2900",
    "hour not in (1, 2, 3)",
    '"Größe cm" > 12.5 and "Größe cm" <= 1e2',
    "path glob '1/im_00?5.jpg'",
    "path not glob '1/*'",
    "path like '2/%00%'",
    "note = 'say \"hi\"' and size = 1005",
    "id in (5, 6, 7) or hash = '00000000000000000000000000000010'",
    "mtime_ns < 5",
    "hour > -1 and CAMERA == 'A0'",
    "note like '%\"%\"' and id < 10",
]


def test_filters_mean_the_same(gallery: Gallery, address: Address) -> None:
    export_to_milvus(gallery, address)
    there = open_milvus(str(address))
    with there:
        for where in FILTERS:
            found = there.client.query(there.filter(where) or "", ["id"], limit=ROWS)
            expected = gallery.select(where).tolist()
            assert sorted(one["id"] for one in found) == expected, where
            assert 0 < len(expected) < ROWS - 30, where


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("hour + 1 < 6", "the column hour is not compared"),
        ("lower(camera) = 'a3'", "it has no function lower"),
        ("path like 'red/%'", "write GLOB"),
        ("hour % 2 = 0", "cannot be said there"),
        ("nothing = 1", "there is no column 'nothing'"),
        ("hour < id", "id is a column where a value should be"),
        ("hour", "the column hour is not compared"),
        ("camera = 'A", "cannot be said there"),
        ("(hour < 6", "the end"),
        ("path glob '[ab]*'", "GLOB with"),
        ("id = 'x'", "id is a number"),
        ("hour < 6; drop", "cannot be said there"),
        ("hour <", "ends too early"),
    ],
)
def test_what_milvus_cannot_say_is_refused(where: str, reason: str) -> None:
    with pytest.raises(ClipretError, match=reason) as caught:
        translate(where, ["camera", "hour"])
    assert "cannot be asked of Milvus" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_changes_are_sent(gallery: Gallery, address: Address, encoder: Encoder) -> None:
    export_to_milvus(gallery, address)
    assert export_to_milvus(gallery, address) == MilvusReport(0, 0, ROWS - 30)
    dim = gallery.info.embedding_dim
    rows = np.eye(dim)[:3].astype(np.float32)
    gallery.remove([1, 2, 3, 4])
    gallery.append(
        [ImageRecord(f"new/{number}.jpg", 1, 1, f"n{number}") for number in range(3)], rows, [{"new": 5}] * 3
    )
    [moved] = gallery.images_of([10])
    gallery.update({10: (ImageRecord("moved.jpg", moved.size, 99, moved.hash), {"camera": None, "hour": 3})})
    # A new column makes no old record another one: it is null there.
    assert export_to_milvus(gallery, address) == MilvusReport(4, 4, ROWS - 31)
    assert export_to_milvus(gallery, address) == MilvusReport(0, 0, ROWS - 31)
    gallery.remove([50])
    [moved] = gallery.images_of([11])
    gallery.update({11: (moved, {"camera": None})})
    assert export_to_milvus(gallery, address) == MilvusReport(1, 1, ROWS - 32)
    exact, collection, there = both(gallery, address, encoder)
    with there:
        assert there.search_embeddings(rows, 5) == exact.search_embeddings(rows, 5)
        assert there.search(["red"], 5, where="new = 5") == exact.search(["red"], 5, where="new = 5")
        assert list(collection.metadata([10, 11]).values()) == gallery.metadata([10, 11])
        found = collection.client.query(collection.filter("camera is null") or "", ["id"])
        assert sorted(one["id"] for one in found) == gallery.select("camera is null").tolist()
    # A part of the gallery alone: the collection becomes what is asked.
    assert export_to_milvus(gallery, address, where="hour = 3").total == len(gallery.select("hour = 3"))


def test_a_half_finished_export(
    gallery: Gallery, address: Address, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Collection.upsert
    calls = iter(range(100))

    def broken(self: Collection, entities: object) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        sent(self, entities)  # type: ignore[arg-type]

    monkeypatch.setattr(Collection, "upsert", broken)
    with pytest.raises(KeyboardInterrupt):
        export_to_milvus(gallery, address)
    for _ in range(2):
        with pytest.raises(
            ClipretError, match=r"is half full, .*: run  clipret-search export .* --to milvus .*  again"
        ):
            open_milvus(str(address))
    monkeypatch.undo()
    assert export_to_milvus(gallery, address) == MilvusReport(ROWS - 30 - 2048, 0, ROWS - 30)
    exact, collection, there = both(gallery, address, encoder)
    with there:
        assert there.search(QUERIES, 10) == exact.search(QUERIES, 10)
        assert not collection.changing


def test_another_models_or_gallerys_collection(
    gallery: Gallery, address: Address, tmp_path: Path, tiny_bundle: Path
) -> None:
    export_to_milvus(gallery, address)
    other = Gallery.create(tmp_path / "other", Bundle.open(tiny_bundle), tmp_path)
    with other, other.writing():
        other.append([ImageRecord("a.jpg", 1, 1, "a")], np.eye(gallery.info.embedding_dim, dtype=np.float32)[:1])
        for _ in range(2):
            with pytest.raises(ClipretError, match=r"holds gallery .*gallery: name another collection behind #"):
                export_to_milvus(other, address)
        assert export_to_milvus(other, Address(address.uri, "second")).total == 1
        assert export_to_milvus(other, address, take_over=True) == MilvusReport(1, ROWS - 31, 1)  # both have an image 1
    strange = tmp_path / "other" / "gallery.json"
    strange.write_text(strange.read_text().replace(other.info.fingerprint, "0" * 64))
    for _ in range(2):
        with (
            Gallery.open(tmp_path / "other") as changed,
            pytest.raises(ClipretError, match="holds rows of another model"),
        ):
            export_to_milvus(changed, address)
    with open_milvus(str(address)) as there:
        assert there.count() == 1  # nothing was lost


@pytest.mark.parametrize("index", ["IVF_FLAT", "HNSW"])
def test_what_an_index_loses_is_measured(index: str, gallery: Gallery, address: Address, encoder: Encoder) -> None:
    parameters = {"nlist": 64} if index == "IVF_FLAT" else {"M": 8, "efConstruction": 40}
    export_to_milvus(gallery, address, index=index, parameters=parameters)
    found = dict[int, float]()
    for width in (1, 64):
        options = {"nprobe": width} if index == "IVF_FLAT" else {"ef": 12 if width == 1 else 400}
        exact, collection, there = both(gallery, Address(address.uri, address.name, options), encoder)
        collection.client.address = Address(address.uri, address.name, options)
        with there:
            assert collection.client.index() == index
            report = agreement(collection, exact, ["red", "blue", "a green car", "grey"], ks=(1, 10))
        found[width] = report.recall[10]
        assert report.seconds > 0
        assert report.exact_seconds > 0
    assert 0 < found[1] <= found[64]
    assert found[64] > 0.97
    # The index of a collection that exists is changed in place.
    assert export_to_milvus(gallery, address, index="FLAT") == MilvusReport(0, 0, ROWS - 30)
    exact, collection, there = both(gallery, address, encoder)
    with there:
        assert collection.client.index() == "FLAT"
        assert agreement(collection, exact, ["red", "blue"]).recall == {1: 1.0, 10: 1.0, 100: 1.0}


def test_by_command(gallery: Gallery, tmp_path: Path) -> None:
    runner, target = CliRunner(), str(tmp_path / "images.db")

    def run(*words: str, code: int = 0) -> str:
        done = runner.invoke(main, list(words))
        assert done.exit_code == code, done.output
        return done.output

    folder = str(gallery.path)
    gallery.close()
    assert "2970 images (2970 sent, 0 deleted)" in run("export", folder, target, "--to", "milvus")
    assert "2970 images (0 sent, 0 deleted)" in run("export", folder, target, "--to", "milvus", "--index", "HNSW")
    words = ("red", "-k", "5", "--where", "camera = 'A1'", "--device", "cpu", "--json")
    collection = f"milvus+{target}#clipret?ef=400"
    assert json.loads(run("query", collection, *words)) == json.loads(run("query", folder, *words))
    (tmp_path / "queries.csv").write_text("path,caption\n1/im_0001.jpg,red\n2/im_0002.jpg,blue car\n")
    queries = str(tmp_path / "queries.csv")
    here = json.loads(run("eval", folder, queries, "--metric", "recall@100", "--device", "cpu", "--json"))
    assert json.loads(run("eval", collection, queries, "--metric", "recall@100", "--device", "cpu", "--json")) == here
    for against in ("exact", folder):
        output = run("eval", collection, queries, "--against", against, "--device", "cpu", "--json")
        assert json.loads(output)["recall@10 of exact"] > 0.5
    assert "queries a second" in run("eval", collection, queries, "--against", "exact", "--device", "cpu")
    # What cannot be done is one line.
    for words, reason in (
        (("eval", collection, queries, "--equal", "camera"), "search the gallery"),
        (("eval", folder, queries, "--against", "exact"), "name the collection as milvus"),
        (("query", collection, "red", "--rerank", "k_reciprocal=20"), "search the gallery"),
        (("query", collection, "red", "--where", "lower(camera) = 'x'"), "it has no function lower"),
        (("query", f"milvus+{target}#nothing", "red"), "does not exist: clipret-search export --to milvus makes it"),
        (("query", f"milvus+{tmp_path}/none.db", "red"), "does not exist"),
        (("query", "milvus+http://127.0.0.1:1", "red"), "check that the server runs"),
        (("query", "milvus+images", "red"), "is no Milvus"),
        (("export", folder, "http://root:secret@host:19530", "--to", "milvus"), "MILVUS_TOKEN"),
        (("export", folder, target, "--to", "milvus", "--index", "GPU_CAGRA"), "has no index GPU_CAGRA"),
    ):
        output = run(*words, code=1)
        assert reason in output, output
        assert len(output.strip().splitlines()) == 1, output
    assert not (tmp_path / "none.db").exists()


def test_who_may_not_is_told_what_to_do() -> None:
    server = Address.parse("http://host:19530")
    for said in ("auth check failure, please check username and password", "PrivilegeQuery: permission deny"):
        assert "MILVUS_TOKEN" in _advice(server, said)
    assert "server runs" in _advice(server, "Fail connecting to server on host:19530, server unavailable")


def test_other_processes(gallery: Gallery, address: Address) -> None:
    """A file is filled by one process and searched by another, but not while one has it open."""
    fill = [sys.executable, "-m", "clipret.cli", "export", str(gallery.path), address.uri, "--to", "milvus"]
    done = subprocess.run(fill, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = [sys.executable, "-m", "clipret.cli", "query", f"milvus+{address.uri}", "red", "-k", "1", "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "im_" in done.stdout
    with open_milvus(str(address)):
        done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "another process may have the file open" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_service_of_a_collection(listed_gallery: Path, serving: Callable[..., Any], tmp_path: Path) -> None:
    """It answers as the service of the gallery does, images and filters included."""
    target = str(tmp_path / "served.db")
    with Gallery.open(listed_gallery) as gallery:
        export_to_milvus(gallery, Address.parse(f"{target}#colours"))
    client = serving(listed_gallery, f"milvus+{target}#colours", token="secret")
    for asked in (
        {"q": "red", "k": 5},
        {"q": "green", "minus": "red", "k": 3, "where": "colour <> 'blue' and number < 2"},
        {"like": 4, "k": 3},
        {"like": 4, "k": 12, "min_score": 0.5},
    ):
        here, there = (client.get("/search", gallery=name, **asked) for name in ("gallery", "colours"))
        assert here.status == there.status == 200, there.body
        assert there.json["images"] == 12
        for mine, its in zip(here.json["results"][0]["hits"], there.json["results"][0]["hits"], strict=True):
            assert {**mine, "image": "", "thumbnail": ""} == {**its, "image": "", "thumbnail": ""}
    image = there.json["results"][0]["hits"][0]["image"]
    local = image.replace("colours", "gallery")
    assert client.request("GET", "/" + image).body == client.request("GET", "/" + local).body
    assert "no function lower" in client.get("/search", gallery="colours", q="red", where="lower(colour) = 'x'").error
    assert client.get("/images/99", gallery="colours").status == 404
    removed = client.request("DELETE", "/galleries/colours/images/1", headers={"Authorization": "Bearer secret"})
    assert "change its gallery, then run clipret-search export" in removed.error
