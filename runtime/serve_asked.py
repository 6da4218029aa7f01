"""What clients send in bodies: JSON and multipart, read within limits and turned into queries."""

import json
from collections.abc import Mapping, Sequence

from starlette.datastructures import UploadFile
from starlette.requests import Request

from clipret.items import Value, is_plain, scalar
from clipret.serve_desk import Content
from clipret.serve_limits import Limits, RequestError, UnreadableError, UnsupportedError
from clipret.serve_models import PartAsked, SearchRequest

__all__ = ["checked", "metadata_of", "read_form", "read_search"]

_COLUMNS = 64  # of one addition
_FIELD = 1 << 20  # bytes of a field that is no file


async def read_search(request: Request, limits: Limits) -> tuple[SearchRequest, list[bytes]]:
    """The request and the uploads of a POST /search. Raises RequestError and pydantic's ValidationError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return SearchRequest.model_validate_json(await request.body()), []
    fields, uploads = await read_form(request, limits)
    if "search" in fields:
        return SearchRequest.model_validate_json(fields["search"]), uploads
    queries = [{"parts": [{"picture": number}]} for number in range(len(uploads))]
    return SearchRequest.model_validate({"queries": queries}), uploads


async def read_form(request: Request, limits: Limits) -> tuple[dict[str, str], list[bytes]]:
    """The text fields and the files named `picture` of a multipart body. Raises RequestError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise UnsupportedError("send JSON, or pictures as multipart/form-data")
    fields, uploads = dict[str, str](), list[bytes]()
    try:
        async with request.form(max_files=limits.files, max_fields=limits.files, max_part_size=_FIELD) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name != "picture":
                        raise RequestError(f"the file field {name[:100]!r} is unknown: send pictures as  picture")
                    uploads.append(await value.read())
                else:
                    fields[name] = value
    except (ValueError, KeyError, TypeError):  # of headers of parts that are no text
        raise UnreadableError("the multipart body cannot be read") from None
    if not uploads:
        raise RequestError("there is no picture: send at least one file as  picture")
    return fields, uploads


def checked(request: SearchRequest, pixels: Sequence[Content], limits: Limits) -> list[list[tuple[Content, float]]]:
    """The queries of a request, each a list of parts and weights. Raises RequestError where it asks for too much."""
    if request.k > limits.k:
        raise RequestError(f"k is {request.k}: ask for {limits.k} pictures at most")
    if len(request.queries) > limits.queries:
        raise RequestError(f"{len(request.queries)} queries: ask for {limits.queries} at once at most")
    if request.where is not None:
        _check_text("where", request.where, limits.where)
    queries = list[list[tuple[Content, float]]]()
    for query in request.queries:
        parts = [PartAsked(text=query)] if isinstance(query, str) else query.parts
        if len(parts) > limits.parts:
            raise RequestError(f"a query of {len(parts)} parts: use {limits.parts} at most")
        queries.append([(_content(part, pixels, limits), part.weight) for part in parts])
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
