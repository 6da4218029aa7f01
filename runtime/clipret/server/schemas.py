"""Requests and responses as pydantic models; the OpenAPI document is generated from them."""

from typing import Annotated

from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Json, StringConstraints, model_validator

from clipret.sources.item import Value, scalar

__all__ = [
    "AddForm",
    "AddResponse",
    "Added",
    "Choice",
    "Failure",
    "GalleryFacts",
    "Health",
    "HitResponse",
    "QueryRequest",
    "QueryResult",
    "SearchForm",
    "SearchRequest",
    "SearchResponse",
]

Id = Annotated[int, Field(ge=1, le=(1 << 63) - 1)]
Weight = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Score = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


def _check_column(name: str) -> str:
    if not name.strip() or not name.isprintable():
        raise ValueError("a column name must be printable and not blank")
    return name


ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(_check_column)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PartRequest(_Strict):
    """Exactly one of `text`, `id` (an image of the gallery) and `image` (the number of an upload, from 0)."""

    text: str | None = None
    id: Id | None = None
    image: Annotated[int, Field(ge=0, le=63)] | None = None
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _check_content(self) -> "PartRequest":
        if sum(value is not None for value in (self.text, self.id, self.image)) != 1:
            raise ValueError("a part has exactly one of text, id and image")
        return self


class QueryRequest(_Strict):
    """The weighted sum of its parts. A negative weight moves the query away from a part."""

    parts: Annotated[list[PartRequest], Field(min_length=1, max_length=64)]


class SearchRequest(_Strict):
    """A search with one or more queries, all of the same snapshot of the gallery."""

    queries: Annotated[list[str | QueryRequest], Field(min_length=1, max_length=64)]
    k: Annotated[int, Field(ge=1)] = 20
    gallery: str | None = None
    where: str | None = None
    exclude: Annotated[list[Id], Field(max_length=1000)] = []
    min_score: Score | None = None


class _Form(BaseModel):
    """A multipart body. Unknown fields are ignored, unknown files are refused."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _check_files(self) -> "_Form":
        for name, value in (self.model_extra or {}).items():
            if isinstance(value, UploadFile):
                raise ValueError(f"the file field {name[:100]!r} is unknown: send images in the field image")
        return self


class SearchForm(_Form):
    """A search with uploads. Parts of queries refer to them by number."""

    search: Annotated[
        Json[SearchRequest] | None,
        Field(description="A SearchRequest as JSON. Default: each image is a query."),
    ] = None
    image: Annotated[list[UploadFile], Field(min_length=1, description="Images to search with.")]

    @property
    def request(self) -> SearchRequest:
        """The search request of the form. Raises ValidationError of pydantic."""
        if self.search is not None:
            return self.search
        return SearchRequest(queries=[QueryRequest(parts=[PartRequest(image=at)]) for at in range(len(self.image))])


class AddForm(_Form):
    """Images for a gallery."""

    metadata: Annotated[
        Json[Annotated[dict[ColumnName, Value], Field(max_length=64)]] | None,
        Field(description="A JSON object with the metadata of all these images: texts and numbers by column."),
    ] = None
    image: Annotated[list[UploadFile], Field(min_length=1, description="The images.")]

    @property
    def columns(self) -> dict[str, Value]:
        """The metadata as a gallery stores it."""
        return {name: scalar(value) for name, value in (self.metadata or {}).items()}


class HitResponse(BaseModel):
    """One result. `image` and `thumbnail` are URLs relative to that of the service."""

    rank: int
    id: int
    score: float
    path: str
    metadata: dict[str, Value]
    image: str
    thumbnail: str


class QueryResult(BaseModel):
    hits: list[HitResponse]


class SearchResponse(BaseModel):
    """All results are from the same version of the gallery; `snapshot` counts the loaded versions."""

    gallery: str
    snapshot: int
    images: int
    seconds: float
    results: list[QueryResult]


class GalleryFacts(BaseModel):
    """A served gallery. With any step of re-ranking in `rerank`, scores are not cosine similarities."""

    name: str
    images: int
    snapshot: int
    model: str
    columns: list[str]
    rerank: list[str]
    writable: bool
    reload_failing: bool


class Choice(BaseModel):
    value: Value
    images: int


class Added(BaseModel):
    id: int
    new: bool


class AddResponse(BaseModel):
    images: list[Added]
    snapshot: int


class Health(BaseModel):
    status: str


class Failure(BaseModel):
    """The response for every status of 400 and above."""

    error: str
