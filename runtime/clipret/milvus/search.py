"""Searching a Milvus collection as a gallery is searched: the same queries, prompts, filters and hits.

Milvus finds the candidates by its index; their rows come back with them and are scored here, in the arithmetic of
`clipret.ranking.ranker`: a score is that of the gallery bit for bit, and ties go by age. What an approximate index
does not find is lost all the same; `agreement` measures how much that is.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError
from clipret.gallery.gallery import FORMAT, Gallery, GalleryInfo, Picture, Stored
from clipret.inference.encoder import Encoder
from clipret.milvus.collection import Address
from clipret.milvus.collection import Collection as MilvusCollection
from clipret.milvus.filter import translate
from clipret.ranking.ranker import snap
from clipret.search.searcher import Hit, Searcher
from clipret.sources.item import Value

__all__ = ["Agreement", "MilvusGallery", "MilvusSearcher", "agreement", "open_milvus"]

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_SPARE = 8  # more than k are asked for: Milvus rounds scores to float32, and equal ones come in any order
_MOST = 16384  # what servers give at once
_BYTES = 32 << 20  # of an answer


class MilvusGallery(Gallery):
    """What a gallery knows of its pictures, asked of a collection. Nothing can be written through it."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.collection = MilvusCollection(address)
        facts = self.collection.facts()
        if facts["state"] == "filling":
            raise ClipretError(
                f"{address} is half full, since its export was broken off: run  clipret-search export "
                f"{facts['gallery']} --to milvus {address.uri}#{address.name}  again"
            )
        self.changing = facts["state"] == "changing"
        self.source = Path(facts["gallery"])
        self._columns: list[str] = facts["columns"]
        info = GalleryInfo(FORMAT, facts["fingerprint"], facts["dim"], facts["root"], facts["bundle"], facts["bundle"])
        super().__init__(Path(str(address)), info)

    def close(self) -> None:
        self.collection.close()

    def check(self, bundle: Any) -> None:
        if bundle.fingerprint != self.info.fingerprint:
            raise ClipretError(
                f"{self.address} was made with another bundle (fingerprint {self.info.fingerprint[:12]}…, "
                f"{bundle.path} has {bundle.fingerprint[:12]}…): use that one"
            )

    def __len__(self) -> int:
        return self.collection.count()

    def read(self) -> Stored:
        self._refuse("its rows stay there")

    def select(self, where: str) -> Ids:
        self._refuse(f"{where!r} is asked with each search")

    def _refuse(self, reason: str) -> NoReturn:
        raise ClipretError(f"{self.address} cannot do that ({reason}): use the gallery {self.source}")

    def columns(self) -> list[str]:
        return list(self._columns)

    def expression(self, where: str | None, exclude: Collection[int] = ()) -> str:
        """Of Milvus, for a filter and ids that are not wanted; "" for all."""
        parts = [] if where is None else [translate(where, self._columns)]
        parts += [f"id not in {[int(number) for number in sorted(exclude)]}"] if len(exclude) else []
        return " and ".join(parts)

    def known(self, ids: Sequence[int] | Ids) -> dict[int, tuple[Picture, dict[str, Value]]]:
        """Record and metadata of those of these pictures that are there."""
        found = self.collection.among("id", [int(number) for number in ids], ["*"])
        return {int(one["id"]): (_picture(one), self._metadata(one)) for one in found}

    def _metadata(self, entity: Mapping[str, Any]) -> dict[str, Value]:
        return {name: entity.get(name) for name in self._columns}

    def pictures_of(self, ids: Sequence[int] | Ids) -> list[Picture]:
        return [self._of(known, number)[0] for known in [self.known(ids)] for number in ids]

    def metadata(self, ids: Sequence[int] | Ids) -> list[dict[str, Value]]:
        return [self._of(known, number)[1] for known in [self.known(ids)] for number in ids]

    def _of(self, known: Mapping[int, Any], number: int) -> Any:
        if int(number) not in known:
            raise ClipretError(f"{self.address} holds no picture {number} any more: search again")
        return known[int(number)]

    def id_of(self, picture: str) -> int:
        names = list(dict.fromkeys((picture, self.stored_path(Path(picture)))))
        found = self.collection.among("path", names, ["id"])
        if not found:
            raise ClipretError(
                f"{self.address} holds no picture {picture}: clipret-search query shows how it names them"
            )
        return int(found[0]["id"])

    def ids_by_path(self) -> dict[str, int]:
        return _ByPath(self.collection)

    def row(self, number: int) -> Floats | None:
        """The row of a picture, float64 [D]; None where there is no such one."""
        found = self.collection.among("id", [number], ["embedding"])
        return np.array(found[0]["embedding"], np.float64) if found else None


