"""What clients send in bodies: JSON and multipart, few of them at a time, within limits, turned into queries."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.datastructures import UploadFile
from starlette.requests import Request

from clipret.server.limits import MIB, BusyError, Limits, RequestError, TooLargeError, UnreadableError, UnsupportedError
from clipret.server.schemas import PartAsked, SearchRequest
from clipret.server.service import Content
from clipret.sources.item import Value, is_plain, scalar

__all__ = ["Bodies", "checked", "kind_of", "metadata_of", "search_of"]

T = TypeVar("T")

_COLUMNS = 64  # of one addition
_FIELD = MIB  # bytes of JSON: what is in memory at once, whatever a picture may have
_OPEN = 64  # uploads that may be under way: so many times `Limits.body` may lie on the disk
_WHOLE = 4  # of them whole in memory, to be decoded


class Bodies:
    """Reads the bodies of requests. Raises RequestError where one is not what it says or too much."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open = 0
        self._whole = asyncio.Semaphore(_WHOLE)

    async def json(self, request: Request) -> bytes:
        """The body of a request that says it is JSON."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _FIELD:
                raise TooLargeError(f"a JSON body takes {_FIELD} bytes at most")
        return body

    @asynccontextmanager
    async def form(self, request: Request) -> AsyncIterator[tuple[dict[str, str], list[UploadFile]]]:
        """The text fields and the files named `picture` of a multipart body, open within the block."""
        if kind_of(request) != "multipart/form-data":
            raise UnsupportedError("send JSON, or pictures as multipart/form-data")
        if self._open >= _OPEN:
            raise BusyError(f"{self._open} uploads are under way: try again in a moment")
        self._open += 1
        most = self._limits.files
        try:
            try:
                form = await request.form(max_files=most, max_fields=most, max_part_size=_FIELD)
            except (ValueError, KeyError, TypeError):  # of headers of parts that are no text
                raise UnreadableError("the multipart body cannot be read") from None
            try:
                fields, files = dict[str, str](), list[UploadFile]()
                for name, value in form.multi_items():
                    if isinstance(value, str):
                        fields[name] = value
                    elif name == "picture":
                        files.append(value)
                    else:
                        raise RequestError(f"the file field {name[:100]!r} is unknown: send pictures as  picture")
                if not files:
                    raise RequestError("there is no picture: send at least one file as  picture")
                yield fields, files
            finally:
                await form.close()
        finally:
            self._open -= 1

    async def each(self, files: Sequence[UploadFile], take: Callable[[bytes], Awaitable[T]]) -> list[T]:
        """What `take` makes of each file's bytes."""
        made = list[T]()
        for file in files:
            async with self._whole:
                made.append(await take(await file.read()))
        return made


def kind_of(request: Request) -> str:
    """What a request says its body is."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def search_of(fields: Mapping[str, str], files: int) -> SearchRequest:
    """The search that a form asks for: what its field `search` says, else one query for each picture.

    Raises pydantic's ValidationError.
    """
    if "search" in fields:
        return SearchRequest.model_validate_json(fields["search"])
    return SearchRequest.model_validate({"queries": [{"parts": [{"picture": number}]} for number in range(files)]})


def checked(request: SearchRequest, pixels: Sequence[Content], limits: Limits) -> list[list[tuple[Content, float]]]:
    """The queries of a request, each a list of parts and weights. Raises RequestError where it asks for too much."""
    if request.k > limits.k:
        raise RequestError(f"k is {request.k}: ask for {limits.k} pictures at most")
    if request.where is not None:
        _check_text("where", request.where, limits.where)
    queries = list[list[tuple[Content, float]]]()
    for query in request.queries:
        parts = [PartAsked(text=query)] if isinstance(query, str) else query.parts
        queries.append([(_content(part, pixels, limits), part.weight) for part in parts])
    if (total := sum(map(len, queries))) > limits.parts:
        raise RequestError(f"{total} texts and pictures: ask for {limits.parts} at once at most")
    return queries


def _content(part: PartAsked, pixels: Sequence[Content], limits: Limits) -> Content:
    if part.text is not None:
        _check_text("the text", part.text, limits.text)
        return part.text
    if part.id is not None:
        return part.id
    assert part.picture is not None
    if part.picture >= len(pixels):
        raise RequestError(f"picture {part.picture} was not sent: the first is number 0")
    return pixels[part.picture]


def _check_text(what: str, text: str, most: int) -> None:
    if len(text) > most:
        raise RequestError(f"{what} has {len(text)} characters: use {most} at most")
    if not text.strip():
        raise RequestError(f"{what} is blank: leave it out or fill it in")
    _check_unicode(what, text)


def _check_unicode(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{what} holds half a character (a lone surrogate): send whole ones") from None


def metadata_of(text: str | None) -> Mapping[str, Value]:
    """The columns that a client names for pictures it adds. Raises RequestError."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError("metadata is no JSON") from None
    if not isinstance(value, dict) or not all(map(is_plain, value.values())) or len(value) > _COLUMNS:
        raise RequestError(f"metadata is no JSON object of at most {_COLUMNS} texts and numbers")
    for name, one in value.items():
        if not name.strip() or len(name) > 64 or not name.isprintable():
            raise RequestError("metadata has a column without a proper name")
        _check_unicode("metadata", name + (one if isinstance(one, str) else ""))
    return {name: scalar(one) for name, one in value.items()}
