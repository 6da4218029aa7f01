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
        400: "The request is not valid HTTP or multipart.",
        404: "The gallery or image does not exist.",
        413: "The body is too large.",
        415: "The body is neither JSON nor multipart.",
        421: "The service does not answer to this host name.",
        422: "A value of the request is invalid; `error` says which.",
        500: "An internal error of the service.",
        503: "Too many searches are waiting, or the request took too long.",
    }.items()
}
WRITE_FAILURES: dict[int | str, dict[str, Any]] = {
    401: {"model": Failure, "description": "The token is missing or wrong."},
    403: {"model": Failure, "description": "The service was started without a token and is read-only."},
    409: {"model": Failure, "description": "Another process is writing to the gallery, or it cannot be written."},
}


def refusal(error: RequestError) -> JSONResponse:
    """The response to a refused request."""
    return _failure(error.status, str(error), error.headers)


def handle_failures(app: FastAPI) -> None:
    """Turn every exception of `app` into a response with a `Failure`."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def invalid(_: Request, error: RequestValidationError | ValidationError) -> JSONResponse:
        reasons = [f"{_location(fault['loc'])}: {fault['msg']}" for fault in error.errors()[:5]]
        return _failure(422, "; ".join(reasons))  # without the values

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        # FastAPI wraps every exception that occurs while it reads a body.
        if isinstance(error.__cause__, RequestError):
            return refusal(error.__cause__)
        if isinstance(error.__cause__, ClientDisconnect):
            return _failure(499, "the client has disconnected")  # for the metrics only
        return _failure(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def fault(_: Request, __: Exception) -> JSONResponse:
        return _failure(500, "internal error: the log of the service has the details")


def _failure(status: int, reason: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": printable(reason)[:1000]}, status, headers)


def _location(location: tuple[int | str, ...]) -> str:
    """The path of an invalid value in a request."""
    return ".".join(map(str, location[1:] if location[:1] == ("body",) else location)) or "the body"
