"""The service over real connections: equal to the searcher, and consistent while the gallery changes."""

import asyncio
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from clipret import Bundle, Encoder, EncoderConfig, Gallery, Part, Query, Searcher
from clipret.cli import main

pytest.importorskip("fastapi", reason="needs the extra serve")
from clipret.server.app import Service
from clipret.server.limits import Limits
from clipret.server.run import open_service
from clipret.server.watch import GalleryWatch

pytestmark = pytest.mark.slow

TOKEN = {"Authorization": "Bearer secret"}
TEXTS = [f"{one} {two}" for one in ("red", "green", "blue", "grey") for two in ("car", "red", "blue", "truck")]


@pytest.fixture
def searcher(listed_gallery: Path, tiny_bundle: Path) -> Searcher:
    return Searcher(
        Gallery.open(listed_gallery), Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu", threads=1))
    )


def hits(reply: Any) -> list[list[tuple[int, int, float, str]]]:
    assert reply.status == 200, reply.body
    return [
        [(hit["rank"], hit["id"], hit["score"], hit["path"]) for hit in result["hits"]]
        for result in reply.json["results"]
    ]


def expected(searcher: Searcher, queries: list[Any], k: int, **options: Any) -> list[list[tuple[int, int, float, str]]]:
    results = searcher.search(queries, k, **options)
    return [[(hit.rank, hit.id, hit.score, hit.path) for hit in ranking] for ranking in results]


def test_a_search_has_the_results_of_the_searcher(serving: Callable[..., Any], searcher: Searcher) -> None:
    client = serving(searcher.gallery.path)
    assert hits(client.get("/search", q=["red", "红色 car"], k=5)) == expected(searcher, ["red", "红色 car"], 5)
    where, exclude = "colour <> 'red' and number < 2", [1, 2]
    reply = client.get("/search", q="blue", where=where, exclude=exclude, k=50, min_score=-0.3)
    assert hits(reply) == expected(searcher, ["blue"], 50, where=where, exclude=exclude, min_score=-0.3)
    assert reply.json["results"][0]["hits"][0]["metadata"] == {"colour": "blue", "number": 2} or exclude
    mixed = Query((Part("red"), Part("blue", -0.5)))
    assert hits(client.get("/search", q="red", minus="blue", k=12)) == expected(searcher, [mixed], 12)
    body = {"queries": ["grey", {"parts": [{"text": "red", "weight": 2}, {"text": "green"}]}], "k": 7}
    weighted = Query((Part("red", 2), Part("green")))
    assert hits(client.post("/search", body)) == expected(searcher, ["grey", weighted], 7)


def test_a_hit_has_metadata_and_urls(serving: Callable[..., Any], listed_gallery: Path) -> None:
    client = serving(listed_gallery)
    hit = client.get("/search", q="red", k=1, where="number = 2").json["results"][0]["hits"][0]
    assert hit["path"] == "red/2.png"
    assert hit["metadata"] == {"colour": "red", "number": 2}
    file = client.get("/" + hit["image"])
    assert file.body == (listed_gallery.parent / "images/red/2.png").read_bytes()
    assert file.headers["content-type"] == "image/png"
    assert "immutable" in file.headers["cache-control"]
    small = client.get("/" + hit["thumbnail"] + "&side=160")
    with Image.open(io.BytesIO(small.body)) as image:
        assert (image.format, image.size) == ("JPEG", (40, 34))
    again = client.request(
        "GET", "/" + hit["thumbnail"] + "&side=160", headers={"If-None-Match": small.headers["etag"]}
    )
    assert (again.status, again.body) == (304, b"")


def test_search_by_uploads(serving: Callable[..., Any], searcher: Searcher, colour_folder: Path) -> None:
    client = serving(searcher.gallery.path)
    files = [colour_folder / "green/1.jpeg", colour_folder / "blue/2.png"]
    uploads = [file.read_bytes() for file in files]
    images = [Query((Part(file),)) for file in files]
    assert hits(client.upload("/search", uploads)) == expected(searcher, images, 20)
    parts = {"queries": [{"parts": [{"image": 1}, {"text": "red", "weight": -1}, {"image": 0}]}], "k": 4}
    mixed = Query((Part(files[1]), Part("red", -1), Part(files[0])))
    assert hits(client.upload("/search", uploads, {"search": json.dumps(parts)})) == expected(searcher, [mixed], 4)


def test_search_by_an_image_of_the_gallery(serving: Callable[..., Any], searcher: Searcher) -> None:
    client = serving(searcher.gallery.path)
    number = searcher.gallery.id_of("grey/1.jpeg")
    similar = hits(client.get("/search", like=number, k=3))[0]
    assert {path.partition("/")[0] for *_, path in similar} == {"grey"}
    assert similar[0][2] == pytest.approx(1, abs=1e-3)
    others = hits(client.get("/search", like=number, exclude=number, k=12))[0]
    assert len(others) == 11
    assert number not in [id for _, id, *_ in others]


