"""The service against hostile clients: whatever they send, no fault, no file from outside, and it keeps running."""

import base64
import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
from clipret.server.limits import Limits

pytestmark = pytest.mark.slow

SMALL = Limits(body=1 << 20, header_seconds=1, seconds=20, where_seconds=0.5)
LONG = "hex(zeroblob(30000))"  # nearly the longest value that is allowed
SECRET = b"no client may read this"


@pytest.fixture
def client(client: Any, listed_gallery: Path) -> Any:
    """A service with a secret next to its gallery."""
    (listed_gallery.parent / "secret.txt").write_bytes(SECRET)
    (listed_gallery.parent / "images" / "secret.txt").write_bytes(SECRET)
    return client


def test_path_traversal(client: Any, listed_gallery: Path) -> None:
    up = [
        "../",
        "..%2f",
        "%2e%2e/",
        "%2e%2e%2f",
        "..\\",
        "..%5c",
        "%252e%252e%252f",
        "..%c0%af",
        "....//",
        ".%00./",
        "/",
    ]
    targets = ["secret.txt", "gallery/gallery.db", "images/secret.txt", "etc/passwd"]
    bases = ["/images/", "/thumbnails/", "/static/", "/", "/images/1/", "/galleries/", "/docs/", "//", "/static//"]
    absolute = str(listed_gallery.parent / "secret.txt")
    paths = [f"{base}{step * depth}{name}" for base in bases for step in up for depth in (1, 3) for name in targets]
    paths += [f"{base}{absolute}" for base in bases] + [f"{base}{absolute.replace('/', '%2f')}" for base in bases]
    paths += [f"/static/index.html{end}" for end in ("%00.js", "/..", "/../app.js%00", "::$DATA")]
    for path in paths:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        answer = client.said(head)
        assert answer.startswith(b"HTTP/1.1 4"), (path, answer[:200])
        assert SECRET not in answer
        assert b"SQLite format" not in answer
        assert b"root:" not in answer
    for gallery in ("../gallery", absolute, "gallery/../gallery", "%00"):
        assert client.get("/images/1", gallery=gallery).status == 404


def test_path_traversal_by_names_and_methods(client: Any, listed_gallery: Path, colour_folder: Path) -> None:
    token = {"Authorization": "Bearer secret"}
    for name in (
        "..",
        "../gallery",
        "..%2fgallery",
        "%2e%2e",
        "gallery%00",
        "gallery%2f..%2fgallery",
        "%2fetc",
        "gallery/..",
    ):
        for method, path in (("POST", f"/galleries/{name}/add"), ("DELETE", f"/galleries/{name}/images/1")):
            reply = client.request(method, path, b"", {**token, "Content-Type": "multipart/form-data; boundary=x"})
            assert reply.status in (400, 404, 405, 415, 422), (path, reply)
    for number in ("1%2f..%2f2", "../1", "1;2", "0x1", "%31%00", "-1", "1e3"):
        assert client.request("DELETE", f"/galleries/gallery/images/{number}", headers=token).status in (404, 405, 422)
    before = {file for file in listed_gallery.parent.rglob("*") if file.is_file()}
    image = (colour_folder / "red/0.jpg").read_bytes() + b"another"
    for name in ("../../evil.jpg", "/tmp/evil.jpg", "..\\\\evil.jpg", "gallery.db", "a\0b.jpg", ".."):
        part = f'--x\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
        head = {**token, "Content-Type": "multipart/form-data; boundary=x"}
        reply = client.request("POST", "/galleries/gallery/add", part + image + b"\r\n--x--\r\n", head)
        assert reply.status in (200, 400), (name, reply)
        if reply.status == 200:
            new = {file for file in listed_gallery.parent.rglob("*") if file.is_file()} - before
            [added] = [file for file in new if not re.match(r"(rows|codes)-|gallery\.", file.name)]
            assert added.parent == listed_gallery / "added"
            assert re.fullmatch(r"[0-9a-f]{32}\.jpg", added.name)
            number = reply.json["images"][0]["id"]
            assert client.request("DELETE", f"/galleries/gallery/images/{number}", headers=token).status == 200
            assert not added.exists()


def test_only_images_are_sent_even_if_a_file_was_replaced(client: Any, listed_gallery: Path) -> None:
    file = listed_gallery.parent / "images" / "red" / "0.jpg"
    hit = next(hit for hit in client.get("/search", q="red").json["results"][0]["hits"] if hit["path"] == "red/0.jpg")
    original = file.read_bytes()
    for change in (lambda: file.write_bytes(SECRET), lambda: file.symlink_to("/etc/passwd"), lambda: file.mkdir()):
        file.unlink()
        change()
        for address in (hit["image"], hit["thumbnail"]):
            reply = client.get("/" + address)
            assert reply.status == 404
            assert str(listed_gallery.parent) not in reply.error
        file.rmdir() if file.is_dir() else file.unlink()
        file.write_bytes(original)
    assert client.get("/" + hit["image"]).body == original


