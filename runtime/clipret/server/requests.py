"""What stands between a request's body and FastAPI, which reads it as `schemas` declares it.

FastAPI reads a body before it asks any dependency, has no bound on how many forms lie on the disk at once, and decodes
JSON with Python's parser, which gives up on deep nesting and long numbers with errors of its own. The bound on a
body's bytes is the middleware's.
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
    """What a request says its body is."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


class _JsonRequest(Request):
    async def json(self) -> Any:
        try:
            return from_json(await self.body())
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error  # the one error that FastAPI expects here


class JsonRoute(APIRoute):
    """Takes the requests that say they are JSON, and leaves the others to the next route of its address."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match is Match.FULL and kind_of(Request(scope).headers) != JSON:
            return Match.NONE, {}
        return match, child

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return answer


class UploadRoute(APIRoute):
    """Refuses before the body is read what is no form, and forms while too many are under way."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            await self.admit(request)
            if kind_of(request.headers) != FORM:
                raise UnsupportedError("send JSON, or images as multipart/form-data")
            with request.app.state.service.uploads.one():
                return await handle(request)

        return answer

    async def admit(self, request: Request) -> None:
        """Refuse a request by its header. Raises RequestError."""


class Uploads:
    """Counts the forms that are under way, and the files that are whole in memory."""

    def __init__(self, limits: Limits) -> None:
        self._most, self._open = limits.uploads, 0
        self._whole = asyncio.Semaphore(limits.whole)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a place for a form. Raises BusyError."""
        if self._open >= self._most:
            raise BusyError(f"{self._open} uploads are under way: try again in a moment")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def each(self, files: Sequence[UploadFile], take: Callable[[bytes], Awaitable[T]]) -> list[T]:
        """What `take` makes of each file's bytes."""
        made = list[T]()
        for file in files:
            async with self._whole:
                made.append(await take(await file.read()))
        return made


def checked(request: SearchRequest, pixels: Sequence[Content], limits: Limits) -> list[list[tuple[Content, float]]]:
    """The queries of a request, each a list of parts and weights.

    These limits are a service's own; those of `schemas` hold for all. Raises RequestError where it asks for too much.
    """
    if request.k > limits.k:
        raise RequestError(f"k is {request.k}: ask for {limits.k} images at most")
    if request.where is not None:
        _check_text("where", request.where, limits.where)
    queries = list[list[tuple[Content, float]]]()
    for query in request.queries:
        parts = [PartRequest(text=query)] if isinstance(query, str) else query.parts
        queries.append([(_content(part, pixels, limits), part.weight) for part in parts])
    if (total := sum(map(len, queries))) > limits.parts:
        raise RequestError(f"{total} texts and images: ask for {limits.parts} at once at most")
    return queries


def _content(part: PartRequest, pixels: Sequence[Content], limits: Limits) -> Content:
    if part.text is not None:
        _check_text("the text", part.text, limits.text)
        return part.text
    if part.id is not None:
        return part.id
    assert part.image is not None
    if part.image >= len(pixels):
        raise RequestError(f"image {part.image} was not sent: the first is number 0")
    return pixels[part.image]


def _check_text(what: str, text: str, most: int) -> None:
    if len(text) > most:
        raise RequestError(f"{what} has {len(text)} characters: use {most} at most")
    if not text.strip():
        raise RequestError(f"{what} is blank: leave it out or fill it in")
