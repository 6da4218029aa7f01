"""Around the application: limits on bytes and time, the host's name, safe headers, and the count of it all.

Starlette's own middlewares for bytes and hosts answer in plain text and with other statuses; one for time it lacks.
"""

import asyncio
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipret.server.limits import BusyError, Limits, MisdirectedError, RequestError, TooLargeError
from clipret.server.metrics import Metrics
from clipret.server.openapi import refusal
from clipret.server.requests import JSON, kind_of

__all__ = ["Guard"]

# As they are sent: to put them in by starlette's MutableHeaders costs every request some microseconds.
_HEADERS = [
    # Nothing but this service's own files runs, is shown or is asked; blob: are images that a person drags in.
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

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, hosts: Collection[str] | None) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        headers = Headers(scope=scope)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        async def refuse(error: RequestError) -> None:
            await refusal(error)(scope, receive, answer)

        most, taken = self.limits.json if kind_of(headers) == JSON else self.limits.body, 0
        too_large = TooLargeError(f"a request takes {most} bytes at most")

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise too_large
            return message

        try:
            async with asyncio.timeout(self.limits.seconds):
                length = headers.get("content-length", "0")
                if self.hosts is not None and _host(headers.get("host", "")) not in self.hosts:
                    await refuse(
                        MisdirectedError("this service does not go by that name: see clipret-search serve --allow-host")
                    )
                elif not length.isdecimal() or int(length[:20]) > most:
                    await refuse(too_large)
                else:
                    await self.app(scope, counted, answer)
        except TimeoutError:
            if not status:
                await refuse(BusyError(f"the answer took longer than {self.limits.seconds:g} s"))
        finally:
            # Where a client was slower than the limit the answer stays unfinished, and uvicorn closes its connection.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.request(route, status or 499, time.perf_counter() - began)


def _host(value: str) -> str:
    """The name in a Host header, without its port."""
    host = value.lower()
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
