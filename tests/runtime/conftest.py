"""Fixtures of the service: a gallery, and real servers on loopback that answer it. And a pretended CUDA driver."""

import contextlib
import ctypes
import http.client
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from clipret import Bundle, Encoder, EncoderConfig, Gallery, index_images, open_source
from clipret.hardware import cuda


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The reason of a refusal, which is one line of JSON and nothing of the server."""
        assert self.status >= 400, self.body
        value = self.json
        assert list(value) == ["error"]
        assert len(value["error"].splitlines()) == 1
        assert "Traceback" not in value["error"]
        return str(value["error"])


@dataclass(frozen=True)
class Client:
    port: int
    server: Any
    thread: threading.Thread

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 60
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())

    def said(self, request: bytes, seconds: float = 10) -> bytes:
        """What comes back for raw bytes until the server closes or falls silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(request)
            answer = b""
            with contextlib.suppress(OSError):
                while part := connection.recv(65536):
                    answer += part
            return answer

    def get(self, path: str, **parameters: Any) -> Reply:
        return self.request("GET", path + ("?" + urlencode(parameters, doseq=True) if parameters else ""))

    def post(self, path: str, value: Any) -> Reply:
        return self.request("POST", path, json.dumps(value), {"Content-Type": "application/json"})

    def upload(self, path: str, images: list[bytes], fields: Mapping[str, str] | None = None, **headers: str) -> Reply:
        named = (fields or {}).items()
        parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in named]
        head = b'Content-Disposition: form-data; name="image"; filename="x.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
        parts += [head + image for image in images]
        body = b"".join(b"--limit\r\n" + part + b"\r\n" for part in parts) + b"--limit--\r\n"
        return self.request("POST", path, body, {"Content-Type": "multipart/form-data; boundary=limit", **headers})


@pytest.fixture
def run_command() -> Callable[..., bytes]:
    """run_command(COMMAND, NAME=value, …): what a command writes to a pipe."""

    def run(command: list[str], **environment: str) -> bytes:
        return subprocess.run(command, capture_output=True, check=True, env=os.environ | environment).stdout

    return run


@pytest.fixture
def on_terminal() -> Callable[..., bytes]:
    """on_terminal(COMMAND, NAME=value, …): what a command writes to a terminal."""
    import pty  # not on every system

    def run(command: list[str], **environment: str) -> bytes:
        ours, its = pty.openpty()
        with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=os.environ | environment):
            os.close(its)
            written = bytearray()
            # Linux has an error for it that nobody holds the other end any more.
            with contextlib.suppress(OSError):
                while some := os.read(ours, 1 << 16):
                    written += some
            os.close(ours)
        return bytes(written)

    return run


