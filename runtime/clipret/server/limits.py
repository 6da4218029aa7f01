"""The limits of the service, and the errors that clients see."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "MIB",
    "BusyError",
    "ConflictError",
    "DeniedError",
    "Limits",
    "MisdirectedError",
    "NotFoundError",
    "ReadOnlyError",
    "RequestError",
    "TooLargeError",
    "UnsupportedError",
]

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Sizes are in bytes or characters, times in seconds."""

    body: int = 32 * MIB  # of a request
    json: int = MIB  # of a request that is JSON, and of a text field of a form
    text: int = 1000  # of one text
    where: int = 2000  # of one filter
    k: int = 1000  # of a query
    parts: int = 64  # texts and images of all queries of a request
    files: int = 16  # uploads of a request
    uploads: int = 64  # requests with uploads under way: so many times `body` may lie on the disk
    whole: int = 4  # uploads whole in memory, to be decoded
    waiting: int = 256  # searches that may wait for the engine; more are answered 503
    connections: int = 1000  # open at once
    seconds: float = 30.0  # of a whole request
    header_seconds: float = 10.0  # until a request's header is complete
    where_seconds: float = 2.0  # of one filter
    batch: int = 64  # texts and images that the engine is given at once
    gather: float = 0.002  # how long at most the engine waits for those that are expected
    reload: float = 0.5  # between two looks at whether the gallery has changed
    thumbnails: int = 64 * MIB  # kept in memory


class RequestError(Exception):
    """A request that cannot be answered. The message is for the client and contains nothing about the server."""

    status = 422
    headers: ClassVar[Mapping[str, str]] = {}


class DeniedError(RequestError):
    """The token is missing or wrong."""

    status = 401
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class ReadOnlyError(RequestError):
    """The service does not allow changes, whatever the token."""

    status = 403


class NotFoundError(RequestError):
    """What the request names does not exist."""

    status = 404


class ConflictError(RequestError):
    """The gallery does not allow this now."""

    status = 409


class TooLargeError(RequestError):
    """The request has too many bytes."""

    status = 413


class UnsupportedError(RequestError):
    """A body of a type that the service does not read."""

    status = 415


class MisdirectedError(RequestError):
    """A request for another host."""

    status = 421


class BusyError(RequestError):
    """The service is busy: the client may try again."""

    status = 503
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}
