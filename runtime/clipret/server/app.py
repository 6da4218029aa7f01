"""The routes of the service, declared for FastAPI."""

import hmac
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, FastAPI, File, Query, Request, Response, Security
from fastapi import Path as InPath
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer

from clipret.images.walk import ImageError
from clipret.server.limits import DeniedError, Limits, NotFoundError, ReadOnlyError, RequestError
from clipret.server.metrics import CONTENT_TYPE, Metrics
from clipret.server.middleware import ServiceMiddleware
from clipret.server.openapi import FAILURES, WRITE_FAILURES, handle_failures
from clipret.server.requests import JSON, JsonRoute, UploadRoute, Uploads, checked
from clipret.server.schemas import (
    AddForm,
    AddResponse,
    Choice,
    GalleryFacts,
    Health,
    Id,
    Score,
    SearchForm,
    SearchRequest,
    SearchResponse,
)
from clipret.server.service import Answer, ServedGallery, Threads
from clipret.server.thumbnails import KIND, SIDES, Thumbnails, original

__all__ = ["Service", "create_app"]

STATIC = Path(__file__).parent / "static"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
GalleryName = Annotated[str | None, Query(description="Name of the gallery. Default: the first.")]


@dataclass
class Service:
    """What the application needs.

    Attributes:
        galleries: The served galleries by name; the first is the default.
        threads: The threads of all galleries.
        limits: Limits of requests and of the service.
        metrics: Counts requests, and reports on the galleries.
        token: The token that changes to galleries require; None turns changes off.
        hosts: As for `ServiceMiddleware`.
        thumbnails: The thumbnails of all galleries.
        uploads: Limits on forms with uploads.
    """

    galleries: Mapping[str, ServedGallery]
    threads: Threads
    limits: Limits
    metrics: Metrics
    token: str | None = None
    hosts: Collection[str] | None = None
    thumbnails: Thumbnails = field(init=False)
    uploads: Uploads = field(init=False)

    def __post_init__(self) -> None:
        self.thumbnails = Thumbnails(self.limits.thumbnails)
        self.uploads = Uploads(self.limits)
        self.metrics.follow(self.galleries.values())

    def gallery(self, name: str | None) -> ServedGallery:
        """The gallery of a name, None for the default. Raises NotFoundError."""
        if name is None:
            return next(iter(self.galleries.values()))
        if name not in self.galleries:
            raise NotFoundError("there is no gallery of this name: GET /galleries lists them")
        return self.galleries[name]


