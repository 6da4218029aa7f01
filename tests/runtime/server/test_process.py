"""The service as a process: where it listens, and how it ends."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
from clipret import Gallery
from clipret.gallery.database import ImageRecord
from clipret.server.limits import Limits

pytestmark = pytest.mark.slow

# A search for what is not there that takes as long as the limits of a filter allow, for each image.
SLOW = f"hex(zeroblob(32000)) || path not like '%{'0' * 190}z'"


@pytest.fixture
def slow_gallery(listed_gallery: Path) -> Path:
    """With images enough for SLOW to take a minute."""
    with Gallery.open(listed_gallery) as gallery, gallery.writing():
        rows = np.ones((2000, gallery.info.embedding_dim), np.float16)
        gallery.append([ImageRecord(f"none/{number}.png", 1, 1, "") for number in range(len(rows))], rows)
    return listed_gallery


@contextlib.contextmanager
def command(gallery: Path, folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`clipret-search serve` as a process of its own, and its port."""
    (folder / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "PYTHONUNBUFFERED": "1"}
    line = [
        sys.executable,
        "-m",
        "clipret.cli",
        "serve",
        str(gallery),
        "--port",
        "0",
        "--encoder",
        "threads=1",
        *options,
    ]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as it:
        try:
            assert it.stdout is not None
            assert it.stderr is not None
            told = it.stdout.readline()
            found = re.fullmatch(r"serving gallery at http://127\.0\.0\.1:(\d+)/\n", told)
            assert found, told + it.stderr.read()
            yield it, int(found[1])
        finally:
            it.kill()


def test_what_is_under_way_is_answered_before_the_end(serving: Callable[..., Any], slow_gallery: Path) -> None:
    client = serving(slow_gallery, limits=Limits(where_seconds=1))
    with ThreadPoolExecutor(4) as pool:
        asked = [under_way(client.port, SLOW) for _ in range(4)]
        assert client.get("/healthz").status == 200  # what came before it has begun
        client.server.should_exit = True
        for answer in pool.map(lambda one: json.load(one.getresponse()), asked):
            assert answer == {"error": "where takes longer than 1 s: ask for something simpler"}
    for one in asked:
        one.close()
    client.thread.join()
    with pytest.raises(ConnectionRefusedError):
        client.get("/healthz")


def under_way(port: int, where: str) -> http.client.HTTPConnection:
    """A search that was sent and is not answered yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/search?q=red&where=" + urllib.parse.quote(where))
    return connection


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_answers_what_it_was_asked_and_ends(
    slow_gallery: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with command(slow_gallery, tmp_path) as (it, port):
        assert list((tmp_path / "tmp").glob("clipret-*"))
        asked = under_way(port, SLOW)
        healthy = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        healthy.request("GET", "/healthz")
        assert healthy.getresponse().read() == b'{"status":"ok"}'
        it.send_signal(number)
        response = asked.getresponse()
        assert response.status == 422
        assert json.load(response) == {"error": "where takes longer than 2 s: ask for something simpler"}
        asked.close()
        healthy.close()
        assert it.wait(60) == 0
        assert it.stderr is not None
        assert it.stderr.read() == ""
    assert not list((tmp_path / "tmp").glob("clipret-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is nobody's")
def test_nobody_but_this_machine_is_listened_to(listed_gallery: Path, tmp_path: Path) -> None:
    """A socket for all addresses would answer at 127.0.0.2 too; one for 127.0.0.1 alone does not."""
    with command(listed_gallery, tmp_path) as (_, port):
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=60)
    with socket.create_server(("0.0.0.0", 0)) as everywhere:
        socket.create_connection(("127.0.0.2", everywhere.getsockname()[1]), timeout=60).close()


def test_without_the_extra_the_command_says_what_to_install(listed_gallery: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; from clipret.cli import main; main()"
    line = [sys.executable, "-c", code, "serve", str(listed_gallery)]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "fastapi is not installed: run  pip install 'clipret[serve]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
