"""The service as a process: the address it listens on, and how it exits."""

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

# A filter without matches that takes as long as possible for each image.
SLOW = f"hex(zeroblob(32000)) || path not like '%{'0' * 190}z'"


@pytest.fixture
def slow_gallery(listed_gallery: Path) -> Path:
    """A gallery with so many images that SLOW takes a minute."""
    with Gallery.open(listed_gallery) as gallery, gallery.writing():
        embeddings = np.ones((2000, gallery.info.embedding_dim), np.float16)
        gallery.append([ImageRecord(f"none/{number}.png", 1, 1, "") for number in range(len(embeddings))], embeddings)
    return listed_gallery


@contextlib.contextmanager
def command(gallery: Path, folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that runs `clipret-search serve`, and its port."""
    (folder / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "PYTHONUNBUFFERED": "1"}
    arguments = [
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
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as it:
        try:
            assert it.stdout is not None
            assert it.stderr is not None
            line = it.stdout.readline()
            match = re.fullmatch(r"serving gallery at http://127\.0\.0\.1:(\d+)/\n", line)
            assert match, line + it.stderr.read()
            yield it, int(match[1])
        finally:
            it.kill()


def test_running_requests_are_finished_before_the_end(serving: Callable[..., Any], slow_gallery: Path) -> None:
    client = serving(slow_gallery, limits=Limits(where_seconds=1))
    with ThreadPoolExecutor(4) as pool:
        connections = [start_search(client.port, SLOW) for _ in range(4)]
        assert client.get("/healthz").status == 200  # the searches before it have begun
        client.server.should_exit = True
        for answer in pool.map(lambda connection: json.load(connection.getresponse()), connections):
            assert answer == {"error": "where takes longer than 1 s: simplify the expression"}
    for connection in connections:
        connection.close()
    client.thread.join()
    with pytest.raises(ConnectionRefusedError):
        client.get("/healthz")


def start_search(port: int, where: str) -> http.client.HTTPConnection:
    """Send a search without waiting for the response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/search?q=red&where=" + urllib.parse.quote(where))
    return connection


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_finishes_running_requests_and_exits(
    slow_gallery: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with command(slow_gallery, tmp_path) as (it, port):
        assert list((tmp_path / "tmp").glob("clipret-*"))
        search = start_search(port, SLOW)
        healthy = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        healthy.request("GET", "/healthz")
        assert healthy.getresponse().read() == b'{"status":"ok"}'
        it.send_signal(number)
        response = search.getresponse()
        assert response.status == 422
        assert json.load(response) == {"error": "where takes longer than 2 s: simplify the expression"}
        search.close()
        healthy.close()
        assert it.wait(60) == 0
        assert it.stderr is not None
        assert it.stderr.read() == ""
    assert not list((tmp_path / "tmp").glob("clipret-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is a local address on Linux only")
def test_the_default_address_is_local_only(listed_gallery: Path, tmp_path: Path) -> None:
    """A socket that listens on all addresses accepts connections to 127.0.0.2 too; one on 127.0.0.1 does not."""
    with command(listed_gallery, tmp_path) as (_, port):
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=60)
    with socket.create_server(("0.0.0.0", 0)) as all_addresses:
        socket.create_connection(("127.0.0.2", all_addresses.getsockname()[1]), timeout=60).close()


def test_without_the_extra_the_command_names_what_to_install(listed_gallery: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; from clipret.cli import main; main()"
    line = [sys.executable, "-c", code, "serve", str(listed_gallery)]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "fastapi is not installed: run  pip install 'clipret[serve]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
