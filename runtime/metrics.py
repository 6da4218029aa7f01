"""Retrieval quality with many-to-many ground truth, computed by the same exact ranking that answers queries."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError
from clipret.ranker import Ranker

__all__ = ["Metrics", "average_precision", "evaluate"]


@dataclass(frozen=True)
class Metrics:
    """Shares lie between 0 and 1.

    recall_at_k: the share of queries with a relevant picture among the first k, as image-text retrieval papers
    count it. median_rank: of the first relevant picture, from 1. map_at_10: mean over the queries of
    sum(precision at each relevant rank <= 10) / min(10, relevant pictures), the standard mAP@k.
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
    """Metrics of `queries` [Q,D]; `relevant[q]` holds the positions of the rows that answer query q (at least one).

    Raises ClipretError when there are no queries or one has no relevant row.
    """
    grid = np.asarray(queries)
    if not len(grid):
        raise ClipretError("there are no queries to evaluate: check the list and its --where")
    if any(not len(rows) for rows in relevant):
        raise ClipretError("a query has no relevant row in the gallery: leave it out")
    _, found = ranker.rank(grid, 10)
    first = ranker.first_ranks(grid, relevant)
    precisions = [average_precision(list(row), set(rows)) for row, rows in zip(found, relevant, strict=True)]
    return Metrics(
        queries=len(grid),
        recall_at_1=float(np.mean(first <= 1)),
        recall_at_5=float(np.mean(first <= 5)),
        recall_at_10=float(np.mean(first <= 10)),
        median_rank=float(np.median(first)),
        map_at_10=float(np.mean(precisions)),
    )


def average_precision(found: Sequence[int], relevant: set[int]) -> float:
    """AP@k of one ranking of k positions: the sum of the precision at each hit over min(k, relevant)."""
    if not relevant or not found:
        return 0.0
    hits, total = 0, 0.0
    for rank, position in enumerate(found, 1):
        if position in relevant:
            hits += 1
            total += hits / rank
    return total / min(len(found), len(relevant))