def png(width: int, height: int, comment: bytes = b"") -> bytes:
    """A valid PNG of one colour, small whatever its size in pixels. `comment`: a compressed comment to include."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = zlib.compress(bytes(100_000), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    text = chunk(b"zTXt", b"Comment\0\0" + comment) if comment else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_decompression_bombs_and_invalid_images(client: Any, colour_folder: Path) -> None:
    good = (colour_folder / "red/0.jpg").read_bytes()
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    for content in (png(60_000, 60_000), png(2**31 - 1, 8), good[:400], b"", b"GIF89a", postscript, svg, bytes(9999)):
        for path in ("/search", "/galleries/gallery/add"):
            reply = client.upload(path, [content], Authorization="Bearer secret")
            assert reply.status == 422
            assert reply.error.startswith("the image cannot be used: ")
    # A comment that decompresses to 200 MiB.
    comment = png(20, 20, zlib.compress(bytes(200 << 20), 9))
    assert len(comment) < 1 << 20
    assert client.upload("/search", [comment]).status in (200, 422)
    assert client.upload("/search", [good] * 16).status == 200
    assert client.upload("/search", [good] * 17).status == 400


@pytest.mark.parametrize("form", ["q", "minus", "body", "where"])
def test_long_texts(client: Any, form: str) -> None:
    long = "红" * 10_000
    if form == "body":
        reply = client.post("/search", {"queries": [long]})
    else:
        head = {"q": "red", form: long}
        reply = client.request("GET", "/search?" + "&".join(f"{name}={_quoted(value)}" for name, value in head.items()))
    assert reply.status in (422, 400)  # the server's parser refuses a line of 90,000 bytes
    reply = client.get("/search", **{"q": "red", **({form: "x" * 10_000} if form != "body" else {"q": "x" * 10_000})})
    assert reply.status == 422
    assert "10000 characters: use at most" in reply.error


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


def test_strange_characters(client: Any) -> None:
    odd = [chr(code) for code in (*range(32), 127, 0x85, 0x200B, 0x202E, 0xFEFF, 0xFFFF, 0x1F600, 0x10FFFF)]
    for character in odd:
        for text in (f"red{character}car", character):
            for reply in (client.get("/search", q=text, k=1), client.post("/search", {"queries": [text], "k": 1})):
                assert reply.status == 200 or "is blank" in reply.error
            assert client.get("/search", q="red", where=f"colour = '{text}'").status in (200, 422)
    for bad in ("%ff%fe", "%ed%a0%80", "%", "%zz", "%00"):
        assert client.request("GET", f"/search?q={bad}").status in (200, 422)
    for value in ('"\\ud800"', '"\\udc00x"', '"\\u0000"'):
        body = '{"queries": [' + value + "]}"
        reply = client.request("POST", "/search", body, {"Content-Type": "application/json"})
        assert reply.status in (200, 422)


def test_where_cannot_write_or_read_other_data(client: Any, listed_gallery: Path) -> None:
    before = (listed_gallery / "gallery.db").read_bytes()
    attacks = [
        "1); DROP TABLE rows; --",
        "1) OR (1",
        "1 --",
        "1 /*",
        "1; DELETE FROM rows",
        "1) UNION SELECT 1 FROM (ATTACH 'stolen.db' AS x",
        "(SELECT writefile('x', 'y'))",
        "(SELECT readfile('/etc/passwd')) IS NOT NULL",
        "load_extension('/tmp/x.so')",
        "(PRAGMA writable_schema = 1)",
        "EXISTS (SELECT * FROM pragma_database_list)",
        "id IN (WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c)",
        "length(randomblob(2000000000)) > 0",
        "length(printf('%.*c', 2000000000, 'x')) > 0",
        "(SELECT count(*) FROM rows a, rows b, rows c, rows d, rows e, rows f, rows g, rows h, rows i) > 0",
        "instr(hex(zeroblob(100000)), hex(zeroblob(50000)) || '1') > 0",
        "path LIKE '" + "%a" * 900 + "'",
        "replace(hex(zeroblob(120000)), '0', hex(zeroblob(120000))) = 'x'",
        "path GLOB '" + "*a" * 900 + "'",
        f"{LONG} LIKE '{'%0' * 98}%b'",
        f"{LONG} GLOB '{'*0' * 98}?b'",
        f"instr({LONG}, hex(zeroblob(15000)) || 'b') > 0",
        f"replace({LONG}, '00', {LONG}) = 'x'",
        f"(SELECT count(*) FROM rows a, rows b, rows c, rows d WHERE instr({LONG}, hex(zeroblob(15000)) || 'b')) > 0",
        "(" * 900 + "1" + ")" * 900,
        "NOT " * 450 + "1",
        "x'",
        "'" * 999,
        "",
        "?",
        "?1 = 1",
        ":a = $b",
        "id = 1\x00",
        "json_extract('{', '$') = 1",
        "abs(-9223372036854775808) > 0",
        "1 ORDER BY (SELECT 1",
        "(SELECT sql FROM sqlite_master)",
    ]
    for attack in attacks:
        began = time.monotonic()
        reply = client.get("/search", q="red", where=attack)
        assert reply.status in (200, 422), attack
        assert time.monotonic() - began < 15, attack
        if reply.status == 422:
            assert str(listed_gallery.parent) not in reply.error
            assert "clipret-" not in reply.error  # the folder of the copy
    assert not Path("stolen.db").exists()
    assert (listed_gallery / "gallery.db").read_bytes() == before


@pytest.mark.filterwarnings("ignore:Unclosed file:ResourceWarning")  # starlette leaves closing files to Python
def test_malformed_bodies(client: Any) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\nabc\r\n'
    bodies = [
        b"",
        b"--x",
        b"--x--",
        b"--x--\r\n",
        part,
        part + b"--y--\r\n",
        part[:40],
        b"--x\r\n\r\nabc\r\n--x--\r\n",
        b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n",
        b"--x\r\nContent-Disposition: attachment; filename=../../etc/passwd\r\n\r\nabc\r\n--x--\r\n",
        b"--x\r\nContent-Disposition: form-data; name=\xff\xfe; filename=\xff\r\n\r\nabc\r\n--x--\r\n",
        b"--x\r\nno colon\r\n\r\nabc\r\n--x--\r\n",
        b"--x\r\n" + b"a: b\r\n" * 5000 + b"\r\nabc\r\n--x--\r\n",
        b"--x\r\nContent-Disposition: form-data; name=" + b"n" * 70_000 + b"\r\n\r\nabc\r\n--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="search"\r\n\r\n{"queries": [' + b"[" * 90_000 + b"\r\n--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="search"\r\n\r\n\xff\xff\r\n' + part + b"--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n' * 200 + b"--x--\r\n",
        bytes(range(256)) * 20,
    ]
    kinds = [
        "multipart/form-data; boundary=x",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "text/plain",
        "x",
    ]
    kinds += [
        'multipart/form-data; boundary="' + "y" * 500 + '"',
        "application/json",
        "multipart/form-data; boundary=é",
    ]
    for path in ("/search", "/galleries/gallery/add"):
        for kind in kinds:
            for body in bodies:
                headers = {"Content-Type": kind, "Authorization": "Bearer secret"}
                reply = client.request("POST", path, body, headers)
                assert reply.status in (400, 413, 415, 422), (path, kind, body[:80], reply)
                assert reply.error


@pytest.mark.parametrize(
    "body",
    [
        "null",
        "[]",
        "{",
        "[" * 50_000,
        '{"queries": 1}',
        '{"queries": ["red"], "k": 0}',
        '{"queries": ["red"], "k": 1001}',
        '{"queries": ["red"], "k": 1e400}',
        '{"queries": ["red"], "k": %s}' % ("9" * 5000),
        '{"queries": ["red"], "min_score": NaN}',
        '{"queries": ["red"], "exclude": [0]}',
        '{"queries": ["red"], "more": 1}',
        json.dumps({"queries": ["red"] * 65}),
        json.dumps({"queries": [{"parts": [{"text": "red"}] * 65}]}),
        json.dumps({"queries": [{"parts": [{"text": "red"}] * 33}] * 2}),
        '{"queries": [{"parts": []}]}',
        '{"queries": [{"parts": [{}]}]}',
        '{"queries": [{"parts": [{"text": "red", "id": 1}]}]}',
        '{"queries": [{"parts": [{"id": 99999999999999999999}]}]}',
        '{"queries": [{"parts": [{"id": 4711}]}]}',
        '{"queries": [{"parts": [{"image": 0}]}]}',
        '{"queries": [{"parts": [{"text": "red", "weight": Infinity}]}]}',
        '{"queries": [{"parts": [{"text": "red"}, {"text": "red", "weight": -1}]}]}',
    ],
)
def test_invalid_requests(client: Any, body: str) -> None:
    reply = client.request("POST", "/search", body, {"Content-Type": "application/json"})
    assert reply.status in (404, 422)
    assert reply.error


def test_an_invalid_query_does_not_affect_later_ones(client: Any) -> None:
    cancelling = {"parts": [{"text": "red"}, {"text": "red", "weight": -1}]}
    assert "cancel out" in client.post("/search", {"queries": ["blue", cancelling]}).error
    assert client.post("/search", {"queries": ["blue", "red"]}).status == 200


def test_other_host_names_are_refused(client: Any) -> None:
    # As `serve` sets it; the services of the fixture accept any host name.
    from clipret.server.metrics import Metrics
    from clipret.server.middleware import ServiceMiddleware

    app = client.server.config.app
    app.hosts = ServiceMiddleware(app.app, SMALL, Metrics(), ["localhost", "127.0.0.1", "[::1]"]).hosts
    for name, status in (("localhost:1", 200), ("[::1]:80", 200), ("LOCALHOST", 200), ("evil.example", 421), ("", 421)):
        assert client.request("GET", "/healthz", headers={"Host": name}).status == status
    assert client.request("GET", "/search?q=red", headers={"Host": "evil.example:8000"}).status == 421


def test_a_fault_is_only_described_in_the_log(
    serving: Callable[..., Any],
    listed_gallery: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from clipret.server.snapshot import ServedSnapshot

    client = serving(listed_gallery)

    def broken(*_: Any) -> Any:
        raise RuntimeError(f"{listed_gallery} is broken")

    with monkeypatch.context() as patch:
        patch.setattr(ServedSnapshot, "records", broken)
        for reply in (
            client.get("/search", q="red"),
            client.post("/search", {"queries": ["red"]}),
            client.get("/readyz"),
        ):
            assert reply.status == 500
            assert reply.error == "internal error: the log of the service has the details"
    assert "gallery is broken" in capfd.readouterr().err
    assert client.get("/search", q="red").status == 200


def test_too_many_connections(serving: Callable[..., Any], listed_gallery: Path) -> None:
    """Silent connections are closed in favour of active ones."""
    client = serving(listed_gallery, limits=Limits(connections=20))
    with contextlib.ExitStack() as stack:
        for number in range(60):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", client.port), timeout=20))
            if number == 0:
                first = silent
            if number % 10 == 0:
                assert client.get("/search", q="red").status == 200
        assert first.recv(1) == b""  # closed long before the ten seconds for a header


def test_too_many_waiting_searches(serving: Callable[..., Any], listed_gallery: Path) -> None:
    client = serving(listed_gallery, limits=Limits(waiting=0))
    reply = client.get("/search", q="red")
    assert reply.status == 503
    assert reply.headers["retry-after"] == "1"
    assert client.get("/readyz").status == 503
    assert client.get("/healthz").status == 200


def test_invalid_http(client: Any) -> None:
    for data in (
        bytes(range(256)),
        b"\r\n" * 1000,
        b"GET / HTCPCP/1.0\r\n\r\n",
        b"\x16\x03\x01" + bytes(300),
        b"A" * 90_000,
    ):
        answer = client.said(data)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), answer
        assert b"Traceback" not in answer


# Random names and files are hardly ever a gallery or an image, so half of them are replaced by valid ones.
HOOKS = """
import base64, schemathesis