def test_concurrent_searches_form_batches(serving: Callable[..., Any], searcher: Searcher) -> None:
    client = serving(searcher.gallery.path)
    results = {text: expected(searcher, [text], 6) for text in TEXTS}
    barrier = threading.Barrier(16)

    def request(text: str) -> bool:
        barrier.wait()
        return all(hits(client.get("/search", q=text, k=6)) == results[text] for _ in range(8))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(request, TEXTS))
    samples = metrics(client)
    count = samples['clipret_batch_size_count{gallery="gallery"}']
    assert samples['clipret_batch_size_sum{gallery="gallery"}'] == 128
    assert count < 128


def metrics(client: Any) -> dict[str, float]:
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = dict[str, float]()
    for line in reply.body.decode().splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{[^{}]*\})? [-+0-9.e]+", line), line
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    return samples


def test_health_and_metrics(serving: Callable[..., Any], listed_gallery: Path) -> None:
    client = serving(listed_gallery)
    assert client.get("/healthz").json == {"status": "ok"}
    assert client.get("/readyz").json == {"status": "ready"}
    assert client.get("/search", q=" ").status == 422
    samples = metrics(client)
    assert samples['clipret_requests_total{route="/search",status="422"}'] == 1
    assert samples['clipret_images{gallery="gallery"}'] == 12
    assert samples['clipret_request_seconds_bucket{le="+Inf",route="/healthz"}'] == 1


def test_images_are_added_and_deleted_with_the_token(
    serving: Callable[..., Any], listed_gallery: Path, colour_folder: Path
) -> None:
    client = serving(listed_gallery, token="secret")
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), (250, 3, 2)).save(buffer, "PNG")
    new = buffer.getvalue()
    assert client.upload("/galleries/gallery/add", [new]).status == 401
    assert client.upload("/galleries/gallery/add", [new], Authorization="Bearer geheim-ü").status == 401
    assert client.get("/galleries").json[0]["images"] == 12
    metadata = {"metadata": json.dumps({"colour": "red", "path": "mine"})}
    reply = client.upload("/galleries/gallery/add", [new, new], metadata, **TOKEN)
    assert reply.status == 200, reply.body
    assert reply.json["images"] == [{"id": 13, "new": True}] * 2
    hit = client.get("/search", q="red", where="path_ = 'mine'").json["results"][0]["hits"]
    assert [image["id"] for image in hit] == [13]  # at once
    assert re.fullmatch(r"added/[0-9a-f]{32}\.png", hit[0]["path"])
    assert hit[0]["metadata"] == {"colour": "red", "number": None, "path_": "mine"}
    assert client.get("/" + hit[0]["image"]).body == new
    again = client.upload("/galleries/gallery/add", [new], {"metadata": '{"number": 9}'}, **TOKEN)
    assert again.json["images"] == [{"id": 13, "new": False}]
    assert client.get("/search", q="red", where="number = 9").json["results"][0]["hits"][0]["id"] == 13
    assert client.request("DELETE", "/galleries/gallery/images/13").status == 401
    assert client.request("DELETE", "/galleries/gallery/images/13", headers=TOKEN).status == 200
    assert client.request("DELETE", "/galleries/gallery/images/13", headers=TOKEN).status == 404
    assert client.get("/images/13").status == 404
    assert client.get("/search", q="red", where="number = 9").json["results"] == [{"hits": []}]
    assert not list((listed_gallery / "added").iterdir())
    number = client.get("/search", q="blue", k=1).json["results"][0]["hits"][0]["id"]
    assert client.request("DELETE", f"/galleries/gallery/images/{number}", headers=TOKEN).status == 200
    assert len(list((colour_folder / "blue").iterdir())) == 3  # the file of an indexed image stays


def test_an_addition_is_complete_or_refused(
    serving: Callable[..., Any], listed_gallery: Path, colour_folder: Path
) -> None:
    client = serving(listed_gallery, token="secret")
    good = (colour_folder / "red/0.jpg").read_bytes()
    reply = client.upload("/galleries/gallery/add", [good, good[:300]], **TOKEN)
    assert reply.status == 422
    assert "the image cannot be used" in reply.error
    assert client.get("/galleries").json[0]["images"] == 12
    assert not (listed_gallery / "added").exists()
    with Gallery.open(listed_gallery) as gallery, gallery.writing():
        busy = client.upload("/galleries/gallery/add", [good], **TOKEN)
    assert busy.status == 409
    assert busy.error == "another process is writing to gallery: wait for it to end, then try again"


