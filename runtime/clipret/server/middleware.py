"""Middleware: limits on bytes and time, the check of the host name, safe headers, metrics and the access log.

Starlette's own middlewares for hosts and sizes answer in plain text and with other statuses; it has none for time.
"""

import asyncio
import logging
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipret.server.limits import BusyError, Limits, MisdirectedError, RequestError, TooLargeError
from clipret.server.metrics import Metrics
from clipret.server.openapi import refusal
from clipret.server.requests import JSON, kind_of

__all__ = ["ServiceMiddleware"]

_access = logging.getLogger("clipret.access")

# In the form in which they are sent: starlette's MutableHeaders would cost some microseconds per request.
_HEADERS = [
    # Only the service's own files are loaded and run; blob: is for images that a user drags in.
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


class ServiceMiddleware:
    """Limits on requests, safe headers, metrics and the access log.

    Args:
        app: The application.
        limits: Bytes and seconds of a request.
        metrics: Counts every response.
        hosts: Host names that requests may use, None for any. Without the check, a page on another site could read the
            gallery through its visitor's browser (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, hosts: Collection[str] | None) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, sent = time.perf_counter(), 0, 0
        headers = Headers(scope=scope)

        async def answer(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            sent += len(message.get("body", b""))
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
            seconds = time.perf_counter() - began
            self.metrics.request(route, status or 499, seconds)
            if _access.isEnabledFor(logging.INFO):
                _log_access(scope, status or 499, sent, seconds)


def _log_access(scope: Scope, status: int, sent: int, seconds: float) -> None:
    """One line per request, without the query string: it may hold what somebody looked for."""
    facts = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "bytes": sent,
        "milliseconds": round(1000 * seconds, 2),
        "client": (scope.get("client") or ("-", 0))[0],
    }
    _access.info("%(method)s %(path)s %(status)d, %(bytes)d bytes, %(milliseconds).2f ms", facts, extra=facts)


def _host(value: str) -> str:
    """The name in a Host header, without its port."""
    host = value.lower()
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
