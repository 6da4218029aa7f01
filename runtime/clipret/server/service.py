"""A served gallery: its current snapshot, searches in micro-batches, additions and removals."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from clipret.arrays import Floats
from clipret.errors import ClipretError
from clipret.gallery.gallery import ImageRecord
from clipret.images.decode import load
from clipret.images.walk import ImageError
from clipret.inference.encoder import Encoder
from clipret.milvus.search import open_milvus
from clipret.openers import open_searchable
from clipret.search.searchable import Searchable
from clipret.search.searcher import Part, Query, Searcher
from clipret.server.batcher import Batcher
from clipret.server.limits import Limits, NotFoundError, RequestError
from clipret.server.snapshot import SearchSettings, ServedSnapshot
from clipret.server.watch import CollectionWatch, GalleryWatch, Watch
from clipret.server.writing import add_images, remove_image
from clipret.sources.item import Value, image_file
from clipret.tables import OWN_COLUMNS

__all__ = ["Answer", "Content", "RankRequest", "RankedImage", "ServedGallery", "Threads"]

T = TypeVar("T")
Content = str | int | npt.NDArray[np.uint8]
"""Of a part of a query: a text, the id of an image of the gallery, or the pixels of another."""

_CHUNK = 8  # images added that are encoded in one go, between the searches


@dataclass(frozen=True)
class Threads:
    """The threads of a service. `engine` has one thread, because towers and rankers are not made for more."""

    engine: Executor
    images: Executor
    filters: Executor
    files: Executor


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The version of a gallery that the service answers from; `number` counts loaded versions from 1."""

    number: int
    searched: Searchable
    count: int

    @property
    def filterable(self) -> list[str]:
        """The columns that a filter can use."""
        return [*OWN_COLUMNS, *self.searched.columns]


@dataclass(frozen=True, eq=False)
class RankRequest:
    """A search of one snapshot; `allowed` is its filter. Each query is a weighted sum of its parts, as in `Query`."""

    snapshot: Snapshot
    queries: tuple[tuple[tuple[Content, float], ...], ...]
    k: int
    where: str | None = None
    allowed: Any = None
    exclude: frozenset[int] = frozenset()
    min_score: float | None = None

    @property
    def group(self) -> tuple[object, ...]:
        """Requests of one group are ranked together; requests for many images do not slow down those for few."""
        return (self.snapshot.number, self.where, self.exclude, self.min_score, (self.k - 1).bit_length())


@dataclass(frozen=True)
class RankedImage:
    """One result with the record and metadata of the same snapshot."""

    rank: int
    id: int
    score: float
    image: ImageRecord
    metadata: Mapping[str, Value]


@dataclass(frozen=True)
class Answer:
    """The results of each query of a request."""

    snapshot: Snapshot
    results: list[list[RankedImage]]