class _ByPath(dict[str, int]):
    """Ids by path, each asked for when it is wanted: there may be billions."""

    def __init__(self, collection: MilvusCollection) -> None:
        super().__init__()
        self._collection = collection

    def __missing__(self, path: str) -> int:
        found = self._collection.among("path", [path], ["id"])
        if not found:
            raise KeyError(path)
        self[path] = int(found[0]["id"])
        return self[path]

    def __contains__(self, path: object) -> bool:
        try:
            return isinstance(path, str) and self[path] > 0
        except KeyError:
            return False

    def __iter__(self) -> Iterator[str]:
        raise ClipretError(f"{self._collection.address} does not list all of its pictures: use the gallery")


class MilvusSearcher(Searcher):
    """A searcher whose ranking is Milvus's. See `Searcher`."""

    def __init__(
        self,
        gallery: MilvusGallery,
        encoder: Encoder,
        *,
        templates: Sequence[str] | Callable[[str], Sequence[str]] = ("{}",),
    ) -> None:
        super().__init__(gallery, encoder, templates=templates)
        self.there = gallery

    def search_rows(
        self,
        queries: npt.NDArray[np.floating],
        k: int = 10,
        *,
        where: str | None = None,
        exclude: Collection[int] = (),
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        found = self.nearest(queries, k, self.there.expression(where, exclude), min_score)
        return [
            [
                Hit(rank, number, path, self.there.file(path), score)
                for rank, (score, number, path) in enumerate(line, 1)
            ]
            for line in found
        ]

    def nearest(
        self, queries: npt.NDArray[np.floating], k: int, expression: str = "", min_score: float | None = None
    ) -> list[list[tuple[float, int, str]]]:
        """Score, id and path of the k best of each query [Q,D], best first, ties by id."""
        if not 0 < k <= _MOST - _SPARE:
            raise ClipretError(f"k is {k}: Milvus gives 1 to {_MOST - _SPARE} results")
        grid = snap(queries)
        if not np.isfinite(grid).all():
            raise ClipretError("a query holds a value that is not finite: its text tower overflowed; export again")
        step = max(1, _BYTES // ((k + _SPARE) * grid.shape[1] * 4))
        lines = list[list[tuple[float, int, str]]]()
        for low in range(0, len(grid), step):
            part = grid[low : low + step]
            answers = self.there.collection.search(
                list(part.astype(np.float32)), k + _SPARE, expression, ["path", "embedding"]
            )
            for row, hits in zip(part, answers, strict=True):
                exact = np.array([hit["embedding"] for hit in hits], np.float64).reshape(-1, len(row)) @ row
                line = sorted(
                    (-float(score), int(hit["id"]), str(hit["path"])) for score, hit in zip(exact, hits, strict=True)
                )
                best = [(-score, number, path) for score, number, path in line[:k]]
                lines.append([one for one in best if min_score is None or one[0] >= min_score])
        return lines


def _picture(entity: Mapping[str, Any]) -> Picture:
    return Picture(str(entity["path"]), int(entity["size"]), int(entity["mtime_ns"]), str(entity["hash"]))


def open_milvus(text: str) -> MilvusGallery:
    """The collection that milvus+URI names. Raises ClipretError."""
    return MilvusGallery(Address.parse(text))


@dataclass(frozen=True)
class Agreement:
    """What an index finds of the exact ranking: for each k the share of its first k, the mean over `queries`.

    Seconds are those of ranking alone, of all queries together; texts are embedded before.
    """

    queries: int
    recall: dict[int, float]
    seconds: float
    exact_seconds: float


def agreement(
    searcher: MilvusSearcher, exact: Searcher, texts: Sequence[str], ks: Sequence[int] = (1, 10, 100)
) -> Agreement:
    """Compare a collection with the gallery that it was exported from, on these queries.

    A picture with the very score of the k-th counts as found: which of equal ones comes first is no merit. Raises
    ClipretError where the two are of different models.
    """
    if exact.gallery.info.fingerprint != searcher.gallery.info.fingerprint:
        raise ClipretError(
            f"{exact.gallery.path} is of another model than {searcher.there.address}: name the right gallery"
        )
    rows = exact.embed(texts)
    deepest = min(max(ks), len(exact.gallery))
    exact.ranker.rank(rows[:1], 1)  # what is made once is not the queries' time
    searcher.nearest(rows[:1], 1)
    began = time.perf_counter()
    scores, _ = exact.ranker.rank(rows, deepest)
    between = time.perf_counter()
    found = searcher.nearest(rows, deepest)
    ended = time.perf_counter()
    recall = {}
    for k in ks:
        if k <= deepest:
            shares = [
                sum(one[0] >= line[k - 1] for one in hits[:k]) / k for hits, line in zip(found, scores, strict=True)
            ]
            recall[k] = float(np.mean(shares))
    return Agreement(len(texts), recall, ended - between, between - began)
