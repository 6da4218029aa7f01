"""Interrupted indexing: whatever stops it, the gallery opens, and the next run ends where an undisturbed one would."""

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipret import Bundle, Encoder, Gallery, index_pictures
from clipret.images import find_pictures

# Small shards, so that every run has many commits.
COMMAND = "import clipret.indexing as i; i._SHARD_ROWS = 8; from clipret.cli import main; main()"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(200):
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(folder / f"{number:03d}.jpg")
    return folder


def contents(folder: Path) -> tuple[list[str], np.ndarray]:
    with Gallery.open(folder) as gallery:
        stored = gallery.read()
        return gallery.paths(stored.ids), np.concatenate([np.empty((0, 8), np.float16), *stored.shards])


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_goes_on_where_it_was(pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    random.seed(0)
    sizes = []
    for attempt in range(12):
        arguments = ["index", str(tiny_bundle), str(pictures), str(tmp_path / "killed"), "--batch-size", "8"]
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        shards = len(list((tmp_path / "killed").glob("rows-*.npy")))
        deadline = time.monotonic() + 60
        # Wait for it to have written something, then strike at some instant.
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "killed").glob("rows-*.npy"))) > shards:
                time.sleep(random.random() * 0.01)
                break
        process.send_signal(signal.SIGINT if attempt % 4 == 3 else signal.SIGKILL)
        process.wait()
        paths, rows = contents(tmp_path / "killed")
        assert len(paths) == len(rows) == len(set(paths))
        sizes.append(len(paths))
    assert sizes == sorted(sizes)  # nothing that was committed is lost
    assert sizes[0] < 200

    bundle = Bundle.open(tiny_bundle)
    with Gallery.open(tmp_path / "killed") as gallery:
        index_pictures(gallery, Encoder(bundle), find_pictures(pictures))
    with Gallery.create(tmp_path / "whole", bundle, pictures) as gallery:
        index_pictures(gallery, Encoder(bundle), find_pictures(pictures))
    (paths, rows), (expected_paths, expected) = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    assert paths == expected_paths
    np.testing.assert_array_equal(rows, expected)


def test_a_caller_that_stops_early_leaves_no_threads(pictures: Path, tiny_bundle: Path) -> None:
    batches = Encoder(Bundle.open(tiny_bundle), batch_size=4).encode_images(find_pictures(pictures), lambda path: path)
    first = next(batches)
    assert [item.name for item in first.items] == ["000.jpg", "001.jpg", "002.jpg", "003.jpg"]
    batches.close()  # type: ignore[attr-defined]
    decoders = [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    for thread in decoders:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in decoders)
