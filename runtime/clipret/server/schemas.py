"""Requests and responses as pydantic models, from which the OpenAPI document is generated."""

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


def _proper(name: str) -> str:
    if not name.strip() or not name.isprintable():
        raise ValueError("a column needs a proper name")
    return name


ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(_proper)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PartRequest(_Strict):
    """Exactly one of `text`, `id` (an image of the gallery) and `image` (an upload, counted from 0)."""

    text: str | None = None
    id: Id | None = None
    image: Annotated[int, Field(ge=0, le=63)] | None = None
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _one(self) -> "PartRequest":
        if sum(value is not None for value in (self.text, self.id, self.image)) != 1:
            raise ValueError("a part is one of text, id and image")
        return self


class QueryRequest(_Strict):
    """The weighted sum of its parts; a negative weight moves away from one."""

    parts: Annotated[list[PartRequest], Field(min_length=1, max_length=64)]


class SearchRequest(_Strict):
    """One search: several queries are answered from the same snapshot of the gallery."""

    queries: Annotated[list[str | QueryRequest], Field(min_length=1, max_length=64)]
    k: Annotated[int, Field(ge=1)] = 20
    gallery: str | None = None
    where: str | None = None
    exclude: Annotated[list[Id], Field(max_length=1000)] = []
    min_score: Score | None = None


class _Form(BaseModel):
    """A multipart body. Unknown fields are ignored, but unknown files are an error: their sender expects something."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _known(self) -> "_Form":
        for name, value in (self.model_extra or {}).items():
            if isinstance(value, UploadFile):
                raise ValueError(f"the file field {name[:100]!r} is unknown: send images as  image")
        return self


class SearchForm(_Form):
    """A search with uploads, which the parts of its queries refer to by number."""

    search: Annotated[
        Json[SearchRequest] | None,
        Field(description="A SearchRequest as JSON; without it each image is a query."),
    ] = None
    image: Annotated[list[UploadFile], Field(min_length=1, description="Images to search with.")]

    @property
    def request(self) -> SearchRequest:
        """The search of the form. Raises pydantic's ValidationError."""
        if self.search is not None:
            return self.search
        return SearchRequest(queries=[QueryRequest(parts=[PartRequest(image=at)]) for at in range(len(self.image))])


class AddForm(_Form):
    """Images for a gallery."""

    metadata: Annotated[
        Json[Annotated[dict[ColumnName, Value], Field(max_length=64)]] | None,
        Field(description="A JSON object of texts and numbers: columns of all these images."),
    ] = None
    image: Annotated[list[UploadFile], Field(min_length=1, description="The images.")]

    @property
    def columns(self) -> dict[str, Value]:
        """The metadata as a gallery keeps it."""
        return {name: scalar(value) for name, value in (self.metadata or {}).items()}


class HitResponse(BaseModel):
    """One result; `image` and `thumbnail` are addresses relative to the service's own."""

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
    """`snapshot` numbers the loaded versions of the gallery: all results are of the same one."""

    gallery: str
    snapshot: int
    images: int
    seconds: float
    results: list[QueryResult]


class GalleryFacts(BaseModel):
    """`rerank`: the re-ranking steps, after which a score is no longer a cosine; usually none."""

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
    """The response for every status from 400."""

    error: str
