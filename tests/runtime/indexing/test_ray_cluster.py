"""Indexing on a real Ray cluster of several processes: the gallery of one process, whatever is killed on the way."""

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
from clipret.indexing.ray_worker import Part, Settings, encode_part
from clipret.sources.item import Item

pytest.importorskip("ray", reason="needs the extra ray")
pytest.importorskip("pyarrow", reason="needs the extra ray")
# Ray warns of its own settings, and leaves files and sockets open when its processes are ended.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)


@pytest.fixture(scope="module")
def settings(tiny_bundle: Path) -> Settings:
    config = EncoderConfig(device="cpu", threads=1, batch_size=8)
    return Settings(tiny_bundle, Bundle.open(tiny_bundle).fingerprint, config)


@pytest.fixture(scope="module")
def cluster(settings: Settings, upload: Callable[[str, Path], None]) -> Iterator[Pool]:
    """A cluster of this machine with two actors, started once. Its processes know the store, which comes first."""
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
    """Images with a number as metadata; every tenth is none."""
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


def alone(folder: Path, settings: Settings, source: Source) -> Gallery:
    encoder = Encoder(Bundle.open(settings.bundle), EncoderConfig(device="cpu", threads=1, batch_size=8))
    gallery = Gallery.create(folder, encoder.bundle, source.root)
    index_images(gallery, encoder, source)
    return gallery


def held(gallery: Gallery) -> list[tuple[Any, ...]]:
    """Everything that a gallery holds: ids, records, metadata, rows."""
    stored = gallery.read()
    ids = stored.ids if stored.live is None else stored.ids[stored.live]
    rows = np.concatenate(stored.shards) if stored.live is None else np.concatenate(stored.shards)[stored.live]
    known = zip(ids.tolist(), gallery.images_of(ids), gallery.metadata(ids), rows.tolist(), strict=True)
    return [(number, one, tuple(more.items()), tuple(row)) for number, one, more, row in known]


def assert_same(found: Gallery, expected: Gallery) -> None:
    left, right = held(found), held(expected)
    assert [one[:3] for one in left] == [one[:3] for one in right]
    # Batches are cut at the ends of parts, which an engine may notice in the last bit of float16.
    np.testing.assert_allclose([one[3] for one in left], [one[3] for one in right], atol=2**-10)


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
        expected = alone(tmp_path / f"{name}-alone", settings, source)
        gallery = Gallery.create(tmp_path / f"{name}-gallery", Bundle.open(settings.bundle), source.root)
        report = index_on_cluster(gallery, cluster, source)
        assert_same(gallery, expected)
        assert (gallery.path / "skipped.tsv").read_text() == (expected.path / "skipped.tsv").read_text()
        assert report.added == len(gallery)
        assert report.stages.compute_seconds > 0
    # Again: nothing is new, and what could not be read is still told.
    again = index_on_cluster(gallery, cluster, open_source(colour_folder))
    assert (again.added, again.changed, again.unchanged) == (0, 0, len(gallery))
    assert again.skipped == report.skipped


def checked(items: Callable[[], Iterator[Item]], name: str, folder: Path) -> Iterator[Item]:
    """The items of an archive, of which the first ten come at once and the others when the parity check is open."""
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
    """Every process that is in the middle of an archive is killed there."""
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    source, check = open_source(shards), tmp_path / "check"
    check.mkdir()
    streams = [replace(one, items=partial(checked, one.items, Path(one.first).name, check)) for one in source.streams]
    gallery = Gallery.create(tmp_path / "gallery", Bundle.open(settings.bundle), source.root)

    def kill() -> list[int]:
        """Not from within the run, which an archive may keep from going on: an actor takes its parts in any order."""
        wait_for(lambda: any(check.iterdir()))
        killed = [int(file.name.rpartition("-")[2]) for file in check.iterdir()]
        for process in killed:
            os.kill(process, signal.SIGKILL)
        (check / "open").touch()
        return killed

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        report = index_on_cluster(gallery, cluster, replace(source, streams=tuple(streams)))
        killed = killing.result()
    assert report.added == 216
    assert_same(gallery, alone(tmp_path / "alone", settings, source))
    first = next(file.name for file in check.iterdir() if file.name.endswith(f"-{killed[0]}"))
    again = [file.name for file in check.glob(f"{first.rpartition('-')[0]}-*")]
    assert len(again) > 1  # its archive was read again, by another process


def test_a_run_that_is_given_up_goes_on(cluster: Pool, settings: Settings, shards: str, tmp_path: Path) -> None:
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
    # The first two archives, 80 members, are known to be whole and are not opened any more.
    known = gallery.database.query("SELECT images FROM parts ORDER BY first")
    assert known == [(36,), (36,)]
    report = index_on_cluster(gallery, cluster, source)
    assert report.unchanged == kept
    assert report.added == 216 - kept
    assert_same(gallery, alone(tmp_path / "alone", settings, source))


def test_changes_and_prune(cluster: Pool, settings: Settings, shards: str, tmp_path: Path) -> None:
    gallery = Gallery.create(tmp_path / "gallery", Bundle.open(settings.bundle), tmp_path / "shards")
    index_on_cluster(gallery, cluster, open_source(shards))
    with gallery.writing():
        gallery.remove(gallery.select("path like '001.tar/%' and hour = 20"))  # of an archive that is whole: read again
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
    assert len(report.skipped) == 6 * 4  # those of archives that were not read again too


def test_too_small_a_cluster(cluster: Pool, settings: Settings) -> None:
    assert cluster.workers == 2
    with (
        pytest.raises(ClipretError, match="room for 2 workers of 1 threads, not 3: change --workers or --encoder"),
        connect("auto", settings, 3),
    ):
        pass


def test_a_part_without_a_cluster(settings: Settings, shards: str) -> None:
    """What the gallery holds is neither decoded nor, where size and time are the same, read."""
    items = list(open_source(Path(shards).parent / "000.tar"))
    held = {items[0].path: (items[0].size or 0, items[0].mtime_ns or 0, "")}
    held[items[1].path] = (0, 0, items[1].read().digest)
    [block] = encode_part(settings.open(), Part(0, lambda: iter(items), held))
    assert [one.path for one in block.results] == [item.path for item in items]
    assert (block.results[0].file, block.results[0].position) == (None, None)
    assert (block.results[1].file is not None, block.results[1].position) == (True, None)
    assert [one.position for one in block.results if one.position is not None] == list(range(34))
    assert [one.path[-8:] for one in block.results if one.reason] == [f"{n:04d}.jpg" for n in (9, 19, 29, 39)]
    assert block.last


def test_errors_before_a_gallery_is_made(settings: Settings, tiny_bundle: Path, shards: str, tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match="is another bundle on"):
        replace(settings, fingerprint="0" * 64).open()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for address, reason in ((f"127.0.0.1:{port}", "Connection refused"), ("nowhere", "an address is HOST:PORT")):
        # In a process of its own, where no cluster is connected to.
        code = "from clipret.cli import main; main()"
        words = [sys.executable, "-c", code, "index", str(tiny_bundle), shards, str(tmp_path / "gallery")]
        done = subprocess.run([*words, "--ray", address], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert f"the Ray cluster at {address} cannot be reached" in done.stderr
        assert reason in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "gallery").exists()