PNG = base64.b64decode("%s")

@schemathesis.hook
def map_path_parameters(context, drawn):
    if drawn and "name" in drawn and len(str(drawn["name"])) %% 2:
        drawn["name"] = "gallery"
    if drawn and isinstance(drawn.get("id"), int):
        drawn["id"] %%= 16
    return drawn

@schemathesis.hook
def map_body(context, drawn):
    if isinstance(drawn, dict) and "image" in drawn and len(str(drawn)) %% 2:
        drawn["image"] = [PNG]
    return drawn
"""


def test_responses_conform_to_the_document(serving: Callable[..., Any], listed_gallery: Path, tmp_path: Path) -> None:
    """schemathesis sends valid and invalid requests to every endpoint, additions and deletions included."""
    pytest.importorskip("schemathesis", reason="needs the extra dev")
    client = serving(listed_gallery, limits=SMALL, token="secret")
    (tmp_path / "hooks.py").write_text(HOOKS % base64.b64encode(png(20, 20)).decode())
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{client.port}/openapi.json"]
    command += ["--checks", checks, "--max-examples", "8", "--seed", "1", "-H", "Authorization: Bearer secret"]
    command += ["--no-color", "--generation-database", "none"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=500, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    text = client.get("/metrics").body.decode()
    counted = re.findall(r'clipret_requests_total{route="([^"]+)",status="(\d+)"}', text)
    assert {("/galleries/{name}/add", "200"), ("/galleries/{name}/images/{id}", "200")} <= set(counted)
    assert not [status for _, status in counted if status.startswith("5")]
    assert client.get("/search", q="red").status == 200
