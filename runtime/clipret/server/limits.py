"""What a service lets a stranger ask for: the one place of its limits, and the refusals that clients see."""

from dataclasses import dataclass

__all__ = [
    "MIB",
    "BusyError",
    "ConflictError",
    "DeniedError",
    "Limits",
    "NotFoundError",
    "RequestError",
    "TooLargeError",
    "UnreadableError",
    "UnsupportedError",
]

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Sizes are in bytes or characters, times in seconds.

    `body`: of a request. `text`, `where`: of one text and of one filter. `k`: of a query. `parts`: texts and pictures
    of all queries of a request; `files`: uploads among them. `waiting`: searches that may wait for the engine; more are
    answered 503. `connections`: open at once. `seconds`: of a whole request; `header_seconds`: until its header is
    complete; `where_seconds`: of one filter. `batch`: texts and pictures that the engine is given at once; `gather`:
    how long at most it waits for those that are expected. `reload`: between two looks at whether the gallery has
    changed. `thumbnails`: kept in memory.
    """

    body: int = 32 * MIB
    text: int = 1000
    where: int = 2000
    k: int = 1000
    parts: int = 64
    files: int = 16
    waiting: int = 256
    connections: int = 1000
    seconds: float = 30.0
    header_seconds: float = 10.0
    where_seconds: float = 2.0
    batch: int = 64
    gather: float = 0.002
    reload: float = 0.5
    thumbnails: int = 64 * MIB


class RequestError(Exception):
    """A request that cannot be answered as it is. The message is for the client and names nothing of the server."""

    status = 422


class UnreadableError(RequestError):
    """A body that is not what its header says."""

    status = 400


class DeniedError(RequestError):
    """Not without the right token."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


class UnsupportedError(RequestError):
    """A body of a kind that the service does not read."""

    status = 415


class NotFoundError(RequestError):
    """There is no such thing."""

    status = 404


class ConflictError(RequestError):
    """What cannot be done in the state that the gallery is in."""

    status = 409


class TooLargeError(RequestError):
    """More bytes than the service takes."""

    status = 413


class BusyError(RequestError):
    """Not now: the client may try again."""

    status = 503
