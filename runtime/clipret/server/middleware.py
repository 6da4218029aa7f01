"""Around the application: limits on bytes and time, the host's name, safe headers, and the count of it all."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from clipret.server.limits import Limits, TooLargeError
from clipret.server.metrics import Metrics

__all__ = ["Guard"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HEADERS = [
    # Nothing but this service's own files runs, is shown or is asked; blob: are pictures that a person drags in.
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


class Guard:
    """`hosts`: names under which the service may be asked, None for any. A page elsewhere whose name is made to point
    here (DNS rebinding) would otherwise read the gallery through its visitor's browser."""

    def __init__(self, app: App, limits: Limits, metrics: Metrics, hosts: Collection[str] | None) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        headers = dict[bytes, bytes](scope["headers"])

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        async def refuse(code: int, reason: str) -> None:
            body = json.dumps({"error": reason}).encode()
            head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            if code == 503:
                head.append((b"retry-after", b"1"))
            await answer({"type": "http.response.start", "status": code, "headers": head})
            await answer({"type": "http.response.body", "body": body})

        most, taken = self.limits.body, 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise TooLargeError(f"a request takes {most} bytes at most")
            return message

        try:
            async with asyncio.timeout(self.limits.seconds):
                length = headers.get(b"content-length", b"0")
                if self.hosts is not None and _host(headers.get(b"host", b"")) not in self.hosts:
                    await refuse(421, "this service does not go by that name: see clipret-search serve --allow-host")
                elif not length.isdigit() or int(length[:20]) > most:
                    await refuse(413, f"a request takes {most} bytes at most")
                else:
                    await self.app(scope, counted, answer)
        except TimeoutError:
            if not status:
                await refuse(503, f"the answer took longer than {self.limits.seconds:g} s")
        finally:
            # Where a client was slower than the limit the answer stays unfinished, and uvicorn closes its connection.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.count("clipret_requests_total", route=route, status=str(status or 499))
            self.metrics.observe("clipret_request_seconds", time.perf_counter() - began, route=route)


def _host(value: bytes) -> str:
    """The name in a Host header, without its port."""
    host = value.decode("latin-1").lower()
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
