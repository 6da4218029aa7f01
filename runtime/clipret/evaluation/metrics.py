"""Retrieval metrics with many-to-many ground truth, computed from the exact ranking."""

import dataclasses
import re
from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError
from clipret.ranking.ranker import Ranker

__all__ = ["Metric", "Metrics", "average_precision", "challenge_precision", "evaluate", "summarise"]


@dataclass(frozen=True)
class Metrics:
    """Retrieval metrics; shares are from 0 to 1.

    Attributes:
        recall_at_1, recall_at_5, recall_at_10: Share of queries with a relevant image among the first k, as image-text
            retrieval papers count it.
        median_rank: Median rank, from 1, of the first relevant image.
        map_at_10: Mean over the queries of  sum(precision at each relevant rank <= 10) / min(10, relevant images),  the
            standard mAP@k.
    """

    queries: int
    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    median_rank: float
    map_at_10: float

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def evaluate(ranker: Ranker, queries: npt.ArrayLike, relevant: Sequence[Sequence[int]]) -> Metrics:
    """Metrics of queries.

    Args:
        ranker: Of the gallery's embeddings.
        queries: Float [Q,D].
        relevant: The positions of each query's relevant embeddings, at least one.

    Raises:
        ClipretError: There are no queries, or one has no relevant embedding.
    """
    grid = np.asarray(queries)
    if not len(grid):
        raise ClipretError("there are no queries to evaluate: check the list and its --where")
    if any(not len(rows) for rows in relevant):
        raise ClipretError("a query has no relevant row in the gallery: leave it out")
    _, found = ranker.rank(grid, 10)
    return summarise(found, ranker.first_ranks(grid, relevant), relevant)


def summarise(found: npt.NDArray[np.int64], first: npt.NDArray[np.int64], relevant: Sequence[Sequence[int]]) -> Metrics:
    """Metrics of ranked queries: `found` [Q,10] are their first ten positions, `first` [Q] the ranks of the first
    relevant ones.
    """
    precisions = [average_precision(list(row), set(rows)) for row, rows in zip(found, relevant, strict=True)]
    return Metrics(
        queries=len(first),
        recall_at_1=float(np.mean(first <= 1)),
        recall_at_5=float(np.mean(first <= 5)),
        recall_at_10=float(np.mean(first <= 10)),
        median_rank=float(np.median(first)),
        map_at_10=float(np.mean(precisions)),
    )


@dataclass(frozen=True)
class Metric:
    """A metric of a ranking, over its first `k` images, or over the whole ranking if `k` is None.

    `mAP`: see `average_precision`. `recall`: the share of queries with a relevant image among the first k. `challenge`:
    see `challenge_precision`.
    """

    kind: Literal["mAP", "recall", "challenge"]
    k: int | None

    @classmethod
    def parse(cls, name: str) -> Self:
        """Parse mAP, mAP@K, recall@K, challenge (of the first ten) or challenge@K.

        Raises:
            ClipretError: For any other text; the message lists the metrics.
        """
        kinds: dict[str, Literal["mAP", "recall", "challenge"]] = {
            "map": "mAP",
            "recall": "recall",
            "challenge": "challenge",
        }
        match = re.fullmatch(r"(map|recall|challenge)(?:@([1-9]\d*))?", name.strip(), re.IGNORECASE)
        if match is None or (match[1].lower() == "recall" and match[2] is None):
            raise ClipretError(f"there is no metric {name!r}: use mAP, mAP@K, recall@K, challenge or challenge@K")
        kind = kinds[match[1].lower()]
        return cls(kind, int(match[2]) if match[2] else 10 if kind == "challenge" else None)

    def __str__(self) -> str:
        return self.kind if self.k is None or (self.kind, self.k) == ("challenge", 10) else f"{self.kind}@{self.k}"

    def of(self, found: Sequence[Hashable], relevant: AbstractSet[Hashable]) -> float:
        """The metric of one query: its results, best first, and its relevant images."""
        if self.kind == "mAP":
            # Of the whole order every relevant image counts, be the list as short as it may.
            return average_precision(found, relevant, self.k or max(len(found), len(relevant)))
        if self.kind == "challenge":
            return challenge_precision(found[: self.k], relevant)
        return float(not relevant.isdisjoint(found[: self.k]))


def average_precision(found: Sequence[Hashable], relevant: AbstractSet[Hashable], k: int | None = None) -> float:
    """AP@k of one ranking: the sum of the precision at each hit among the first k over min(k, relevant images).

    `k` is by default the length of `found`; images after the end of a shorter ranking count as not found.
    """
    k = len(found) if k is None else k
    if not relevant or not found:
        return 0.0
    _, total = _precisions(found[:k], relevant)
    return total / min(k, len(relevant))


def challenge_precision(found: Sequence[Hashable], relevant: AbstractSet[Hashable]) -> float:
    """Average precision as the published scorer of the CVPR 2023 foundation model challenge (track 2) computes it.

    It divides by the number of relevant images found instead of the number of relevant images, so it does not see what
    is missing: with a hundred relevant images, three of them before seven wrong ones score 1.0, and another right image
    on rank 10 lowers the score. Use it to compare with that challenge's figures, not to choose a model.
    """
    hits, total = _precisions(found, relevant)
    return total / hits if hits else 0.0


def _precisions(found: Sequence[Hashable], relevant: AbstractSet[Hashable]) -> tuple[int, float]:
    """The number of hits and the sum of the precision at each of them."""
    hits, total = 0, 0.0
    for rank, one in enumerate(found, 1):
        if one in relevant:
            hits += 1
            total += hits / rank
    return hits, total