def test_a_service_without_a_token_is_read_only(serving: Callable[..., Any], listed_gallery: Path) -> None:
    client = serving(listed_gallery)
    assert client.upload("/galleries/gallery/add", [b"x"], Authorization="Bearer ").status == 403
    assert client.request("DELETE", "/galleries/gallery/images/1", headers=TOKEN).status == 403
    assert client.get("/galleries").json[0]["writable"] is False


# Every generation is one commit with new embeddings, ids and metadata of all images. Sometimes an image is removed, or
# the gallery is compacted, which deletes files.
CHANGES = """
import sys
from clipret import Gallery, compact_gallery
from clipret.gallery.gallery import ImageRecord
from clipret.ranking.embedding_shards import EmbeddingShards
import numpy as np
gallery = Gallery.open(sys.argv[1])
stored = gallery.read()
embeddings = EmbeddingShards(stored.shards).take(np.arange(12))
records = gallery.images_of(stored.ids)
for generation in range(1, int(sys.argv[2]) + 1):
    with gallery.writing():
        gallery.append(records, embeddings, [{"generation": generation}] * 12)
    if generation % 3 == 1:
        with gallery.writing():
            gallery.remove([gallery.id_of("red/0.jpg")])
    if generation % 3 == 2:
        compact_gallery(gallery)
    if generation % 10 == 0:
        print(generation, flush=True)
        sys.stdin.readline()  # wait until a client has seen it
"""


def test_a_gallery_that_changes_while_64_clients_search(serving: Callable[..., Any], listed_gallery: Path) -> None:
    client = serving(listed_gallery, limits=Limits(reload=0.02))
    ended = threading.Event()
    generations = 40
    answered = set[int]()

    def request(number: int) -> list[tuple[int, int]]:
        seen = []
        where = {"where": "id > 0 and path <> 'x'"} if number % 4 == 0 else {}
        while not ended.is_set() or not seen:
            reply = client.get("/search", q=TEXTS[number % 16], k=20, **where)
            assert reply.status == 200, reply.body
            results = reply.json["results"][0]["hits"]
            [generation] = {hit["metadata"].get("generation") for hit in results}
            paths = {hit["path"] for hit in results}
            assert len(paths) == len(results) == reply.json["images"]
            assert len(results) == 12 or (len(results) == 11 and "red/0.jpg" not in paths)
            assert max(hit["id"] for hit in results) - min(hit["id"] for hit in results) < 12
            seen.append((generation or 0, reply.json["snapshot"]))
            answered.add(generation or 0)
        return seen

    with ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(request, number) for number in range(64)]
        try:
            command = [sys.executable, "-c", CHANGES, str(listed_gallery), str(generations)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as changes:
                assert changes.stdin is not None
                assert changes.stdout is not None
                for line in changes.stdout:
                    deadline = time.monotonic() + 120
                    while int(line) not in answered:
                        assert time.monotonic() < deadline
                        time.sleep(0.02)
                    print(file=changes.stdin, flush=True)
            assert changes.returncode == 0
        finally:
            ended.set()
        for answer in answers:
            assert answer.result() == sorted(answer.result())  # no client sees an older snapshot after a newer one
        assert len({generation for answer in answers for generation, _ in answer.result()}) > 3
    assert client.get("/galleries").json[0]["reload_failing"] is False
    # Generation 40 lacks the removed image.
    assert client.get("/galleries").json[0]["images"] == 11


def test_additions_and_deletions_while_64_clients_search(
    serving: Callable[..., Any], listed_gallery: Path, colour_folder: Path, tmp_path: Path
) -> None:
    """Additions by `clipret-search index` and by the service in turn: all images of one appear at once."""
    client = serving(listed_gallery, token="secret", limits=Limits(reload=0.02))
    files = [(colour_folder / colour / "0.jpg").read_bytes() for colour in ("red", "green", "blue")]
    ended = threading.Event()

    def request(number: int) -> list[int]:
        seen = []
        while not ended.is_set() or not seen:
            reply = client.get("/search", q=TEXTS[number % 16], k=200)
            assert reply.status == 200, reply.body
            found = reply.json["results"][0]["hits"]
            assert len({hit["id"] for hit in found}) == len(found) == reply.json["images"]
            groups = Counter(hit["metadata"].get("added") for hit in found)
            indexed = groups.pop(None)
            assert 12 - indexed <= len(groups)  # one of the first is deleted after each addition
            assert set(groups.values()) <= {3}
            assert sorted(groups) == list(range(len(groups)))
            seen.append(reply.json["snapshot"])
        return seen

    with ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(request, number) for number in range(64)]
        try:
            for number in range(8):
                new = [content + bytes([number]) for content in files]  # bytes after the end of a JPEG are ignored
                if number % 2:
                    metadata = {"metadata": json.dumps({"added": number})}
                    reply = client.upload("/galleries/gallery/add", new, metadata, **TOKEN)
                    assert reply.status == 200, reply.body
                    assert [image["new"] for image in reply.json["images"]] == [True] * 3
                else:
                    lines = ["path,added"]
                    for at, content in enumerate(new):
                        (tmp_path / f"{number}-{at}.jpg").write_bytes(content)
                        lines.append(f"{number}-{at}.jpg,{number}")
                    (tmp_path / "new.csv").write_text("\n".join(lines) + "\n")
                    command = [
                        "index",
                        str(listed_gallery),
                        str(tmp_path / "new.csv"),
                        "--device",
                        "cpu",
                        "--encoder",
                        "threads=1",
                    ]
                    result = CliRunner().invoke(main, command)
                    assert result.exit_code == 0, result.output
                gone = client.request("DELETE", f"/galleries/gallery/images/{number + 1}", headers=TOKEN)
                assert gone.status == 200, gone.body
        finally:
            ended.set()
        for answer in answers:
            assert answer.result() == sorted(answer.result())
    assert client.get("/galleries").json[0]["images"] == 12 + 8 * 3 - 8


