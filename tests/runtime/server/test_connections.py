"""The service against clients that occupy it: endless bodies, thousands of slow connections, too many at once."""

import contextlib
import http.client
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
from clipret.server.limits import Limits

pytestmark = pytest.mark.slow

SMALL = Limits(body=1 << 20, header_seconds=1, seconds=20)


def upload(client: Any, head: str, part: bytes, size: int = 2 << 30) -> tuple[int, bytes]:
    """Send `part` repeatedly as the body; how many bytes the server accepted, and its response."""
    sent, answer = 0, b""
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(head.encode())
            while sent < size:
                sent += connection.send(part)
        with contextlib.suppress(OSError):
            while more := connection.recv(65536):
                answer += more
    return sent, answer


KINDS = ["application/json", "multipart/form-data; boundary=x", "text/plain"]
START = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'


@pytest.mark.filterwarnings("ignore:Unclosed file:ResourceWarning")  # starlette leaves closing them to Python
@pytest.mark.parametrize("kind", KINDS)
def test_a_body_of_two_gigabytes_is_refused_unread(client: Any, kind: str) -> None:
    """With a length, in one chunk and in many: almost nothing is read. Socket buffers hold a few MiB."""
    zeros, token_header = bytes(1 << 20), "Authorization: Bearer secret\r\n"
    for path in ("/search", "/galleries/gallery/add", "/healthz"):
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n{token_header}"
        sent, answer = upload(client, head + f"Content-Length: {2 << 30}\r\n\r\n", zeros)
        assert sent < 64 << 20
        assert answer.startswith(b"HTTP/1.1 413") or not answer  # a client that only writes may miss the response
        for first, part in ((f"{2 << 30:x}\r\n", zeros), ("", b"100000\r\n" + zeros + b"\r\n")):
            chunked = head + "Transfer-Encoding: chunked\r\n\r\n" + f"{len(START):x}\r\n{START.decode()}\r\n" + first
            sent, answer = upload(client, chunked, part)
            assert sent < 64 << 20
            assert answer.startswith(b"HTTP/1.1 4") or not answer


def test_invalid_lengths(client: Any) -> None:
    for path in ("/search", "/galleries/gallery/add", "/healthz"):
        answer = client.said(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2 << 30}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 413"), answer
    for length in ("-1", "1e9", "99999999999999999999999999", "0x10", "٣"):
        answer = client.said(f"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode())
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413")), answer


@contextlib.contextmanager
def many_files(count: int) -> Iterator[int]:
    """Raise the limit of open files of this process to `count`, as far as possible; the limit."""
    resource = pytest.importorskip("resource", reason="Unix only")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


SLOW = [b"", b"GET /sea", b"GET /search?q=red HTTP/1.1\r\nHost: localhost\r\nX-A: "]
HALF = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"


def test_slow_clients_are_closed(serving: Callable[..., Any], listed_gallery: Path) -> None:
    """Clients that never finish their header or their body, or send nothing."""
    client = serving(listed_gallery, limits=replace(SMALL, seconds=2))
    with contextlib.ExitStack() as stack:
        slow = []
        for number in range(400):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", client.port), timeout=60))
            connection.sendall([*SLOW, HALF][number % 4])
            slow.append(connection)
        for number, connection in enumerate(slow):
            answer = b""
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(65536):
                    answer += part
            assert answer.startswith(b"HTTP/1.1 503") if number % 4 == 3 else not answer
    assert client.get("/search", q="red", k=3).status == 200


@pytest.mark.parametrize("starts", [[*SLOW, HALF], [HALF]], ids=["mixed", "bodies"])
@pytest.mark.parametrize("kept", [1000, 4000])  # the limit of connections; 1000 is the default
def test_thousands_of_slow_clients_do_not_delay_others(
    serving: Callable[..., Any], listed_gallery: Path, kept: int, starts: list[bytes]
) -> None:
    """While they are connected, the searches of others have the same results."""
    # Both ends of a connection are files of this process.
    with many_files(3000 + min(kept, 3000) + 300) as limit, contextlib.ExitStack() as stack:
        count = min(3000, (limit - 300) // 2)
        if count < 100:
            pytest.skip(f"this process can open only {limit} files")
        client = serving(listed_gallery, limits=Limits(header_seconds=500, seconds=500, connections=kept))
        connections = client.server.server_state.connections
        expected = client.get("/search", q="red", k=3).json["results"]
        for number in range(count):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", client.port), timeout=120))
            with contextlib.suppress(ConnectionError):
                slow.sendall(starts[number % len(starts)])
            if number % 250 == 0:
                assert client.get("/search", q="red", k=3).json["results"] == expected
        for _ in range(10):
            assert client.get("/search", q="red", k=3).json["results"] == expected
        assert min(count, kept - 20) <= len(connections) <= kept
        stack.close()
        deadline = time.monotonic() + 60
        while len(connections) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.get("/search", q="red", k=3).json["results"] == expected
        assert client.get("/readyz").status == 200


def test_disconnected_clients_are_not_faults(
    serving: Callable[..., Any], listed_gallery: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    client = serving(listed_gallery, token="secret")
    for path in ("/search", "/galleries/gallery/add"):
        for kind in KINDS[:2]:
            with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
                head += f"Content-Type: {kind}\r\nContent-Length: 500\r\n\r\n"
                connection.sendall(head.encode() + b"--x\r\n")
                assert client.get("/healthz").status == 200  # the request before has begun
    deadline = time.monotonic() + 60
    disconnected = {"/search": "2", "/galleries/{name}/add": "1"}  # JSON cannot be added and is refused at once
    while not all(
        f'clipret_requests_total{{route="{route}",status="499"}} {count}' in client.get("/metrics").body.decode()
        for route, count in disconnected.items()
    ):
        assert time.monotonic() < deadline, client.get("/metrics").body.decode()
        time.sleep(0.05)
    assert client.get("/search", q="red").status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_responses_do_not_wait_for_acknowledgements(serving: Callable[..., Any], listed_gallery: Path) -> None:
    """Header and body are two packets; with Nagle's algorithm the second is delayed by 40 ms."""
    client = serving(listed_gallery)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)) as connection:
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        [protocol] = client.server.server_state.connections
        accepted = protocol.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_idle_connections_are_closed_for_new_ones(serving: Callable[..., Any], listed_gallery: Path) -> None:
    """Connections that are kept open after a response, as browsers do."""
    client = serving(listed_gallery, limits=Limits(connections=20))
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(40):
            connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
            stack.callback(connection.close)
            connection.request("GET", "/healthz")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            connections.append(connection)
        connections[-1].request("GET", "/healthz")  # the newest are still open
        assert connections[-1].getresponse().status == 200
        assert connections[0].sock.recv(1) == b""


def test_pipelined_requests(serving: Callable[..., Any], listed_gallery: Path) -> None:
    """Requests sent at once on one connection get their responses in order."""
    client = serving(listed_gallery, limits=SMALL)
    get = b"GET /search?q=red&k=%d HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
        connection.sendall(b"".join(get % k for k in (1, 2, 3)))
        answer = b""
        while answer.count(b'"rank":') < 6:
            answer += connection.recv(65536)
    assert [part.count(b'"rank":') for part in answer.split(b"HTTP/1.1 200")[1:]] == [1, 2, 3]
