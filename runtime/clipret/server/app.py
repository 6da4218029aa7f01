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
GalleryName = Annotated[str | None, Query(description="Which gallery; default: the first.")]


@dataclass
class Service:
    """What the application needs: galleries by name, the first being the default, and what they share."""

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

    def served(self, name: str | None) -> ServedGallery:
        if name is None:
            return next(iter(self.galleries.values()))
        if name not in self.galleries:
            raise NotFoundError("there is no gallery of that name: GET /galleries lists them")
        return self.galleries[name]


def create_app(service: Service) -> ServiceMiddleware:
    """The application inside its middleware."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for served in service.galleries.values():
            await served.start()
        yield
        for served in service.galleries.values():
            await served.stop()

    app = FastAPI(
        title="clipret",
        description="Exact search of images by text and image.",
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

    async def answered(served: ServedGallery, request: SearchRequest, pixels: Sequence[Any]) -> JSONResponse:
        began = time.perf_counter()
        queries = checked(request, pixels, limits)
        answer = await served.search(
            queries, request.k, where=request.where, exclude=request.exclude, min_score=request.min_score
        )
        return JSONResponse(_shown(served, answer, time.perf_counter() - began))

    @app.get("/search", response_model=SearchResponse, summary="Search by text, or for images like one")
    async def search(
        q: Annotated[list[str], Query(description="A text; several are queries of their own.")] = [],  # noqa: B006
        like: Annotated[list[Id], Query(description="An image of the gallery, by id, added to each query.")] = [],  # noqa: B006
        minus: Annotated[list[str], Query(description="What the images shall not show.")] = [],  # noqa: B006
        minus_weight: Annotated[float, Query(ge=0, le=10, allow_inf_nan=False)] = 0.5,
        k: Annotated[int, Query(ge=1, le=limits.k, description="How many images a query.")] = 20,
        where: Annotated[str | None, Query(description="SQL over the gallery's columns, e.g. hour < 6")] = None,
        exclude: Annotated[list[Id], Query(description="Images that are not wanted, by id.")] = [],  # noqa: B006
        min_score: Annotated[Score | None, Query()] = None,
        gallery: GalleryName = None,
    ) -> Response:
        """The k best images of each query, best first. A score is the cosine of image and query, or what re-ranking
        makes of it: see GET /galleries."""
        also = [{"id": number} for number in like]
        against = [{"text": text, "weight": -minus_weight} for text in minus]
        bases = [[{"text": text}] for text in q] or ([[]] if like else [])
        if not bases:
            raise RequestError("q is missing: name a text, or an image with like")
        queries = [{"parts": [*base, *also, *against]} for base in bases]
        request = SearchRequest.model_validate(
            {"queries": queries, "k": k, "where": where, "exclude": exclude, "min_score": min_score}
        )
        return await answered(service.served(gallery), request, [])

    async def search_by_json(search: SearchRequest) -> Response:
        return await answered(service.served(search.gallery), search, [])

    async def search_by_form(form: Annotated[SearchForm, File()]) -> Response:
        """JSON, or multipart with uploads that the JSON in its field `search` refers to."""
        search = form.request
        served = service.served(search.gallery)
        return await answered(served, search, await service.uploads.each(form.image, served.pixels))

    # The document has one of the two, and leads to a SearchRequest by its form as well.
    also_json = {"content": {JSON: {"schema": {"$ref": f"#/components/schemas/{SearchRequest.__name__}"}}}}
    add = partial(app.router.add_api_route, "/search", methods=["POST"], response_model=SearchResponse)
    add(search_by_json, route_class_override=JsonRoute, include_in_schema=False)
    add(
        search_by_form,
        route_class_override=UploadRoute,
        openapi_extra={"requestBody": also_json},
        summary="Search by texts, images of the gallery and uploads, with weights",
    )


def _shown(served: ServedGallery, answer: Answer, seconds: float) -> dict[str, Any]:
    """A SearchResponse. Addresses are relative, so that the service also works below a path prefix of a proxy."""
    own = f"?gallery={quote(served.name, safe='')}"
    results = []
    for hits in answer.results:
        shown = []
        for hit in hits:
            # With the bytes' own name in the address a browser may keep it for good.
            address = f"{hit.id}{own}" + (f"&v={hit.image.hash[:12]}" if hit.image.hash else "")
            shown.append(
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
        results.append({"hits": shown})
    snapshot = answer.snapshot
    facts = {
        "gallery": served.name,
        "snapshot": snapshot.number,
        "images": snapshot.count,
        "seconds": round(seconds, 6),
    }
    return {**facts, "results": results}


Number = Annotated[Id, InPath(description="An image's id.")]
Version = Annotated[str | None, Query(max_length=64, description="Lets a browser keep the answer.")]
Side = Annotated[int, Query(ge=16, le=SIDES[-1], description="Longest side in pixels, rounded up to one there is.")]


def _add_images(app: FastAPI, service: Service) -> None:

    async def sent(request: Request, served: ServedGallery, id: int, v: str | None, side: int) -> Response:
        root, image = await served.record(id)
        tag = f'"{image.hash[:24] or f"{image.size}-{image.mtime_ns}"}-{side}"'
        keep = "private, max-age=31536000, immutable" if v and image.hash.startswith(v) else "no-cache"
        headers = {"ETag": tag, "Cache-Control": keep}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        work: Callable[[], tuple[bytes, str]]
        work = (lambda: (service.thumbnails.get(root, image, side), KIND)) if side else lambda: original(root, image)
        try:
            content, kind = await served.in_images(work)
        except ImageError as error:
            raise NotFoundError(f"image {id} cannot be shown: {error}") from error
        return Response(content, media_type=kind, headers=headers)

    images = {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}

    @app.get("/images/{id}", response_class=Response, responses={200: images}, summary="An image's own file")
    async def image(request: Request, id: Number, gallery: GalleryName = None, v: Version = None) -> Response:
        return await sent(request, service.served(gallery), id, v, 0)

    @app.get("/thumbnails/{id}", response_class=Response, responses={200: images}, summary="An image made small")
    async def thumbnail(
        request: Request, id: Number, gallery: GalleryName = None, v: Version = None, side: Side = 320
    ) -> Response:
        return await sent(request, service.served(gallery), id, v, next(one for one in SIDES if one >= side))


_bearer = HTTPBearer(auto_error=False, description="The token that the service was started with.")


async def _permitted(request: Request) -> None:
    """Refuse a change to a gallery without the service's token. Raises RequestError."""
    wanted, given = request.app.state.service.token, await _bearer(request)
    if wanted is None:
        raise ReadOnlyError("this service only reads: start it with --token-file to change galleries")
    if given is None or not hmac.compare_digest(given.credentials.encode(), wanted.encode()):
        raise DeniedError("the token is missing or wrong: send it as  Authorization: Bearer TOKEN")