def test_a_change_that_cannot_be_read_keeps_the_old_snapshot(serving: Callable[..., Any], listed_gallery: Path) -> None:
    client = serving(listed_gallery, limits=Limits(reload=0.02))
    before = hits(client.get("/search", q="red"))
    hidden = listed_gallery.with_name("hidden")
    listed_gallery.rename(hidden)
    deadline = time.monotonic() + 30
    while not client.get("/galleries").json[0]["reload_failing"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert hits(client.get("/search", q="red")) == before
    assert metrics(client)['clipret_reload_failing{gallery="gallery"}'] == 1
    hidden.rename(listed_gallery)
    while client.get("/galleries").json[0]["reload_failing"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_galleries(serving: Callable[..., Any], listed_gallery: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    other = tmp_path / "other" / "gallery"
    other.parent.mkdir()
    with Gallery.create(other, Bundle.open(tiny_bundle), tmp_path):
        pass
    client = serving(listed_gallery, other)
    assert [(gallery["name"], gallery["images"]) for gallery in client.get("/galleries").json] == [
        ("gallery", 12),
        ("gallery-2", 0),
    ]
    assert client.get("/search", q="red", gallery="gallery-2").json["results"] == [{"hits": []}]
    assert "GET /galleries" in client.get("/search", q="red", gallery="gallery-3").error
    choices = client.get("/galleries/gallery/choices").json
    assert choices["colour"] == [{"value": name, "images": 3} for name in ("blue", "green", "grey", "red")]
    assert choices["number"][0] == {"value": 0, "images": 4}


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_examples_of_the_guide(serving: Callable[..., Any], listed_gallery: Path, tmp_path: Path) -> None:
    client = serving(listed_gallery, token="secret")
    for name in ("car.jpg", "a.jpg", "b.jpg"):
        Image.new("RGB", (20, 20), (200, 0, ord(name[0]))).save(tmp_path / name)
    guide = (Path(__file__).parents[3] / "docs" / "serve.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", guide, re.DOTALL)
    commands = [one for block in blocks for one in re.split(r"\n(?=\S)", block) if one.startswith("curl")]
    assert len(commands) == 8
    # The gallery of the guide has other columns and more images.
    for old, new in (
        ("camera = 'A3' and hour", "colour = 'red' and number"),
        ("17", "7"),
        (":8000", f":{client.port}"),  # last: a port may hold a 17
    ):
        commands = [command.replace(old, new) for command in commands]
    for command in commands:
        result = subprocess.run(
            ["sh", "-c", command.replace("curl", "curl --silent --show-error --fail-with-body", 1)],
            cwd=tmp_path,
            env={**os.environ, "TOKEN": "secret"},
            capture_output=True,
            check=False,
        )
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        value = json.loads(result.stdout)
        assert "error" not in value
        assert all(one["hits"] for one in value.get("results", [])), command


def test_stopping_waits_for_a_running_reload(
    listed_gallery: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the connection that a reload is using in its thread would crash Python."""
    calls = list[str]()

    class SlowWatch(GalleryWatch):
        def changed(self) -> bool:
            calls.append("begin")
            time.sleep(0.2)
            changed = super().changed()
            calls.append("end")
            return changed

        def close(self) -> None:
            calls.append("close")
            super().close()

    async def start_and_stop(service: Service) -> None:
        gallery = service.gallery(None)
        await gallery.start()
        await asyncio.sleep(0.1)  # a reload is running
        await gallery.stop()

    monkeypatch.setattr("clipret.server.service.GalleryWatch", SlowWatch)
    encoder = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu", threads=1))
    with open_service([(listed_gallery, encoder)]) as service:
        calls.clear()
        asyncio.run(start_and_stop(service))
    assert calls == ["begin", "end", "close"]
