"""Middleware: limits on bytes and time, the check of the host name, safe headers, metrics and logs.

Starlette's own middlewares for hosts and sizes respond in plain text and with other statuses; it has none for time.
"""

import asyncio
import logging
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipret.errors import printable
from clipret.logs import is_configured
from clipret.server.limits import BusyError, Limits, MisdirectedError, RequestError, TooLargeError
from clipret.server.metrics import Metrics
from clipret.server.openapi import refusal
from clipret.server.requests import JSON, kind_of

__all__ = ["ServiceMiddleware"]

_access = logging.getLogger("clipret.access")
_log = logging.getLogger("clipret.server")

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
    """Limits on requests, safe headers, metrics and logs.

    Every request is one line of the logger `clipret.access`, at level INFO. An exception that no handler expects is
    logged with its traceback by `clipret.server`.

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

        async def respond(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            sent += len(message.get("body", b""))
            await send(message)

        async def refuse(error: RequestError) -> None:
            await refusal(error)(scope, receive, respond)

        max_bytes, received = self.limits.json if kind_of(headers) == JSON else self.limits.body, 0
        too_large = TooLargeError(f"the body has more than {max_bytes} bytes: send less")

        async def count_received() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > max_bytes:
                raise too_large
            return message

        try:
            async with asyncio.timeout(self.limits.seconds):
                length = headers.get("content-length", "0")
                if self.hosts is not None and _host(headers.get("host", "")) not in self.hosts:
                    await refuse(
                        MisdirectedError(
                            "this service does not answer to that host name: start it with --allow-host NAME"
                        )
                    )
                elif not length.isdecimal() or int(length[:20]) > max_bytes:
                    await refuse(too_large)
                else:
                    await self.app(scope, count_received, respond)
        except TimeoutError:
            if not status:
                await refuse(BusyError(f"the request took longer than {self.limits.seconds:g} s: try again"))
        except Exception:
            # The application has sent a response with status 500, unless another one had begun.
            facts = {"method": scope["method"], "path": printable(scope["path"])}
            _log.exception("%(method)s %(path)s failed", facts, extra=facts)
            if not is_configured():
                raise  # uvicorn writes the traceback to stderr
        finally:
            # If a client was slower than the limit, the response stays unfinished and uvicorn closes the connection.
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - began
            self.metrics.request(route, status or 499, seconds)
            if _access.isEnabledFor(logging.INFO):
                _log_access(scope, status or 499, sent, seconds)


def _log_access(scope: Scope, status: int, sent: int, seconds: float) -> None:
    """Log a request without its query string, which may contain what a person searched for, and without its token."""
    facts = {
        "method": scope["method"],
        "path": printable(scope["path"]),  # it is percent-decoded: a line break would forge a line of the log
        "status": status,
        "bytes": sent,
        "milliseconds": round(1000 * seconds, 2),
        "client": (scope.get("client") or ("-", 0))[0],
    }
    _access.info(
        "%(client)s %(method)s %(path)s %(status)d, %(bytes)d bytes, %(milliseconds).2f ms", facts, extra=facts
    )


def _host(value: str) -> str:
    """The name in a Host header, without its port."""
    host = value.lower()
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
