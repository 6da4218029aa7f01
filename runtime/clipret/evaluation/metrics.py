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
    """Compute the metrics of queries.

    Args:
        ranker: Of the gallery's embeddings.
        queries: Float [Q,D].
        relevant: The positions of each query's relevant embeddings, at least one.

    Raises:
        ClipretError: There are no queries, or one has no relevant embedding.
    """
    grid = np.asarray(queries)
    if not len(grid):
        raise ClipretError("there are no queries to evaluate: check the annotations file and --where")
    if any(not len(positions) for positions in relevant):
        raise ClipretError("a query has no relevant image in the gallery: leave it out")
    _, ranked = ranker.rank(grid, 10)
    return summarise(ranked, ranker.first_ranks(grid, relevant), relevant)


def summarise(
    ranked: npt.NDArray[np.int64], first_ranks: npt.NDArray[np.int64], relevant: Sequence[Sequence[int]]
) -> Metrics:
    """Compute the metrics of ranked queries.

    Args:
        ranked: The first ten positions of each query, int64 [Q,10].
        first_ranks: The rank, from 1, of the first relevant image of each query, int64 [Q].
        relevant: The positions of each query's relevant embeddings.
    """
    precisions = [
        average_precision(list(results), set(positions)) for results, positions in zip(ranked, relevant, strict=True)
    ]
    return Metrics(
        queries=len(first_ranks),
        recall_at_1=float(np.mean(first_ranks <= 1)),
        recall_at_5=float(np.mean(first_ranks <= 5)),
        recall_at_10=float(np.mean(first_ranks <= 10)),
        median_rank=float(np.median(first_ranks)),
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
            ClipretError: The name is unknown; the message lists the metrics.

        Examples:
            >>> Metric.parse("recall@5")
            Metric(kind='recall', k=5)
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

    def of(self, ranked: Sequence[Hashable], relevant: AbstractSet[Hashable]) -> float:
        """The value for one query, from its results, best first, and its relevant images."""
        if self.kind == "mAP":
            # Without k every relevant image counts, even if the ranking is short.
            return average_precision(ranked, relevant, self.k or max(len(ranked), len(relevant)))
        if self.kind == "challenge":
            return challenge_precision(ranked[: self.k], relevant)
        return float(not relevant.isdisjoint(ranked[: self.k]))


def average_precision(ranked: Sequence[Hashable], relevant: AbstractSet[Hashable], k: int | None = None) -> float:
    """AP@k of one ranking: the sum of the precision at each hit among the first k, over min(k, relevant images).

    Args:
        ranked: The results, best first. Images that a short ranking leaves out count as not found.
        relevant: The relevant images.
        k: Default: the length of `ranked`.

    Examples:
        >>> average_precision(["a", "b", "c", "d"], {"a", "c"})
        0.8333333333333333
    """
    k = len(ranked) if k is None else k
    if not relevant or not ranked:
        return 0.0
    _, total = _precisions(ranked[:k], relevant)
    return total / min(k, len(relevant))


def challenge_precision(ranked: Sequence[Hashable], relevant: AbstractSet[Hashable]) -> float:
    """Average precision as the published scorer of the CVPR 2023 foundation model challenge (track 2) computes it.

    It divides by the number of relevant images that were found, not of all relevant images, so missing images do not
    matter: with a hundred relevant images, three of them before seven wrong ones score 1.0, and another right image on
    rank 10 lowers the score. Use it to compare with figures of that challenge, not to choose a model.
    """
    hits, total = _precisions(ranked, relevant)
    return total / hits if hits else 0.0


def _precisions(ranked: Sequence[Hashable], relevant: AbstractSet[Hashable]) -> tuple[int, float]:
    """The number of hits and the sum of the precision at each of them."""
    hits, total = 0, 0.0
    for rank, image in enumerate(ranked, 1):
        if image in relevant:
            hits += 1
            total += hits / rank
    return hits, total