@pytest.fixture
def listed_gallery(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> Path:
    """Twelve images, with a colour and a number each as metadata."""
    files = [file.relative_to(colour_folder) for file in sorted(colour_folder.rglob("*.*"))]
    lines = [f"{file.as_posix()},{file.parent},{file.stem}" for file in files]
    (colour_folder / "list.csv").write_text("\n".join(["path,colour,number", *lines]) + "\n")
    source = open_source(colour_folder / "list.csv")
    encoder = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu"))
    with Gallery.create(tmp_path / "gallery", encoder.bundle, source.root) as made:
        index_images(made, encoder, source)
    return tmp_path / "gallery"


@pytest.fixture
def query_list(colour_folder: Path) -> Path:
    """Six queries; what two of them are said to look for is found late."""
    right = {
        "red": ["red/0.jpg", "red/1.jpeg"],
        "a blue one": ["blue/2.png"],
        "green": ["red/0.jpg"],
        "grey": ["grey/0.jpg", "grey/1.jpeg", "grey/2.png"],
        "blue 红色": ["green/1.jpeg", "red/1.jpeg"],
        "white": ["blue/0.jpg"],
    }
    lines = [f"{caption},{path}" for caption, paths in right.items() for path in paths]
    (colour_folder / "queries.csv").write_text("\n".join(["caption,path", *lines]) + "\n")
    return colour_folder / "queries.csv"


@pytest.fixture
def serving(tiny_bundle: Path) -> Iterator[Callable[..., Client]]:
    """serving(gallery, …) starts a server for these galleries and gives a client; keywords are `open_service`'s."""
    pytest.importorskip("fastapi", reason="needs the extra serve")
    from clipret.server.run import listen, make_server, open_service

    encoder = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu", threads=1))
    with contextlib.ExitStack() as stack:

        def start(*galleries: Path, **options: Any) -> Client:
            service = stack.enter_context(open_service([(gallery, encoder) for gallery in galleries], **options))
            server, listening = make_server(service), listen("127.0.0.1", 0)
            thread = threading.Thread(target=server.run, args=([listening],))

            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            return Client(listening.getsockname()[1], server, thread)

        yield start


@pytest.fixture
def client(serving: Callable[..., Client], listed_gallery: Path) -> Iterator[Client]:
    """A service with narrow limits and a token, which must still answer rightly when the test is over."""
    from clipret.server.limits import Limits

    limits = Limits(body=1 << 20, header_seconds=1, seconds=20, where_seconds=0.5)
    client = serving(listed_gallery, limits=limits, token="secret")
    before = client.get("/search", q="red").json["results"]
    yield client
    assert client.get("/search", q="red").json["results"] == before
    assert client.get("/readyz").status == 200
    assert 'status="500"' not in client.get("/metrics").body.decode()


class Driver:
    """The calls of CUDA's driver that clipret makes, on the memory of this process: one GPU of sm_120."""

    def __init__(self) -> None:
        self.pinned: dict[int, Any] = {}
        self.device: dict[int, Any] = {}
        self.streams = 0
        self.fails = 0

    def __getattr__(self, name: str) -> Any:
        if name in ("cuInit", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuStreamSynchronize"):
            return lambda *_: self.fails
        raise AttributeError(name)

    def cuDeviceGet(self, _device: Any, number: ctypes.c_int) -> int:  # noqa: N802
        return 101 if number.value else 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 1
        return 0

    def cuDeviceGetName(self, name: Any, size: ctypes.c_int, _device: Any) -> int:  # noqa: N802
        assert size.value == len(name)
        name.value = b"a card"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: ctypes.c_int, _device: Any) -> int:  # noqa: N802
        value._obj.value = {75: 12, 76: 0}[attribute.value]
        return 0

    def cuStreamCreate(self, stream: Any, flags: ctypes.c_uint) -> int:  # noqa: N802
        assert flags.value == 1
        stream._obj.value = 7
        self.streams += 1
        return 0

    def cuStreamDestroy_v2(self, _stream: Any) -> int:  # noqa: N802
        self.streams -= 1
        return 0

    def cuMemAllocHost_v2(self, address: Any, size: ctypes.c_size_t) -> int:  # noqa: N802
        return self._allocate(self.pinned, address, size)

    def cuMemAlloc_v2(self, address: Any, size: ctypes.c_size_t) -> int:  # noqa: N802
        return self._allocate(self.device, address, size)

    def _allocate(self, kind: dict[int, Any], address: Any, size: ctypes.c_size_t) -> int:
        buffer = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(buffer)
        kind[ctypes.addressof(buffer)] = buffer
        return 0

    def cuMemFreeHost(self, address: ctypes.c_void_p) -> int:  # noqa: N802
        del self.pinned[address.value or 0]
        return 0

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> int:  # noqa: N802
        del self.device[address.value]
        return 0

    def cuMemcpyHtoDAsync_v2(self, to: Any, source: Any, size: Any, _stream: Any) -> int:  # noqa: N802
        return self._copy(to.value, source.value, size.value, self.device, self.pinned)

    def cuMemcpyDtoHAsync_v2(self, to: Any, source: Any, size: Any, _stream: Any) -> int:  # noqa: N802
        return self._copy(to.value, source.value, size.value, self.pinned, self.device)

    def _copy(self, to: int, source: int, size: int, target: dict[int, Any], origin: dict[int, Any]) -> int:
        assert size <= min(len(target[to]), len(origin[source]))
        ctypes.memmove(to, source, size)
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802
        free._obj.value, total._obj.value = 5, 7
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    cuda._context.cache_clear()
    monkeypatch.setattr(cuda, "_driver", lambda: made)
    yield made
    cuda._context.cache_clear()
