"""What the service says of itself in its OpenAPI document, and how it says what went wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from clipret.errors import printable
from clipret.server.limits import RequestError
from clipret.server.schemas import Failure, SearchRequest

__all__ = ["ADD_BODY", "FAILURES", "SEARCH_BODY", "WRITE_FAILURES", "describe", "handle_failures"]

FAILURES: dict[int | str, dict[str, Any]] = {
    code: {"model": Failure, "description": text}
    for code, text in {
        400: "The request is no valid HTTP or multipart.",
        404: "There is no such gallery or picture.",
        413: "The body is too large.",
        415: "The body is neither JSON nor multipart.",
        421: "The service does not go by this name.",
        422: "Something in the request cannot be used; `error` says what.",
        500: "A fault of the service.",
        503: "Too many searches wait, or the answer took too long.",
    }.items()
}
WRITE_FAILURES = FAILURES | {
    401: {"model": Failure, "description": "The token is missing or wrong."},
    403: {"model": Failure, "description": "This service was started without a token: it only reads."},
    409: {"model": Failure, "description": "Another process is writing to the gallery, or the disk refuses."},
}

UPLOADS = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
SEARCH_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/SearchRequest"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["picture"],
                    "properties": {
                        "search": {
                            "type": "string",
                            "description": "A SearchRequest as JSON; without it each picture is a query.",
                        },
                        "picture": UPLOADS,
                    },
                }
            },
        },
    }
}
ADD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["picture"],
                    "properties": {
                        "metadata": {"type": "string", "description": "A JSON object: columns of all these pictures."},
                        "picture": UPLOADS,
                    },
                }
            }
        },
    }
}


def handle_failures(app: FastAPI) -> None:
    def failure(status: int, reason: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        retry = {"Retry-After": "1"} if status == 503 else {}
        return JSONResponse({"error": printable(reason)[:1000]}, status, {**(headers or {}), **retry})

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return failure(error.status, str(error), {"WWW-Authenticate": "Bearer"} if error.status == 401 else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return failure(422, _reasons(error.errors()))

    @app.exception_handler(ValidationError)
    async def invalid_body(_: Request, error: ValidationError) -> JSONResponse:
        return failure(422, _reasons(error.errors(include_url=False, include_input=False)))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return failure(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> JSONResponse:
        return failure(499, "the client has gone")  # for the metrics: no fault, and nobody reads it

    @app.exception_handler(Exception)
    async def fault(_: Request, __: Exception) -> JSONResponse:
        return failure(500, "the service has made a mistake; its log has the rest")


def _reasons(errors: Sequence[Any]) -> str:
    """What pydantic found wrong, without the values, in one line."""
    return "; ".join(f"{'.'.join(str(part) for part in one['loc']) or 'the body'}: {one['msg']}" for one in errors[:5])


def describe(app: FastAPI) -> None:
    """The OpenAPI document, with the schemas of bodies that FastAPI does not read itself."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            schema = SearchRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            parts = schema.pop("$defs")
            made["components"]["schemas"] |= {**parts, "SearchRequest": schema}
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
