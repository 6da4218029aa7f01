"""Logs of the service: a line per request, and faults with their traceback; silent unless logging is configured."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clipret import Bundle, Encoder, EncoderConfig

pytest.importorskip("fastapi", reason="needs the extra serve")
from clipret.server.app import Service, create_app
from clipret.server.run import open_service
from clipret.server.snapshot import ServedSnapshot

TOKEN = "a-secret-token"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Response:
    status: int
    body: bytes


async def respond(app: Any, request: Request) -> Response:
    """The response of an ASGI application, without a server."""
    scope = {
        "type": "http",
        "method": request.method,
        "path": request.path,
        "query_string": request.query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in request.headers.items()],
        "client": ("192.0.2.7", 4711),
    }
    messages = list[Any]()

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    with contextlib.suppress(RuntimeError):  # a fault is raised after its response
        await app(scope, receive, send)
    return Response(messages[0]["status"], b"".join(message.get("body", b"") for message in messages))


def responses(service: Service, *requests: Request) -> list[Response]:
    async def run() -> list[Response]:
        app = create_app(service)
        for gallery in service.galleries.values():
            await gallery.start()
        try:
            return [await respond(app, request) for request in requests]
        finally:
            for gallery in service.galleries.values():
                await gallery.stop()

    return asyncio.run(run())


@pytest.fixture
def service(tiny_bundle: Path, listed_gallery: Path) -> Iterator[Service]:
    encoder = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu", threads=1))
    with open_service([(listed_gallery, encoder)], token=TOKEN) as service:
        yield service


def test_every_request_is_one_line(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="clipret.access"):
        first, *_ = responses(
            service,
            Request("GET", "/search", "q=a+secret+text&k=3"),
            Request("GET", "/nowhere"),
            Request("DELETE", "/galleries/gallery/images/4711", headers={"authorization": f"Bearer {TOKEN}"}),
            Request("DELETE", "/galleries/gallery/images/1"),
            Request("POST", "/search", headers={"content-length": str(1 << 40)}),
        )
    records = [record for record in caplog.records if record.name == "clipret.access"]
    assert {record.levelname for record in records} == {"INFO"}
    fields = [vars(record) for record in records]
    assert [(field["method"], field["path"], field["status"]) for field in fields] == [
        ("GET", "/search", 200),
        ("GET", "/nowhere", 404),
        ("DELETE", "/galleries/gallery/images/4711", 404),
        ("DELETE", "/galleries/gallery/images/1", 401),
        ("POST", "/search", 413),
    ]
    assert fields[0]["bytes"] == len(first.body) > 100
    assert {field["client"] for field in fields} == {"192.0.2.7"}
    assert all(0 < field["milliseconds"] < 60_000 for field in fields)
    assert records[0].getMessage().startswith("192.0.2.7 GET /search 200, ")
    text = json.dumps([{"message": record.getMessage(), **vars(record)} for record in records], default=str)
    assert "secret" not in text


def test_a_path_cannot_forge_a_line(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="clipret.access"):
        responses(service, Request("GET", "/x\n192.0.2.1 GET /search 200"))
    [record] = caplog.records
    assert len(record.getMessage().splitlines()) == 1
    assert vars(record)["path"] == r"/x\n192.0.2.1 GET /search 200"


def test_faults_are_logged_with_their_traceback(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(ServedSnapshot, "records", broken)
    with caplog.at_level(logging.INFO, logger="clipret"):
        [response] = responses(service, Request("GET", "/search", "q=a+secret+text"))
    assert response.status == 500
    assert b"broken" not in response.body
    [fault] = [record for record in caplog.records if record.name == "clipret.server"]
    assert (fault.levelname, fault.getMessage()) == ("ERROR", "GET /search failed")
    assert fault.exc_info is not None
    assert str(fault.exc_info[1]) == "broken on purpose"
    [access] = [record for record in caplog.records if record.name == "clipret.access"]
    assert vars(access)["status"] == 500


def test_a_failing_reload_is_logged_once(
    service: Service, listed_gallery: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def refresh(times: int) -> None:
        for _ in range(times):
            await service.gallery(None).refresh()

    listed_gallery.rename(listed_gallery.with_name("hidden"))
    with caplog.at_level(logging.ERROR, logger="clipret.server"):
        asyncio.run(refresh(3))
    [record] = caplog.records
    assert record.getMessage().startswith("gallery gallery cannot be reloaded: ")


def test_without_configuration_nothing_is_written(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    assert not logging.getLogger("clipret.access").isEnabledFor(logging.INFO)
    responses(service, Request("GET", "/search", "q=red"))
    assert capfd.readouterr() == ("", "")
