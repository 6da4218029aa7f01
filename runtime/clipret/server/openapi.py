"""Errors in the service's responses and in its OpenAPI document."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from clipret.errors import printable
from clipret.server.limits import RequestError
from clipret.server.schemas import Failure

__all__ = ["FAILURES", "WRITE_FAILURES", "handle_failures", "refusal"]

FAILURES: dict[int | str, dict[str, Any]] = {
    code: {"model": Failure, "description": text}
    for code, text in {
        400: "The request is no valid HTTP or multipart.",
        404: "There is no such gallery or image.",
        413: "The body is too large.",
        415: "The body is neither JSON nor multipart.",
        421: "The service does not go by this name.",
        422: "Something in the request cannot be used; `error` says what.",
        500: "A fault of the service.",
        503: "Too many searches wait, or the answer took too long.",
    }.items()
}
WRITE_FAILURES: dict[int | str, dict[str, Any]] = {
    401: {"model": Failure, "description": "The token is missing or wrong."},
    403: {"model": Failure, "description": "This service was started without a token: it only reads."},
    409: {"model": Failure, "description": "Another process is writing to the gallery, or the disk refuses."},
}


def refusal(error: RequestError) -> JSONResponse:
    """The response to a refused request."""
    return _failure(error.status, str(error), error.headers)


def handle_failures(app: FastAPI) -> None:
    """Turn every error of `app` into a `Failure`."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def invalid(_: Request, error: RequestValidationError | ValidationError) -> JSONResponse:
        reasons = [f"{_place(one['loc'])}: {one['msg']}" for one in error.errors()[:5]]
        return _failure(422, "; ".join(reasons))  # without the values

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        # FastAPI makes one of whatever it meets while it reads a body.
        if isinstance(error.__cause__, RequestError):
            return refusal(error.__cause__)
        if isinstance(error.__cause__, ClientDisconnect):
            return _failure(499, "the client has gone")  # for the metrics: no fault, and nobody reads it
        return _failure(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def fault(_: Request, __: Exception) -> JSONResponse:
        return _failure(500, "the service has made a mistake; its log has the rest")


def _failure(status: int, reason: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": printable(reason)[:1000]}, status, headers)


def _place(location: tuple[int | str, ...]) -> str:
    """Where in a request something is wrong."""
    return ".".join(map(str, location[1:] if location[:1] == ("body",) else location)) or "the body"