def create_app(service: Service) -> ServiceMiddleware:
    """The application with its middleware.

    Args:
        service: From `open_service`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for served in service.galleries.values():
            await served.start()
        yield
        for served in service.galleries.values():
            await served.stop()

    app = FastAPI(
        title="clipret",
        description="Exact search for images by text and by image.",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=FAILURES,
        form_limits={
            "max_files": service.limits.files,
            "max_fields": service.limits.files,
            "max_part_size": service.limits.json,
        },
    )
    app.state.service = service
    handle_failures(app)
    _add_search(app, service)
    _add_images(app, service)
    _add_writing(app, service)
    _add_facts(app, service)
    _add_page(app)
    return ServiceMiddleware(app, service.limits, service.metrics, service.hosts)


def _add_search(app: FastAPI, service: Service) -> None:
    limits = service.limits

    async def respond(served: ServedGallery, request: SearchRequest, pixels: Sequence[Any]) -> JSONResponse:
        began = time.perf_counter()
        queries = checked(request, pixels, limits)
        answer = await served.search(
            queries, request.k, where=request.where, exclude=request.exclude, min_score=request.min_score
        )
        return JSONResponse(_search_response(served, answer, time.perf_counter() - began))

    @app.get("/search", response_model=SearchResponse, summary="Search by text, or for images similar to one")
    async def search(
        q: Annotated[list[str], Query(description="A text. Several texts are separate queries.")] = [],  # noqa: B006
        like: Annotated[list[Id], Query(description="Id of an image of the gallery; it is added to each query.")] = [],  # noqa: B006
        minus: Annotated[list[str], Query(description="A text that the images should not match.")] = [],  # noqa: B006
        minus_weight: Annotated[float, Query(ge=0, le=10, allow_inf_nan=False)] = 0.5,
        k: Annotated[int, Query(ge=1, le=limits.k, description="Number of images per query.")] = 20,
        where: Annotated[str | None, Query(description="SQL over the columns of the gallery, e.g. hour < 6")] = None,
        exclude: Annotated[list[Id], Query(description="Ids of images to leave out.")] = [],  # noqa: B006
        min_score: Annotated[Score | None, Query()] = None,
        gallery: GalleryName = None,
    ) -> Response:
        """The k best images of each query, best first. The score is the cosine similarity of image and query, or the
        result of re-ranking: see GET /galleries."""
        similar = [{"id": id} for id in like]
        negative = [{"text": text, "weight": -minus_weight} for text in minus]
        bases = [[{"text": text}] for text in q] or ([[]] if like else [])
        if not bases:
            raise RequestError("q is missing: give a text as q, or the id of an image as like")
        queries = [{"parts": [*base, *similar, *negative]} for base in bases]
        request = SearchRequest.model_validate(
            {"queries": queries, "k": k, "where": where, "exclude": exclude, "min_score": min_score}
        )
        return await respond(service.gallery(gallery), request, [])

    async def search_by_json(search: SearchRequest) -> Response:
        return await respond(service.gallery(search.gallery), search, [])

    async def search_by_form(form: Annotated[SearchForm, File()]) -> Response:
        """Send JSON, or multipart with uploads to which the JSON in the field `search` refers."""
        search = form.request
        served = service.gallery(search.gallery)
        return await respond(served, search, await service.uploads.read(form.image, served.pixels))

    # The OpenAPI document has one of the two routes, with both content types.
    json_body = {"content": {JSON: {"schema": {"$ref": f"#/components/schemas/{SearchRequest.__name__}"}}}}
    add = partial(app.router.add_api_route, "/search", methods=["POST"], response_model=SearchResponse)
    add(search_by_json, route_class_override=JsonRoute, include_in_schema=False)
    add(
        search_by_form,
        route_class_override=UploadRoute,
        openapi_extra={"requestBody": json_body},
        summary="Search by weighted texts, images of the gallery and uploads",
    )


def _search_response(served: ServedGallery, answer: Answer, seconds: float) -> dict[str, Any]:
    """A SearchResponse. URLs are relative, so that the service also works below a path prefix of a proxy."""
    parameter = f"?gallery={quote(served.name, safe='')}"
    results = []
    for images in answer.results:
        hits = []
        for hit in images:
            # With a hash of the bytes in the URL, browsers may cache the image forever.
            address = f"{hit.id}{parameter}" + (f"&v={hit.image.hash[:12]}" if hit.image.hash else "")
            hits.append(
                {
                    "rank": hit.rank,
                    "id": hit.id,
                    "score": hit.score,
                    "path": served.shown_path(hit.image),
                    "metadata": hit.metadata,
                    "image": f"images/{address}",
                    "thumbnail": f"thumbnails/{address}",
                }
            )
        results.append({"hits": hits})
    snapshot = answer.snapshot
    facts = {
        "gallery": served.name,
        "snapshot": snapshot.number,
        "images": snapshot.count,
        "seconds": round(seconds, 6),
    }
    return {**facts, "results": results}


Number = Annotated[Id, InPath(description="Id of an image.")]
Version = Annotated[str | None, Query(max_length=64, description="Lets browsers cache the image.")]
Side = Annotated[int, Query(ge=16, le=SIDES[-1], description="Longest side, pixels, rounded up to an available size.")]


def _add_images(app: FastAPI, service: Service) -> None:

    async def respond(request: Request, served: ServedGallery, id: int, v: str | None, side: int) -> Response:
        root, image = await served.record(id)
        tag = f'"{image.hash[:24] or f"{image.size}-{image.mtime_ns}"}-{side}"'
        caching = "private, max-age=31536000, immutable" if v and image.hash.startswith(v) else "no-cache"
        headers = {"ETag": tag, "Cache-Control": caching}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        read: Callable[[], tuple[bytes, str]]
        read = (lambda: (service.thumbnails.get(root, image, side), KIND)) if side else lambda: original(root, image)
        try:
            content, kind = await served.in_images(read)
        except ImageError as error:
            raise NotFoundError(f"image {id} cannot be shown: {error}") from error
        return Response(content, media_type=kind, headers=headers)

    images = {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}

    @app.get("/images/{id}", response_class=Response, responses={200: images}, summary="The original file of an image")
    async def image(request: Request, id: Number, gallery: GalleryName = None, v: Version = None) -> Response:
        return await respond(request, service.gallery(gallery), id, v, 0)

    @app.get("/thumbnails/{id}", response_class=Response, responses={200: images}, summary="A thumbnail of an image")
    async def thumbnail(
        request: Request, id: Number, gallery: GalleryName = None, v: Version = None, side: Side = 320
    ) -> Response:
        return await respond(request, service.gallery(gallery), id, v, next(size for size in SIDES if size >= side))


_bearer = HTTPBearer(auto_error=False, description="The token that the service was started with.")


async def _check_token(request: Request) -> None:
    """Refuse a change to a gallery without the token of the service. Raises RequestError."""
    token, credentials = request.app.state.service.token, await _bearer(request)
    if token is None:
        raise ReadOnlyError("this service is read-only: start it with --token-file to allow changes")
    if credentials is None or not hmac.compare_digest(credentials.credentials.encode(), token.encode()):
        raise DeniedError("the token is missing or wrong: send it as  Authorization: Bearer TOKEN")


class _AddRoute(UploadRoute):
    """Checks the token before uploads are read."""

    async def admit(self, request: Request) -> None:
        await _check_token(request)


def _add_writing(app: FastAPI, service: Service) -> None:
    protected: dict[str, Any] = {
        "dependencies": [Security(_bearer), Depends(_check_token)],
        "responses": WRITE_FAILURES,
    }

    async def add(name: str, form: Annotated[AddForm, File()]) -> Response:
        """Adds all images of the request or none. An image that was added before with the same bytes keeps its id."""
        served = service.gallery(name)
        added = await served.add(await service.uploads.read(form.image, served.read), form.columns)
        images = [{"id": id, "new": new} for id, new in added]
        return JSONResponse({"images": images, "snapshot": served.snapshot.number})

    app.router.add_api_route(
        "/galleries/{name}/add",
        add,
        methods=["POST"],
        route_class_override=_AddRoute,
        response_model=AddResponse,
        summary="Add images",
        **protected,
    )

    @app.delete("/galleries/{name}/images/{id}", response_model=Health, summary="Delete an image", **protected)
    async def remove(name: str, id: Annotated[Id, InPath()]) -> Response:
        """Deletes the image from the gallery. Its file is deleted only if it was added through this API."""
        await service.gallery(name).remove(id)
        return JSONResponse({"status": "deleted"})


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/galleries", response_model=list[GalleryFacts], summary="The galleries served")
    async def galleries() -> list[dict[str, Any]]:
        return [
            {
                "name": served.name,
                "images": served.snapshot.count,
                "snapshot": served.snapshot.number,
                "model": served.encoder.bundle.manifest.model,
                "columns": served.snapshot.filterable,
                "rerank": served.settings.rerank.steps,
                "writable": service.token is not None,
                "reload_failing": served.reload_error is not None,
            }
            for served in service.galleries.values()
        ]

    @app.get("/galleries/{name}/choices", summary="Metadata columns with few values, and these values")
    async def choices(name: str) -> dict[str, list[Choice]]:
        columns = await service.gallery(name).choices()
        return {
            column: [Choice(value=value, images=count) for value, count in values] for column, values in columns.items()
        }

    @app.get("/healthz", response_model=Health, summary="Whether the process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", response_model=Health, summary="Whether searches work")
    async def readyz() -> dict[str, str]:
        for served in service.galleries.values():  # a search through queue, model and ranker
            await served.search([[("ready", 1.0)]], 1)
        return {"status": "ready"}

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        summary="Metrics in the text format of Prometheus",
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    """Add the page. Its files are read once at the start, so that no name from a client reaches the disk."""
    files = dict[str, tuple[bytes, str, str]]()
    for file in sorted(STATIC.iterdir()):
        content = file.read_bytes()
        files[file.name] = (content, KINDS[file.suffix], f'"{blake2b(content, digest_size=12).hexdigest()}"')

    def respond(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFoundError("there is no such file")
        content, kind, tag = files[name]
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return respond(request, "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return respond(request, "docs.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(request: Request, name: str) -> Response:
        return respond(request, name)
