"""Indexing on a Ray cluster of several processes: the gallery of a single process, also if workers are killed."""

import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipret import Bundle, ClipretError, Encoder, EncoderConfig, Gallery, Source, index_images, open_source
from clipret.indexing.ray_cluster import Pool, connect, index_on_cluster
from clipret.indexing.ray_worker import Settings, WorkUnit, encode_unit
from clipret.sources.item import Item

pytest.importorskip("ray", reason="needs the extra ray")
pytest.importorskip("pyarrow", reason="needs the extra ray")
# Ray warns about its own settings, and leaves files and sockets open when its processes end.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def settings(tiny_bundle: Path) -> Settings:
    config = EncoderConfig(device="cpu", threads=1, batch_size=8)
    return Settings(tiny_bundle, Bundle.open(tiny_bundle).fingerprint, config)


@pytest.fixture(scope="module")
def cluster(settings: Settings, upload: Callable[[str, Path], None]) -> Iterator[Pool]:
    """A local cluster with two actors, started once, after the store, whose address its processes inherit."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    assert upload
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        with connect("auto", settings) as pool:
            assert pool.workers == 2
            yield pool
    finally:
        ray.shutdown()


def image(number: int) -> bytes:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def shard(file: Path, numbers: Iterable[int]) -> None:
    """Images with a number as metadata; every tenth is not an image."""
    with tarfile.open(file, "w") as tar:
        for number in numbers:
            content = b"no image" if number % 10 == 9 else image(number)
            for name, data in ((f"{number:04d}.jpg", content), (f"{number:04d}.json", b'{"hour": %d}' % (number % 24))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> str:
    (tmp_path / "shards").mkdir()
    for number in range(6):
        shard(tmp_path / "shards" / f"{number:03d}.tar", range(40 * number, 40 * number + 40))
    return str(tmp_path / "shards" / "{000..005}.tar")


def index_alone(folder: Path, settings: Settings, source: Source) -> Gallery:
    encoder = Encoder(Bundle.open(settings.bundle), EncoderConfig(device="cpu", threads=1, batch_size=8))
    gallery = Gallery.create(folder, encoder.bundle, source.root)
    index_images(gallery, encoder, source)
    return gallery


def contents(gallery: Gallery) -> list[tuple[Any, ...]]:
    """Everything in a gallery: ids, records, metadata, embeddings."""
    stored = gallery.read()
    ids = stored.ids if stored.live is None else stored.ids[stored.live]
    embeddings = np.concatenate(stored.shards) if stored.live is None else np.concatenate(stored.shards)[stored.live]
    entries = zip(ids.tolist(), gallery.images_of(ids), gallery.metadata(ids), embeddings.tolist(), strict=True)
    return [(number, image, tuple(data.items()), tuple(embedding)) for number, image, data, embedding in entries]


def assert_same(gallery: Gallery, expected: Gallery) -> None:
    left, right = contents(gallery), contents(expected)
    assert [entry[:3] for entry in left] == [entry[:3] for entry in right]
    # Batches end with their unit; another batch size may change the last bit of float16.
    np.testing.assert_allclose([entry[3] for entry in left], [entry[3] for entry in right], atol=2**-10)


def test_the_gallery_is_that_of_one_process(
    cluster: Pool,
    settings: Settings,
    shards: str,
    colour_folder: Path,
    tmp_path: Path,
    upload: Callable[[str, Path], None],
) -> None:
    """Archives from a store, and a folder of files of this machine."""
    upload("lake", Path(shards).parent)
    (colour_folder / "broken.png").write_bytes(b"none")
    for name, where in (("shards", "s3://lake/{000..005}.tar"), ("folder", colour_folder)):
        source = open_source(where)
        expected = index_alone(tmp_path / f"{name}-alone", settings, source)
        gallery = Gallery.create(tmp_path / f"{name}-gallery", Bundle.open(settings.bundle), source.root)
        report = index_on_cluster(gallery, cluster, source)
        assert_same(gallery, expected)
        assert (gallery.path / "skipped.tsv").read_text() == (expected.path / "skipped.tsv").read_text()
        assert report.added == len(gallery)
        assert report.stages.compute_seconds > 0
    # Again: nothing is new, and unreadable images are reported again.
    again = index_on_cluster(gallery, cluster, open_source(colour_folder))
    assert (again.added, again.changed, again.unchanged) == (0, 0, len(gallery))
    assert again.skipped == report.skipped


def pausing(items: Callable[[], Iterator[Item]], name: str, folder: Path) -> Iterator[Item]:
    """The items of an archive: the first ten at once, the others when the file `open` exists."""
    for number, item in enumerate(items()):
        if number == 10:
            (folder / f"{name}-{os.getpid()}").touch()
            wait_for(lambda: (folder / "open").exists())
        yield item


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_worker_costs_no_image(cluster: Pool, settings: Settings, shards: str, tmp_path: Path) -> None:
    """Every process is killed in the middle of an archive."""
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    source, signals = open_source(shards), tmp_path / "signals"
    signals.mkdir()
    streams = [
        replace(stream, items=partial(pausing, stream.items, Path(stream.first).name, signals))
        for stream in source.streams
    ]
    gallery = Gallery.create(tmp_path / "gallery", Bundle.open(settings.bundle), source.root)

    def kill() -> list[int]:
        """In another thread: an actor takes its units in any order, so an archive may block the run."""
        wait_for(lambda: any(signals.iterdir()))
        killed = [int(file.name.rpartition("-")[2]) for file in signals.iterdir()]
        for process in killed:
            os.kill(process, signal.SIGKILL)
        (signals / "open").touch()
        return killed

    with ThreadPoolExecutor(1) as executor:
        killing = executor.submit(kill)
        report = index_on_cluster(gallery, cluster, replace(source, streams=tuple(streams)))
        killed = killing.result()
    assert report.added == 216
    assert_same(gallery, index_alone(tmp_path / "alone", settings, source))
    first = next(file.name for file in signals.iterdir() if file.name.endswith(f"-{killed[0]}"))
    again = [file.name for file in signals.glob(f"{first.rpartition('-')[0]}-*")]
    assert len(again) > 1  # its archive was read again, by another process


def test_an_interrupted_run_continues(cluster: Pool, settings: Settings, shards: str, tmp_path: Path) -> None:
    source = open_source(shards)
    gallery = Gallery.create(tmp_path / "gallery", Bundle.open(settings.bundle), source.root)

    def stop(items: Iterable[Item]) -> Iterator[Item]:
        for number, item in enumerate(items):
            if number == 100:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        index_on_cluster(gallery, cluster, source, stop)
    kept = len(gallery)
    assert 0 < kept < 216
    # The first two archives, 80 members, are complete and are not opened again.
    complete = gallery.database.query("SELECT images FROM parts ORDER BY first")
    assert complete == [(36,), (36,)]
    report = index_on_cluster(gallery, cluster, source)
    assert report.unchanged == kept
    assert report.added == 216 - kept
    assert_same(gallery, index_alone(tmp_path / "alone", settings, source))


def test_changes_and_prune(cluster: Pool, settings: Settings, shards: str, tmp_path: Path) -> None:
    gallery = Gallery.create(tmp_path / "gallery", Bundle.open(settings.bundle), tmp_path / "shards")
    index_on_cluster(gallery, cluster, open_source(shards))
    with gallery.writing():
        gallery.remove(
            gallery.select("path like '001.tar/%' and hour = 20")
        )  # of a complete archive, which is read again
    shard(tmp_path / "shards" / "005.tar", range(200, 220))
    os.utime(tmp_path / "shards" / "005.tar", ns=(1, 1))
    report = index_on_cluster(gallery, cluster, open_source(shards), prune=True)
    assert (report.added, report.changed, report.removed) == (2, 0, 18)
    assert report.unchanged == 5 * 36 + 18 - 2
    assert len(gallery) == 5 * 36 + 18


def test_a_broken_archive_stops_no_other(cluster: Pool, settings: Settings, shards: str, tmp_path: Path) -> None:
    file = tmp_path / "shards" / "002.tar"
    file.write_bytes(file.read_bytes()[:20000])
    gallery = Gallery.create(tmp_path / "gallery", Bundle.open(settings.bundle), tmp_path / "shards")
    with pytest.raises(ClipretError, match=r"002\.tar is damaged or not an archive .*; everything else is done$"):
        index_on_cluster(gallery, cluster, open_source(shards))
    assert 5 * 36 < len(gallery) < 6 * 36
    shard(file, range(80, 120))
    report = index_on_cluster(gallery, cluster, open_source(shards))
    assert len(gallery) == 6 * 36
    assert len(report.skipped) == 6 * 4  # also those of archives that were not read again


def test_too_small_a_cluster(cluster: Pool, settings: Settings) -> None:
    assert cluster.workers == 2
    with (
        pytest.raises(ClipretError, match="room for 2 workers of 1 threads, not 3: change --workers or --encoder"),
        connect("auto", settings, 3),
    ):
        pass


def test_a_unit_without_a_cluster(settings: Settings, shards: str) -> None:
    """Images of the gallery are not decoded and, if size and time are the same, not read."""
    items = list(open_source(Path(shards).parent / "000.tar"))
    indexed = {items[0].path: (items[0].size or 0, items[0].mtime_ns or 0, "")}
    indexed[items[1].path] = (0, 0, items[1].read().digest)
    [block] = encode_unit(settings.open(), WorkUnit(0, lambda: iter(items), indexed))
    assert [result.path for result in block.results] == [item.path for item in items]
    assert (block.results[0].file, block.results[0].position) == (None, None)
    assert (block.results[1].file is not None, block.results[1].position) == (True, None)
    assert [result.position for result in block.results if result.position is not None] == list(range(34))
    assert [result.path[-8:] for result in block.results if result.reason] == [f"{n:04d}.jpg" for n in (9, 19, 29, 39)]
    assert block.last


def test_errors_before_a_gallery_is_created(settings: Settings, tiny_bundle: Path, shards: str, tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match="is another bundle on"):
        replace(settings, fingerprint="0" * 64).open()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for address, reason in ((f"127.0.0.1:{port}", "Connection refused"), ("nowhere", "an address is HOST:PORT")):
        # In another process, which is not connected to a cluster.
        code = "from clipret.cli import main; main()"
        words = [sys.executable, "-c", code, "index", str(tiny_bundle), shards, str(tmp_path / "gallery")]
        done = subprocess.run([*words, "--ray", address], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert f"the Ray cluster at {address} cannot be reached" in done.stderr
        assert reason in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "gallery").exists()
