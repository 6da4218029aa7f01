"""HTTP/1.1 of uvicorn with two more limits: the time for the header of a request, and the number of connections."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from clipret.server.limits import Limits

__all__ = ["protocol"]

_LINGER = 1.0  # seconds for a client to read its refusal before the connection is closed, and at most one more body


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """A protocol class with limits for connections.

    It closes connections whose next header has not arrived after `limits.header_seconds`; otherwise a client that sends
    a byte per minute would keep its connection forever. When a new connection exceeds `limits.connections`, the
    connection that has kept the service waiting longest is closed, so that silent clients cannot keep others out.

    Args:
        limits: The limits of the service.
    """
    waiting = dict["Limited", None]()  # connections with an incomplete or no request, longest waiting first

    class Limited(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _dropped = 0  # bytes of a body received after its refusal

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()
            if len(self.connections) > limits.connections:
                oldest = next(iter(waiting))
                oldest._leave()
                oldest.transport.close()

        def data_received(self, data: bytes) -> None:
            if self._refused():
                self._dropped += len(data)
                if self._dropped > limits.body:
                    self._close()
                    return
            super().data_received(data)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._leave()
            super().connection_lost(exc)

        def _leave(self) -> None:
            waiting.pop(self, None)
            self._stop()

        def _wait(self) -> None:
            """Start the timer, unless it runs, while a header is awaited; otherwise stop it."""
            if self.cycle is None or self.cycle.response_complete:
                waiting.setdefault(self)
                if self._late is None:
                    self._late = self.loop.call_later(limits.header_seconds, self._close)
                return
            self._stop()
            if self.conn.their_state is h11.SEND_BODY:
                waiting.setdefault(self)
            else:
                waiting.pop(self, None)

        def _stop(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _close(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

        def on_response_complete(self) -> None:
            self._stop()  # the keep-alive timeout of uvicorn runs from here to the next byte
            if self._refused():  # leave time to read the refusal
                self._dropped = 0
                self._late = self.loop.call_later(_LINGER, self._close)
            waiting.pop(self, None)  # its request is answered: move it to the end of the queue
            waiting[self] = None
            super().on_response_complete()
            if self.cycle is not None and not self.cycle.response_complete:
                self._wait()  # the next request had already arrived

        def _refused(self) -> bool:
            """Whether the request was answered before its body had ended."""
            done = self.cycle is not None and self.cycle.response_complete
            return done and self.conn.their_state is h11.SEND_BODY

    return Limited
