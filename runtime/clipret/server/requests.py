"""Limits on request bodies before FastAPI reads them.

FastAPI reads a body before any dependency, does not limit the number of forms on disk, and decodes JSON with Python's
parser, which raises errors of other types for deep nesting and long numbers. The middleware limits the size of bodies.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from clipret.server.limits import BusyError, Limits, RequestError, UnsupportedError
from clipret.server.schemas import PartRequest, SearchRequest
from clipret.server.service import Content

__all__ = ["FORM", "JSON", "JsonRoute", "UploadRoute", "Uploads", "checked", "kind_of"]

T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]

JSON, FORM = "application/json", "multipart/form-data"


def kind_of(headers: Mapping[str, str]) -> str:
    """The content type of a request."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


class _JsonRequest(Request):
    async def json(self) -> Any:
        try:
            return from_json(await self.body())
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error  # the only error that FastAPI expects here


class JsonRoute(APIRoute):
    """Matches only requests with a JSON body; the next route gets the others."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match is Match.FULL and kind_of(Request(scope).headers) != JSON:
            return Match.NONE, {}
        return match, child

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


class UploadRoute(APIRoute):
    """Refuses other bodies than forms, and forms while too many are being read, before the body is read."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_form(request: Request) -> Response:
            await self.admit(request)
            if kind_of(request.headers) != FORM:
                raise UnsupportedError("send JSON, or images as multipart/form-data")
            with request.app.state.service.uploads.reserve():
                return await handle(request)

        return handle_form

    async def admit(self, request: Request) -> None:
        """Refuse a request by its header. Raises RequestError."""


class Uploads:
    """Limits the number of forms that are being read and of files in memory."""

    def __init__(self, limits: Limits) -> None:
        self._max_open, self._open = limits.uploads, 0
        self._decoding = asyncio.Semaphore(limits.decoding)

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """Count a form while it is being read. Raises BusyError."""
        if self._open >= self._max_open:
            raise BusyError(f"{self._open} uploads are in progress: try again in a moment")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def read(self, files: Sequence[UploadFile], decode: Callable[[bytes], Awaitable[T]]) -> list[T]:
        """Read files one by one, and decode each one's bytes with `decode`."""
        results = list[T]()
        for file in files:
            async with self._decoding:
                results.append(await decode(await file.read()))
        return results


def checked(request: SearchRequest, pixels: Sequence[Content], limits: Limits) -> list[list[tuple[Content, float]]]:
    """The queries of a request, each a list of parts and weights.

    Checks the limits of this service; those of `schemas` apply to every service.

    Args:
        request: The request.
        pixels: The uploaded images, which parts refer to by number.
        limits: The limits of the service.

    Raises:
        RequestError: A limit is exceeded, a text is blank, or an upload is missing.
    """
    if request.k > limits.k:
        raise RequestError(f"k is {request.k}: use at most {limits.k}")
    if request.where is not None:
        _check_text("where", request.where, limits.where)
    queries = list[list[tuple[Content, float]]]()
    for query in request.queries:
        parts = [PartRequest(text=query)] if isinstance(query, str) else query.parts
        queries.append([(_content(part, pixels, limits), part.weight) for part in parts])
    if (total := sum(map(len, queries))) > limits.parts:
        raise RequestError(f"the request has {total} texts and images: send at most {limits.parts}")
    return queries


def _content(part: PartRequest, pixels: Sequence[Content], limits: Limits) -> Content:
    if part.text is not None:
        _check_text("the text", part.text, limits.text)
        return part.text
    if part.id is not None:
        return part.id
    assert part.image is not None
    if part.image >= len(pixels):
        raise RequestError(f"image {part.image} is missing: uploads are numbered from 0")
    return pixels[part.image]


def _check_text(what: str, text: str, max_length: int) -> None:
    if len(text) > max_length:
        raise RequestError(f"{what} has {len(text)} characters: use at most {max_length}")
    if not text.strip():
        raise RequestError(f"{what} is blank: leave it out or fill it in")
