"""Search in a Milvus collection with the same queries, prompts, filters and results as in a gallery.

Milvus finds candidates by its index. Their embeddings are returned too and scored here with the arithmetic of
`clipret.ranking.ranker`: scores are bit for bit those of the gallery, and ties are ordered by age. Images that an
approximate index misses are still missing; `agreement` measures how many.
"""

import time
from collections.abc import Collection as Collection_
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from clipret.arrays import Floats, Ids
from clipret.bundle import Bundle, find_bundle
from clipret.errors import ClipretError
from clipret.gallery.database import ImageRecord
from clipret.milvus.collection import Address, Collection
from clipret.milvus.filter import translate
from clipret.ranking.ranker import snap
from clipret.search.searcher import Searcher
from clipret.sources.item import Value

__all__ = ["Agreement", "MilvusCollection", "agreement", "open_milvus"]


_SPARE = 8  # more than k are asked for: Milvus rounds scores to float32, and equal ones come in any order
_MOST = 16384  # what servers give at once
_BYTES = 32 << 20  # of an answer


class MilvusCollection:
    """A collection that an export filled; a read-only `Searchable`.

    Raises:
        ClipretError: There is no such collection, it is not clipret's, or its export was interrupted.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.client = Collection(address)
        facts = self.client.facts()
        if facts["state"] == "filling":
            raise ClipretError(
                f"{address} is half full, since its export was broken off: run  clipret-search export "
                f"{facts['gallery']} --to milvus {address.uri}#{address.name}  again"
            )
        self.changing = facts["state"] == "changing"
        self.source = Path(facts["gallery"])
        self.name = str(address)
        self.fingerprint: str = facts["fingerprint"]
        self.root = Path(facts["root"])
        self.columns: list[str] = facts["columns"]
        self._bundle = Path(facts["bundle"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.client.close()

    def bundle(self, path: str | Path | None = None) -> Bundle:
        """The bundle that made these embeddings: `path`, or where it lay at the export. Raises ClipretError."""
        return find_bundle(path, [self._bundle], self.fingerprint, self.name)

    def count(self) -> int:
        return self.client.count()

    def filter(self, where: str | None, exclude: Collection_[int] = ()) -> str | None:
        """An expression of Milvus."""
        parts = [] if where is None else [translate(where, self.columns)]
        parts += [f"id not in {[int(number) for number in sorted(exclude)]}"] if len(exclude) else []
        return " and ".join(parts) or None

    def rank(
        self, queries: npt.ArrayLike, k: int, allowed: str | None = None, min_score: float | None = None
    ) -> tuple[Floats, Ids]:
        if not 0 < k <= _MOST - _SPARE:
            raise ClipretError(f"k is {k}: Milvus gives 1 to {_MOST - _SPARE} results")
        grid = snap(queries)
        if not np.isfinite(grid).all():
            raise ClipretError("a query holds a value that is not finite: its text tower overflowed; export again")
        scores, ids = np.full((len(grid), k), -np.inf), np.full((len(grid), k), -1, np.int64)
        step = max(1, _BYTES // ((k + _SPARE) * grid.shape[1] * 4))
        for low in range(0, len(grid), step):
            part = grid[low : low + step]
            found = self.client.search(list(part.astype(np.float32)), k + _SPARE, allowed or "", ["embedding"])
            for at, (query, hits) in enumerate(zip(part, found, strict=True), low):
                exact = np.array([hit["embedding"] for hit in hits], np.float64).reshape(-1, len(query)) @ query
                numbers = np.array([hit["id"] for hit in hits], np.int64)
                order = np.lexsort((numbers, -exact))[:k]
                if min_score is not None:
                    order = order[exact[order] >= min_score]
                scores[at, : len(order)], ids[at, : len(order)] = exact[order], numbers[order]
        return scores, ids

    def records(self, ids: Sequence[int]) -> dict[int, ImageRecord]:
        found = self.client.among("id", [int(number) for number in ids], ["path", "size", "mtime_ns", "hash"])
        return {int(one["id"]): _image(one) for one in found}

    def metadata(self, ids: Sequence[int]) -> dict[int, dict[str, Value]]:
        if not self.columns:
            return {number: {} for number in ids}
        found = self.client.among("id", [int(number) for number in ids], ["*"])
        return {int(one["id"]): {name: one.get(name) for name in self.columns} for one in found}

    def embedding(self, number: int) -> Floats:
        found = self.client.among("id", [number], ["embedding"])
        if not found:
            raise ClipretError(f"there is no image {number}")
        return np.array(found[0]["embedding"], np.float64)

    def ids_of(self, paths: Collection_[str]) -> dict[str, int]:
        return {str(one["path"]): int(one["id"]) for one in self.client.among("path", list(paths), ["path"])}


def _image(entity: Mapping[str, Any]) -> ImageRecord:
    return ImageRecord(str(entity["path"]), int(entity["size"]), int(entity["mtime_ns"]), str(entity["hash"]))


def open_milvus(text: str) -> MilvusCollection:
    """The collection that milvus+URI names. Raises ClipretError."""
    return MilvusCollection(Address.parse(text))


@dataclass(frozen=True)
class Agreement:
    """How much of the exact ranking an index finds: for each k the share of its first k, as the mean over `queries`.

    Seconds are the time of ranking all queries, without encoding them.
    """

    queries: int
    recall: dict[int, float]
    seconds: float
    exact_seconds: float


def agreement(
    collection: MilvusCollection, exact: Searcher, texts: Sequence[str], ks: Sequence[int] = (1, 10, 100)
) -> Agreement:
    """Compare a collection with the gallery that it was exported from.

    An image with the same score as the k-th counts as found: the order of ties does not matter.

    Args:
        collection: The collection.
        exact: Searches the gallery.
        texts: The queries.
        ks: Depths to compare at.

    Raises:
        ClipretError: The two are of different models.
    """
    if exact.searched.fingerprint != collection.fingerprint:
        raise ClipretError(f"{exact.searched.name} is of another model than {collection.name}: name the right gallery")
    queries = exact.embed(texts)
    deepest = min(max(ks), exact.searched.count())
    exact.searched.rank(queries[:1], 1)  # what is made once is not the queries' time
    collection.rank(queries[:1], 1)
    began = time.perf_counter()
    scores, _ = exact.searched.rank(queries, deepest)
    between = time.perf_counter()
    found, _ = collection.rank(queries, deepest)
    ended = time.perf_counter()
    recall = {k: float((found[:, :k] >= scores[:, k - 1 : k]).mean()) for k in ks if k <= deepest}
    return Agreement(len(texts), recall, ended - between, between - began)
