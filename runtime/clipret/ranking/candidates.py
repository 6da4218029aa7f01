"""Embeddings that may still be among the best of a query: the result of the first stage of the exact search."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from clipret.arrays import Floats, Ids, Mask
from clipret.ranking.scan import Block

__all__ = ["Pool", "candidates", "kth_value", "place"]


@dataclass(frozen=True)
class Pool:
    """Pairs of a query and an embedding (its position), each with a score between `low` and `high`; all [P]."""

    query: Ids
    position: Ids
    low: Floats
    high: Floats

    @classmethod
    def joined(cls, pools: Sequence[Self]) -> Self:
        if not pools:
            return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))
        columns = zip(*((pool.query, pool.position, pool.low, pool.high) for pool in pools), strict=True)
        return cls(*map(np.concatenate, columns))

    def __len__(self) -> int:
        return len(self.query)

    def taken(self, which: Ids | Mask) -> Self:
        return type(self)(self.query[which], self.position[which], self.low[which], self.high[which])

    def scored(self, which: Ids, scores: Floats) -> Self:
        """With exact scores at some places."""
        low, high = self.low.copy(), self.high.copy()
        low[which] = high[which] = scores
        return replace(self, low=low, high=high)

    def sorted(self) -> Self:
        """By query, then by descending middle of the bounds: the most promising first, but for tiny differences."""
        # One key instead of two: scores are below 32, and there are a few hundred queries. By `low`, an embedding whose
        # score is known would go before one that is most likely better, and the limit would hardly rise.
        return self.taken(np.argsort(self.query * 256.0 - (self.low + self.high)))


def place(query: Ids, count: int) -> Ids:
    """The place, from 0, of each entry among those of its query; `query` is sorted, within 0 to count - 1."""
    starts = np.searchsorted(query, np.arange(count))
    places: Ids = np.arange(len(query)) - starts[query]
    return places


def kth_value(block: Block, mask: Mask | None, k: int) -> Floats | None:
    """The k-th largest value of each query among the block's embeddings in `mask`, or None if there are fewer."""
    values = block.values.T if block.by_row else block.values
    if mask is not None:
        values = values[:, mask]
    n = values.shape[1]
    return None if n < k else np.partition(values, n - k, axis=1)[:, n - k].astype(np.float64)


def candidates(block: Block, threshold: Floats, mask: Mask | None) -> Pool:
    """The pairs of the block whose value is at least the query's threshold [Q], a limit on exact values."""
    if block.values.dtype == np.int32:
        least = np.ceil(threshold).clip(-(2**31), 2**31 - 1).astype(np.int32)
    else:
        least = np.nextafter(threshold.astype(np.float32), np.float32(-np.inf))
    # Flat positions of one contiguous array: np.nonzero over two dimensions is several times slower.
    flat = np.flatnonzero(block.values >= (least if block.by_row else least[:, None]))
    if block.by_row:
        position, query = np.divmod(flat, block.values.shape[1])
    else:
        query, position = np.divmod(flat, block.values.shape[1])
    if mask is not None:
        keep = mask[position]
        flat, position, query = flat[keep], position[keep], query[keep]
    score = block.base[query] + block.unit[query] * block.values.reshape(-1)[flat]
    return Pool(query, position + block.start, score - block.error[query], score + block.error[query])