@dataclass
class ServedGallery:
    """A gallery under its `name`. Everything but `load` and the work in threads runs in the event loop.

    The snapshot may be replaced at any await: the code that answers a request reads `snapshot` once.
    """

    name: str
    path: Path | str  # a folder, or milvus+URI
    encoder: Encoder
    limits: Limits
    threads: Threads
    settings: SearchSettings = field(default_factory=SearchSettings)
    note: Callable[[int], None] = lambda _: None
    reloads: int = 0
    trouble: str | None = None
    _watch: Watch = field(init=False)
    _snapshot: Snapshot | None = None
    _reference: Floats | None = None

    def __post_init__(self) -> None:
        self._watch = CollectionWatch(self.path) if isinstance(self.path, str) else GalleryWatch(self.path)
        self._embedder = Searcher(open_searchable(self.path), self.encoder, templates=self.settings.templates)
        self._refreshing = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None
        self.batcher = Batcher[RankRequest, Answer](
            self.answer,
            self.threads.engine,
            most=self.limits.batch,
            gather=self.limits.gather,
            waiting=self.limits.waiting,
            size=lambda request: sum(map(len, request.queries)),
            note=self.note,
        )

    @property
    def snapshot(self) -> Snapshot:
        assert self._snapshot is not None  # `load` comes first
        return self._snapshot

    def load(self) -> None:
        """Read the gallery and open the towers, before the first request. Raises ClipretError."""
        if self.settings.reference:
            self._reference = self._embedder.embed(list(dict.fromkeys(self.settings.reference)))
        self._renew()
        self.encoder.encode_texts(["an image"])
        size = self.encoder.bundle.manifest.image.size
        self.encoder.image_tower.run(np.zeros((1, size, size, 3), np.uint8))

    async def start(self) -> None:
        self.batcher.start()
        self._following = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        await self.batcher.stop()
        self._watch.close()

    async def refresh(self) -> None:
        """Load what was committed before this call; the old snapshot answers until the new one can."""
        async with self._refreshing:
            try:
                await self._in(self.threads.files, self._renew)
                self.trouble = None
            except Exception as error:  # whatever it is, the old state answers and the next look may succeed
                self.trouble = str(error)

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await self.refresh()
            # A gallery that grows all the time does not keep the machine busy with reading it.
            await asyncio.sleep(max(self.limits.reload, loop.time() - began))

    def _renew(self) -> None:
        if not self._watch.changed():
            return
        try:
            searched = self._searched()
            self._snapshot = Snapshot(self.reloads + 1, searched, searched.count())
        except BaseException:
            self._watch.close()  # what was not read is still news
            raise
        self.reloads += 1

    def _searched(self) -> Searchable:
        rerank = self.settings.rerank
        if isinstance(self.path, Path):
            return ServedSnapshot(self.path, self.encoder, rerank, self._reference, self.limits.where_seconds)
        if rerank.steps:
            raise ClipretError("re-ranking looks at every image, which Milvus does not give: serve the gallery")
        return open_milvus(self.path)

    async def search(
        self,
        queries: Sequence[Sequence[tuple[Content, float]]],
        k: int,
        *,
        where: str | None = None,
        exclude: Sequence[int] = (),
        min_score: float | None = None,
    ) -> Answer:
        """The k best of each query in the current snapshot, as by `Searcher.search` or a `Reranker`. Raises
        RequestError.
        """
        if min_score is not None and self.settings.rerank.steps:
            raise RequestError("min_score is a cosine, which this service re-ranks: leave it out")
        snapshot, allowed = self.snapshot, None
        if where is not None or exclude:
            try:
                allowed = await self._in(self.threads.filters, lambda: snapshot.searched.filter(where, exclude))
            except ClipretError as error:
                raise RequestError(str(error).removeprefix("--")) from error
        parts = tuple(tuple(query) for query in queries)
        return await self.batcher.submit(RankRequest(snapshot, parts, k, where, allowed, frozenset(exclude), min_score))

    async def record(self, number: int) -> tuple[Path, ImageRecord]:
        """The root of an image's path, and its record. Raises NotFoundError."""
        searched = self.snapshot.searched
        found = await self._in(self.threads.filters, lambda: searched.records([number]))
        if number not in found:
            raise NotFoundError(f"there is no image {number}")
        return searched.root, found[number]

    async def pixels(self, content: bytes) -> npt.NDArray[np.uint8]:
        """An uploaded image as the tower's input. Raises RequestError."""
        try:
            return await self._in(self.threads.images, lambda: load(content, self.encoder.bundle.manifest.image))
        except ImageError as error:
            raise RequestError(f"the image cannot be used: {error}") from error

    async def in_images(self, work: Callable[[], T]) -> T:
        """Run a function that reads or decodes an image in the threads for that."""
        return await self._in(self.threads.images, work)

    async def choices(self) -> dict[str, list[tuple[Value, int]]]:
        """`ServedSnapshot.choices` of the current snapshot; Milvus does not count values."""
        searched = self.snapshot.searched
        if not isinstance(searched, ServedSnapshot):
            return {}
        return await self._in(self.threads.filters, lambda: searched.choices)

    def shown_path(self, image: ImageRecord) -> str:
        """The stored path; for an image added by upload, without the gallery's own folder."""
        file = Path(image.path)
        below = isinstance(self.path, Path) and file.is_relative_to(self.path)
        return file.relative_to(self.path).as_posix() if below else image.path

    def answer(self, requests: list[RankRequest]) -> list[Answer | Exception]:
        """Encode all requests at once and rank each group at once. Runs in the thread for the model."""
        known = self._embedded([part for request in requests for query in request.queries for part, _ in query])
        results: list[Answer | Exception] = []
        groups = dict[tuple[object, ...], list[tuple[int, Floats]]]()
        for at, request in enumerate(requests):
            try:
                rows = np.array([_sum(request.snapshot.searched, query, known) for query in request.queries])
            except RequestError as error:
                results.append(error)
            else:
                results.append(Answer(request.snapshot, []))
                groups.setdefault(request.group, []).append((at, rows))
        for group in groups.values():
            self._rank(group, requests, results)
        return results

    def _rank(
        self, group: list[tuple[int, Floats]], requests: list[RankRequest], results: list[Answer | Exception]
    ) -> None:
        first = requests[group[0][0]]
        searched = first.snapshot.searched
        together = np.concatenate([rows for _, rows in group])
        most = max(requests[at].k for at, _ in group)
        try:
            scores, ids = searched.rank(together, most, first.allowed, first.min_score)
            found = np.unique(ids[ids >= 0]).tolist()
            records, metadata = searched.records(found), searched.metadata(found)
        except ClipretError as error:
            for at, _ in group:
                results[at] = RequestError(str(error).replace(searched.name, self.name))
            return
        lines = zip(ids.tolist(), scores.tolist(), strict=True)
        for at, rows in group:
            lists = list[list[RankedImage]]()
            for line, line_scores in (next(lines) for _ in rows):
                # What was deleted between the ranking and this, as may be in Milvus, is no result.
                best = [(one, score) for one, score in zip(line, line_scores, strict=True) if one in records]
                lists.append(
                    [
                        RankedImage(rank, one, score, records[one], metadata.get(one, {}))
                        for rank, (one, score) in enumerate(best[: requests[at].k], 1)
                    ]
                )
            results[at] = Answer(first.snapshot, lists)

    def _embedded(self, parts: Sequence[Content]) -> dict[str | int, Floats]:
        """The embedding of each text, and of each image's pixels by their id()."""
        texts = list(dict.fromkeys(part for part in parts if isinstance(part, str)))
        pixels = [part for part in parts if isinstance(part, np.ndarray)]
        rows = self._embedder.embed([*texts, *(Query((Part(image),)) for image in pixels)])
        return dict(zip([*texts, *map(id, pixels)], rows, strict=True))

    async def read(self, content: bytes) -> tuple[bytes, npt.NDArray[np.uint8]]:
        """An uploaded image to add: its bytes and the tower's input. Raises RequestError."""
        return content, await self.pixels(content)

    async def add(
        self, images: Sequence[tuple[bytes, npt.NDArray[np.uint8]]], metadata: Mapping[str, Value]
    ) -> list[tuple[int, bool]]:
        """Add images to the gallery, with the same metadata for all.

        Their files are kept in the gallery's folder `added` under names made from their bytes, so that no name of a
        client reaches the disk. All of them are added or, with the reason, none.

        Returns:
            The id of each image, and whether it is new.

        Raises:
            RequestError: Why none was added.
        """
        contents = [content for content, _ in images]
        rows = list[Floats]()
        for low in range(0, len(images), _CHUNK):
            part = [square for _, square in images[low : low + _CHUNK]]
            rows.extend(await self._in(self.threads.engine, partial(self._encoded, part)))
        unique = {image_file(content, 0).digest: (content, row) for content, row in zip(contents, rows, strict=True)}
        ids = await self._in(self.threads.files, lambda: add_images(self.path, self.name, unique, metadata))
        await self.refresh()
        return [ids[image_file(content, 0).digest] for content in contents]

    def _encoded(self, squares: Sequence[npt.NDArray[np.uint8]]) -> list[Floats]:
        """The embeddings of added images, made like the gallery's others."""
        batches = self.encoder.encode_images(squares, flip=self._embedder.gallery.info.flipped)
        return [row for batch in batches for row in batch.embeddings.astype(np.float64)]

    async def remove(self, number: int) -> None:
        """Delete an image from the gallery, and its file if `add` wrote it. Raises RequestError."""
        await self._in(self.threads.files, lambda: remove_image(self.path, self.name, number))
        await self.refresh()

    async def _in(self, executor: Executor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, work)


def _sum(searched: Searchable, query: Sequence[tuple[Content, float]], known: Mapping[str | int, Floats]) -> Floats:
    """The embedding of a query, float64 [D], as `Searcher.embed` computes it."""
    parts = list[tuple[Floats, float]]()
    for content, weight in query:
        if isinstance(content, int):
            try:
                stored = searched.embedding(content)
            except ClipretError as error:
                raise NotFoundError(str(error)) from error
            parts.append((stored / (float(np.linalg.norm(stored)) or 1.0), weight))
        else:
            parts.append((known[content if isinstance(content, str) else id(content)], weight))
    row: Floats = np.zeros_like(parts[0][0])
    for part, weight in parts:
        row += weight * part
    length = float(np.linalg.norm(row))
    if length < 1e-6:
        raise RequestError("the parts of the query cancel out: change them or their weights")
    if len(parts) > 1 or parts[0][1] != 1:
        row /= length
    return row
