"""A Milvus collection in a service: what a state of a gallery answers, asked of the collection.

The collection has no states: each answer is of what it holds at that moment. It is changed by exports alone.
"""

import time
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError
from clipret.gallery.database import Picture
from clipret.gallery.gallery import Gallery
from clipret.inference.encoder import Encoder
from clipret.milvus.search import MilvusGallery, MilvusSearcher, open_milvus
from clipret.search.rerank import Rerank
from clipret.server.limits import NotFoundError, RequestError
from clipret.server.snapshot import State, Watch
from clipret.sources.item import Value

__all__ = ["open_served", "state_of", "watch_of"]

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_SECONDS = 15.0  # between two looks at how many pictures there are


def open_served(place: Path | str) -> Gallery:
    """A gallery, or the collection that milvus+URI names. Raises ClipretError."""
    return open_milvus(place) if isinstance(place, str) else Gallery.open(place)


def watch_of(place: Path | str) -> Watch:
    return _Watch(place) if isinstance(place, str) else Watch(place)


def state_of(
    place: Path | str, number: int, encoder: Encoder, rerank: Rerank | None = None, reference: Floats | None = None
) -> State:
    """See `State`. Raises ClipretError."""
    if isinstance(place, Path):
        return State(place, number, encoder, rerank, reference)
    if rerank is not None and rerank.steps:
        raise ClipretError("re-ranking looks at every picture, which Milvus does not give: serve the gallery")
    return _State(open_milvus(place), number, encoder)


class _Same:
    """In the place of the ids by position: positions are ids here."""

    def __getitem__(self, at: Ids) -> Ids:
        return at


class _State(State):
    def __init__(self, gallery: MilvusGallery, number: int, encoder: Encoder) -> None:
        self.number = number
        self.gallery: Any = gallery
        self._searcher = MilvusSearcher(gallery, encoder)
        self.ids: Any = _Same()
        self.count = len(gallery)
        self.columns = gallery.columns()

    def rank(self, rows: Floats, k: int, mask: Any, min_score: float | None) -> tuple[Floats, Ids]:
        try:
            found = self._searcher.nearest(rows, k, mask or "", min_score)
        except ClipretError as error:
            raise RequestError(str(error).replace(str(self.gallery.address), "the collection")) from None
        scores, ids = np.full((len(rows), k), -np.inf), np.full((len(rows), k), -1, np.int64)
        for at, line in enumerate(found):
            scores[at, : len(line)] = [score for score, _, _ in line]
            ids[at, : len(line)] = [number for _, number, _ in line]
        return scores, ids

    def mask(self, where: str, seconds: float) -> Any:  # noqa: ARG002 (Milvus has a limit of its own)
        """The expression that a filter is there."""
        try:
            return self.gallery.expression(where)
        except ClipretError as error:
            raise RequestError(str(error).removeprefix("--")) from None

    def without(self, mask: Any, exclude: Collection[int]) -> Any:
        return " and ".join(filter(None, (mask, self.gallery.expression(None, exclude))))

    def known(self, ids: Sequence[int]) -> dict[int, tuple[Picture, dict[str, Value]]]:
        found: dict[int, tuple[Picture, dict[str, Value]]] = self.gallery.known(ids)
        gone = (Picture("", 0, 0, ""), dict.fromkeys(self.columns))  # between the ranking and this
        return {number: found.get(number, gone) for number in ids}

    def picture(self, number: int) -> Picture:
        found = self.gallery.known([number])
        if number not in found:
            raise NotFoundError(f"there is no picture {number}")
        picture: Picture = found[number][0]
        return picture

    def row(self, number: int) -> Floats:
        row: Floats | None = self.gallery.row(number)
        if row is None:
            raise NotFoundError(f"there is no picture {number}")
        length = float(np.linalg.norm(row))
        return row / length if length else row

    @cached_property
    def choices(self) -> dict[str, list[tuple[Value, int]]]:
        return {}  # Milvus does not count values


class _Watch(Watch):
    def __init__(self, place: str) -> None:
        self._place = place
        self._there: MilvusGallery | None = None
        self._looked = 0.0
        self._last: tuple[object, ...] = ()

    def changed(self) -> bool:
        if self._there is not None and time.monotonic() < self._looked + _SECONDS:
            return False
        self._looked = time.monotonic()
        if self._there is None:
            self._there = open_milvus(self._place)
        facts = self._there.collection.facts()
        now = (len(self._there), tuple(facts["columns"]), facts["state"])
        changed, self._last = now != self._last, now
        return changed

    def close(self) -> None:
        if self._there is not None:
            self._there.close()
        self._there, self._last = None, ()