class _AddRoute(UploadRoute):
    """Checks the token before images are read."""

    async def admit(self, request: Request) -> None:
        await _permitted(request)


def _add_writing(app: FastAPI, service: Service) -> None:
    guarded: dict[str, Any] = {"dependencies": [Security(_bearer), Depends(_permitted)], "responses": WRITE_FAILURES}

    async def add(name: str, form: Annotated[AddForm, File()]) -> Response:
        """All images of the request or none; those whose bytes the gallery got this way before stay as they are."""
        served = service.served(name)
        added = await served.add(await service.uploads.each(form.image, served.read), form.columns)
        images = [{"id": number, "new": new} for number, new in added]
        return JSONResponse({"images": images, "snapshot": served.snapshot.number})

    app.router.add_api_route(
        "/galleries/{name}/add",
        add,
        methods=["POST"],
        route_class_override=_AddRoute,
        response_model=AddResponse,
        summary="Add images",
        **guarded,
    )

    @app.delete("/galleries/{name}/images/{id}", response_model=Health, summary="Delete an image", **guarded)
    async def remove(name: str, id: Annotated[Id, InPath()]) -> Response:
        """Nothing finds it any more. Its file stays where it was indexed from, and goes where it was added here."""
        await service.served(name).remove(id)
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
                "reload_failing": served.trouble is not None,
            }
            for served in service.galleries.values()
        ]

    @app.get("/galleries/{name}/choices", summary="Columns with few values, for filters")
    async def choices(name: str) -> dict[str, list[Choice]]:
        served = service.served(name)
        found = await served.choices()
        return {column: [Choice(value=value, images=count) for value, count in rows] for column, rows in found.items()}

    @app.get("/healthz", response_model=Health, summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", response_model=Health, summary="Whether searches are answered")
    async def readyz() -> dict[str, str]:
        for served in service.galleries.values():  # a search through the engine, the ranker and the queue
            await served.search([[("ready", 1.0)]], 1)
        return {"status": "ready"}

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        summary="Counters, in Prometheus' text format",
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    """Adds the page. Its files are read once at the start: no name that a client sends reaches the disk."""
    files = dict[str, tuple[bytes, str, str]]()
    for file in sorted(STATIC.iterdir()):
        content = file.read_bytes()
        files[file.name] = (content, KINDS[file.suffix], f'"{blake2b(content, digest_size=12).hexdigest()}"')

    def sent(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFoundError("there is no such file")
        content, kind, tag = files[name]
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return sent(request, "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return sent(request, "docs.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(request: Request, name: str) -> Response:
        return sent(request, name)
