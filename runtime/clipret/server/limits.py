"""The limits of the service, and its errors, which become responses."""

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
    """The limits of a service and of its requests. Sizes are in bytes or characters, times in seconds."""

    body: int = 32 * MIB  # of a request
    json: int = MIB  # of a request that is JSON, and of a text field of a form
    text: int = 1000  # of one text
    where: int = 2000  # of one filter
    k: int = 1000  # of a query
    parts: int = 64  # texts and images of all queries of a request
    files: int = 16  # uploads of a request
    uploads: int = 64  # requests with uploads in progress; each may occupy `body` bytes on disk
    decoding: int = 4  # uploads in memory at a time, being decoded
    waiting: int = 256  # searches waiting for the model; further ones get status 503
    connections: int = 1000  # open at once
    seconds: float = 30.0  # of a whole request
    header_seconds: float = 10.0  # until a request's header is complete
    where_seconds: float = 2.0  # of one filter
    batch: int = 64  # texts and images per batch
    gather: float = 0.002  # the longest wait for expected searches, see `Batcher`
    reload: float = 0.5  # between two checks for changes of the gallery
    thumbnails: int = 64 * MIB  # kept in memory


class RequestError(Exception):
    """A request that is refused. The message is for the client and reveals nothing about the server."""

    status = 422
    headers: ClassVar[Mapping[str, str]] = {}


class DeniedError(RequestError):
    """The token is missing or wrong."""

    status = 401
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class ReadOnlyError(RequestError):
    """The service has no token and allows no changes."""

    status = 403


class NotFoundError(RequestError):
    """The gallery, image or file does not exist."""

    status = 404


class ConflictError(RequestError):
    """The gallery cannot be changed now."""

    status = 409


class TooLargeError(RequestError):
    """The request has too many bytes."""

    status = 413


class UnsupportedError(RequestError):
    """The content type of the body is not supported."""

    status = 415


class MisdirectedError(RequestError):
    """The request has the name of another host."""

    status = 421


class BusyError(RequestError):
    """The service is busy; the client may try again."""

    status = 503
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}
