"""Text search over a gallery: encode the texts, rank all stored rows exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipret.encoder import Encoder
from clipret.gallery import Gallery, Stored
from clipret.ranker import Ranker

__all__ = ["Hit", "Searcher"]


@dataclass(frozen=True)
class Hit:
    """One picture found: rank from 1, its id and path in the gallery, the cosine of the stored row and the query."""

    rank: int
    id: int
    path: str
    file: Path
    score: float


class Searcher:
    """Searches the rows that the gallery held when they were first needed.

    Raises ClipretError when the encoder's bundle is not the one that made the gallery.
    """

    def __init__(self, gallery: Gallery, encoder: Encoder) -> None:
        gallery.check(encoder.bundle)
        self.gallery = gallery
        self.encoder = encoder

    @cached_property
    def stored(self) -> Stored:
        return self.gallery.read()

    @cached_property
    def ranker(self) -> Ranker:
        return Ranker(self.stored.shards, self.stored.live)

    def search(self, texts: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """The k best pictures of each text, best first, ties by id. Raises ClipretError for a blank text or k < 1."""
        return self.search_rows(self.encoder.encode_texts(texts), k)

    def search_rows(self, queries: npt.NDArray[np.floating], k: int = 10) -> list[list[Hit]]:
        """The same for queries that are embedded already, [Q,D]."""
        scores, positions = self.ranker.rank(queries, k)
        ids = self.stored.ids[positions]
        unique = np.unique(ids)
        paths = dict(zip(unique.tolist(), self.gallery.paths(unique), strict=True))
        return [
            [
                Hit(rank, int(number), paths[int(number)], self.gallery.file(paths[int(number)]), float(score))
                for rank, (number, score) in enumerate(zip(row_ids, row_scores, strict=True), 1)
            ]
            for row_ids, row_scores in zip(ids, scores, strict=True)
        ]
