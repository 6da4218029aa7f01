"""A served gallery: its current snapshot, searches in micro-batches, additions and removals."""

import asyncio
import contextlib
import logging
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
_log = logging.getLogger("clipret.server")

Content = str | int | npt.NDArray[np.uint8]
"""The content of a part of a query: a text, the id of an image of the gallery, or the pixels of an upload."""

_CHUNK = 8  # added images encoded at a time, between searches


@dataclass(frozen=True)
class Threads:
    """The threads of a service. `compute` has one thread, because towers and rankers are not thread-safe."""

    compute: Executor
    images: Executor
    filters: Executor
    files: Executor


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A loaded version of a gallery; `number` counts them from 1."""

    number: int
    searched: Searchable
    count: int

    @property
    def filterable(self) -> list[str]:
        """The columns that filters can use."""
        return [*OWN_COLUMNS, *self.searched.columns]


@dataclass(frozen=True, eq=False)
class RankRequest:
    """A search of one snapshot. Each query is a weighted sum of its parts, as in `Query`.

    `allowed` is the result of the filter `where` and `exclude`, in the form of the `Searchable`.
    """

    snapshot: Snapshot
    queries: tuple[tuple[tuple[Content, float], ...], ...]
    k: int
    where: str | None = None
    allowed: Any = None
    exclude: frozenset[int] = frozenset()
    min_score: float | None = None

    @property
    def group(self) -> tuple[object, ...]:
        """The key of requests that are ranked together. Requests for many images do not slow down those for few."""
        return (self.snapshot.number, self.where, self.exclude, self.min_score, (self.k - 1).bit_length())


@dataclass(frozen=True)
class RankedImage:
    """A result, with the record and metadata of the same snapshot."""

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
    """A gallery that is served.

    Its methods run in the event loop, except for `load` and the work in threads. The snapshot can be replaced at any
    `await`, so a request reads `snapshot` once.

    Attributes:
        name: The name under which it is served.
        path: Its folder, or milvus+URI.
        encoder: Of the bundle of its model.
        limits: Limits of the service.
        threads: Threads of the service.
        settings: The settings of every search.
        on_batch: Called with the number of searches of each batch.
        reloads: The number of snapshots loaded.
        reload_error: Why the last change could not be loaded; None if it was.
    """

    name: str
    path: Path | str
    encoder: Encoder
    limits: Limits
    threads: Threads
    settings: SearchSettings = field(default_factory=SearchSettings)
    on_batch: Callable[[int], None] = lambda _: None
    reloads: int = 0
    reload_error: str | None = None
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
            self.threads.compute,
            max_size=self.limits.batch,
            gather=self.limits.gather,
            max_waiting=self.limits.waiting,
            size=lambda request: sum(map(len, request.queries)),
            on_batch=self.on_batch,
        )

    @property
    def snapshot(self) -> Snapshot:
        """The current snapshot."""
        assert self._snapshot is not None  # `load` comes first
        return self._snapshot

    def load(self) -> None:
        """Read the gallery and open the towers. Call it before the first request. Raises ClipretError."""
        if self.settings.reference:
            self._reference = self._embedder.embed(list(dict.fromkeys(self.settings.reference)))
        self._reload()
        self.encoder.encode_texts(["an image"])
        size = self.encoder.bundle.manifest.image.size
        self.encoder.image_tower.run(np.zeros((1, size, size, 3), np.uint8))

    async def start(self) -> None:
        """Start to process searches and to follow changes of the gallery."""
        self.batcher.start()
        self._following = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Stop what `start` started."""
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        await self.batcher.stop()
        # In the thread of reloads: cancelling does not stop one that is running, and it uses the watch's connection.
        await self._run_in(self.threads.files, self._watch.close)

    async def refresh(self) -> None:
        """Load what was committed before this call. The old snapshot is searched until the new one is loaded."""
        async with self._refreshing:
            try:
                await self._run_in(self.threads.files, self._reload)
                self.reload_error = None
            except Exception as error:  # of any type: the old snapshot stays, and the next attempt may succeed
                if str(error) != self.reload_error:
                    traceback = None if isinstance(error, ClipretError) else error
                    _log.error("gallery %s cannot be reloaded: %s", self.name, error, exc_info=traceback)
                self.reload_error = str(error)

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await self.refresh()
            # Reading a gallery that grows all the time takes at most half of the time.
            await asyncio.sleep(max(self.limits.reload, loop.time() - began))

    def _reload(self) -> None:
        if not self._watch.changed():
            return
        try:
            searched = self._open_searchable()
            self._snapshot = Snapshot(self.reloads + 1, searched, searched.count())
        except BaseException:
            self._watch.close()  # the change is still to be loaded
            raise
        self.reloads += 1

    def _open_searchable(self) -> Searchable:
        rerank = self.settings.rerank
        if isinstance(self.path, Path):
            return ServedSnapshot(self.path, self.encoder, rerank, self._reference, self.limits.where_seconds)
        if rerank.steps:
            raise ClipretError(
                "re-ranking needs all embeddings, which Milvus does not return: serve the gallery itself"
            )
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
        """Search the current snapshot, with the results of `Searcher.search` or of a `Reranker`.

        Args:
            queries: Each a list of contents and their weights.
            k: Number of results per query.
            where: An SQL expression over the columns of the gallery.
            exclude: Ids of images to leave out.
            min_score: The lowest score of a result.

        Raises:
            RequestError: The filter is wrong or slow, an image does not exist, or too many searches are waiting.
        """
        if min_score is not None and self.settings.rerank.steps:
            raise RequestError("min_score is a cosine similarity, but this service re-ranks: leave it out")
        snapshot, allowed = self.snapshot, None
        if where is not None or exclude:
            try:
                allowed = await self._run_in(self.threads.filters, lambda: snapshot.searched.filter(where, exclude))
            except ClipretError as error:
                raise RequestError(str(error).removeprefix("--")) from error
        parts = tuple(tuple(query) for query in queries)
        return await self.batcher.submit(RankRequest(snapshot, parts, k, where, allowed, frozenset(exclude), min_score))

    async def record(self, id: int) -> tuple[Path, ImageRecord]:
        """The folder that an image's path is relative to, and its record. Raises NotFoundError."""
        searched = self.snapshot.searched
        records = await self._run_in(self.threads.filters, lambda: searched.records([id]))
        if id not in records:
            raise NotFoundError(f"there is no image {id}")
        return searched.root, records[id]

    async def pixels(self, content: bytes) -> npt.NDArray[np.uint8]:
        """An uploaded image as input of the tower, uint8 [S,S,3]. Raises RequestError."""
        try:
            return await self._run_in(self.threads.images, lambda: load(content, self.encoder.bundle.manifest.image))
        except ImageError as error:
            raise RequestError(f"the image cannot be used: {error}") from error

    async def in_images(self, work: Callable[[], T]) -> T:
        """Run a function that reads or decodes an image in the threads for images."""
        return await self._run_in(self.threads.images, work)

    async def choices(self) -> dict[str, list[tuple[Value, int]]]:
        """As `ServedSnapshot.choices`; none with Milvus, which does not count values."""
        searched = self.snapshot.searched
        if not isinstance(searched, ServedSnapshot):
            return {}
        return await self._run_in(self.threads.filters, lambda: searched.choices)

    def shown_path(self, image: ImageRecord) -> str:
        """The stored path of an image; for one added by upload, relative to the folder of the gallery."""
        file = Path(image.path)
        inside = isinstance(self.path, Path) and file.is_relative_to(self.path)
        return file.relative_to(self.path).as_posix() if inside else image.path

    def answer(self, requests: list[RankRequest]) -> list[Answer | Exception]:
        """Encode all requests in one batch and rank each group in one batch. Runs in the compute thread."""
        embeddings = self._embed([part for request in requests for query in request.queries for part, _ in query])
        results: list[Answer | Exception] = []
        groups = dict[tuple[object, ...], list[tuple[int, Floats]]]()
        for number, request in enumerate(requests):
            try:
                searched = request.snapshot.searched
                queries = np.array([_weighted_sum(searched, query, embeddings) for query in request.queries])
            except RequestError as error:
                results.append(error)
            else:
                results.append(Answer(request.snapshot, []))
                groups.setdefault(request.group, []).append((number, queries))
        for group in groups.values():
            self._rank(group, requests, results)
        return results

    def _rank(
        self, group: list[tuple[int, Floats]], requests: list[RankRequest], results: list[Answer | Exception]
    ) -> None:
        first = requests[group[0][0]]
        searched = first.snapshot.searched
        all_queries = np.concatenate([queries for _, queries in group])
        k = max(requests[number].k for number, _ in group)
        try:
            scores, ids = searched.rank(all_queries, k, first.allowed, first.min_score)
            distinct = np.unique(ids[ids >= 0]).tolist()
            records, metadata = searched.records(distinct), searched.metadata(distinct)
        except ClipretError as error:
            for number, _ in group:
                results[number] = RequestError(str(error).replace(searched.name, self.name))
            return
        rankings = zip(ids.tolist(), scores.tolist(), strict=True)
        for number, queries in group:
            rankings_of_request = list[list[RankedImage]]()
            for query_ids, query_scores in (next(rankings) for _ in queries):
                # In Milvus an image may be deleted between the ranking and the reading of its record.
                pairs = [(id, score) for id, score in zip(query_ids, query_scores, strict=True) if id in records]
                rankings_of_request.append(
                    [
                        RankedImage(rank, id, score, records[id], metadata.get(id, {}))
                        for rank, (id, score) in enumerate(pairs[: requests[number].k], 1)
                    ]
                )
            results[number] = Answer(first.snapshot, rankings_of_request)

    def _embed(self, parts: Sequence[Content]) -> dict[str | int, Floats]:
        """The embedding of each text, and of the pixels of each upload by their id()."""
        texts = list(dict.fromkeys(part for part in parts if isinstance(part, str)))
        pixels = [part for part in parts if isinstance(part, np.ndarray)]
        embeddings = self._embedder.embed([*texts, *(Query((Part(image),)) for image in pixels)])
        return dict(zip([*texts, *map(id, pixels)], embeddings, strict=True))

    async def read(self, content: bytes) -> tuple[bytes, npt.NDArray[np.uint8]]:
        """An uploaded image to add: its bytes, and as input of the tower, uint8 [S,S,3]. Raises RequestError."""
        return content, await self.pixels(content)

    async def add(
        self, images: Sequence[tuple[bytes, npt.NDArray[np.uint8]]], metadata: Mapping[str, Value]
    ) -> list[tuple[int, bool]]:
        """Add images to the gallery, all of them or none.

        Their files are stored in the folder `added` of the gallery. File names are derived from the bytes, so that no
        name from a client reaches the disk.

        Args:
            images: The bytes of each image, and its pixels from `read`.
            metadata: The metadata of all these images.

        Returns:
            The id of each image, and whether it is new.

        Raises:
            RequestError: Why none was added.
        """
        contents = [content for content, _ in images]
        embeddings = list[Floats]()
        for low in range(0, len(images), _CHUNK):
            chunk = [pixels for _, pixels in images[low : low + _CHUNK]]
            embeddings.extend(await self._run_in(self.threads.compute, partial(self._encode, chunk)))
        pairs = zip(contents, embeddings, strict=True)
        unique = {image_file(content, 0).digest: (content, embedding) for content, embedding in pairs}
        ids = await self._run_in(self.threads.files, lambda: add_images(self.path, self.name, unique, metadata))
        await self.refresh()
        return [ids[image_file(content, 0).digest] for content in contents]

    def _encode(self, pixels: Sequence[npt.NDArray[np.uint8]]) -> list[Floats]:
        """The embeddings of images to add, computed like the others of the gallery."""
        batches = self.encoder.encode_images(pixels, flip=self._embedder.gallery.info.flipped)
        return [embedding for batch in batches for embedding in batch.embeddings.astype(np.float64)]

    async def remove(self, id: int) -> None:
        """Delete an image from the gallery, and its file if `add` wrote it. Raises RequestError."""
        await self._run_in(self.threads.files, lambda: remove_image(self.path, self.name, id))
        await self.refresh()

    async def _run_in(self, executor: Executor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, work)


def _weighted_sum(
    searched: Searchable, query: Sequence[tuple[Content, float]], embeddings: Mapping[str | int, Floats]
) -> Floats:
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
            parts.append((embeddings[content if isinstance(content, str) else id(content)], weight))
    total: Floats = np.zeros_like(parts[0][0])
    for part, weight in parts:
        total += weight * part
    length = float(np.linalg.norm(total))
    if length < 1e-6:
        raise RequestError("the parts of the query cancel out: change them or their weights")
    if len(parts) > 1 or parts[0][1] != 1:
        total /= length
    return total
