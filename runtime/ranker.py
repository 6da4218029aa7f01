"""Exact ranking of stored rows against queries.

A score here is a number, not an approximation of one. Rows are float16, hence multiples of 2^-24. A query is snapped
to multiples of 2^-24 as well (a change of at most 3e-8 a component), so every product is a multiple of 2^-48, and
a sum of products stays below 2^5 as long as the two norms multiply to less than 32: it fits into the 53 bits of a
float64 without any rounding. Whatever the order of summation, the machine or the library, float64 gives
the same score, equal rows tie exactly, and "the same ids in the same order everywhere" is arithmetic, not luck.

Speed comes from a first pass in float32 with a proven error bound: only rows that could still be among the first k
are scored in float64.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError

__all__ = ["Ranker", "snap"]

Rows = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_GRID = 2.0**24
_BLOCK = 16384  # rows a block: 32 MiB of float32 at 512 dimensions
_QUERIES = 256  # queries at a time: the block's scores take 16 MiB
_PAIRS = 1 << 22  # numbers gathered at a time when candidates are scored again


def snap(queries: npt.ArrayLike) -> Floats:
    """Queries [Q,D] rounded to multiples of 2^-24, in float64: the grid on which scores are exact."""
    return np.rint(np.asarray(queries, dtype=np.float64) * _GRID) / _GRID


class Ranker:
    """Ranks rows, in memory or memory-mapped, by their inner product with a query; for unit rows, by cosine.

    `shards`: float16 [n,D] each. A row's position counts through the shards in their order; equal scores
    are ordered by position. `live`: bool [N], False for rows that are never to be found (deleted ones).
    """

    def __init__(self, shards: Rows | Sequence[Rows], live: npt.NDArray[np.bool_] | None = None) -> None:
        self.shards = [shards] if isinstance(shards, np.ndarray) else list(shards)
        widths = {shard.shape[1] for shard in self.shards}
        if len(widths) > 1 or any(shard.dtype != np.float16 for shard in self.shards):
            raise ClipretError(f"rows must be float16 of one width, these have widths {sorted(widths)}")
        self.count = sum(len(shard) for shard in self.shards)
        if live is not None and len(live) != self.count:
            raise ClipretError(f"{len(live)} live flags for {self.count} rows: give one for each")
        self.live = live

    def rank(self, queries: npt.ArrayLike, k: int) -> tuple[Floats, Ids]:
        """The k best rows of each query, best first, ties by position.

        `queries` [Q,D]. Returns scores float64 [Q,K] and positions int64 [Q,K], K = min(k, live rows).
        Raises ClipretError for k < 1, another width than the rows', or a value that is not finite.
        """
        if k < 1:
            raise ClipretError(f"k is {k}: ask for at least one result")
        grid = self._checked(queries)
        found = self.count if self.live is None else int(self.live.sum())
        k = min(k, found)
        scores, positions = np.empty((len(grid), k)), np.empty((len(grid), k), dtype=np.int64)
        for start in range(0, len(grid) if k else 0, _QUERIES):
            part = slice(start, start + _QUERIES)
            scores[part], positions[part] = self._best(grid[part], k)
        return scores, positions

    def first_ranks(self, queries: npt.ArrayLike, relevant: Sequence[Sequence[int]]) -> Ids:
        """The rank, from 1, at which each query finds the first of its relevant rows; int64 [Q].

        `relevant[q]` are positions, at least one of them live. The whole order counts, not only its head.
        """
        grid = self._checked(queries)
        if len(relevant) != len(grid):
            raise ClipretError(f"{len(relevant)} lists of relevant rows for {len(grid)} queries: give one for each")
        ranks = np.empty(len(grid), dtype=np.int64)
        for start in range(0, len(grid), _QUERIES):
            part = slice(start, start + _QUERIES)
            ranks[part] = self._ranks(grid[part], relevant[part])
        return ranks

    def _best(self, grid: Floats, k: int) -> tuple[Floats, Ids]:
        Q = len(grid)
        # What is known so far, as flat lists sorted by query, then score, then position.
        owner, score, position = np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64)
        kth = np.full(Q, -np.inf)
        for offsets, block, approximate, bound in self._scan(grid):
            threshold = kth.copy()
            if len(block) >= k and not np.isfinite(kth).all():
                # The k-th best of this block is a lower limit of the k-th best of all, up to the error of both.
                own = np.partition(approximate, len(block) - k, axis=1)[:, len(block) - k]
                threshold = np.maximum(threshold, own - bound)
            query, row = np.nonzero(approximate >= (threshold - bound)[:, None])
            if not len(query):
                continue
            owner = np.concatenate([owner, query])
            score = np.concatenate([score, _exact(block, row, grid, query)])
            position = np.concatenate([position, offsets[row]])
            order = np.lexsort((position, -score, owner))
            owner, score, position = owner[order], score[order], position[order]
            start = np.searchsorted(owner, np.arange(Q))
            keep = np.arange(len(owner)) - start[owner] < k
            owner, score, position = owner[keep], score[keep], position[keep]
            full = np.bincount(owner, minlength=Q) == k
            last = np.searchsorted(owner, np.arange(Q), side="right") - 1
            kth[full] = score[last[full]]
        return score.reshape(Q, k), position.reshape(Q, k)

    def _ranks(self, grid: Floats, relevant: Sequence[Sequence[int]]) -> Ids:
        owner = np.repeat(np.arange(len(grid)), [len(rows) for rows in relevant])
        target = np.fromiter((row for rows in relevant for row in rows), dtype=np.int64, count=len(owner))
        if self.live is not None:
            owner, target = owner[self.live[target]], target[self.live[target]]
        if len(np.unique(owner)) != len(grid):
            raise ClipretError("a query has no relevant row in the gallery: leave it out")
        score = _exact(self._gather(target), np.arange(len(target)), grid, owner)
        order = np.lexsort((target, -score, owner))
        first = order[np.searchsorted(owner[order], np.arange(len(grid)))]
        best, at = score[first], target[first]
        before = np.zeros(len(grid), dtype=np.int64)
        for offsets, block, approximate, bound in self._scan(grid):
            before += (approximate > (best + bound)[:, None]).sum(axis=1)
            query, row = np.nonzero(np.abs(approximate - best[:, None]) <= bound[:, None])
            exact = _exact(block, row, grid, query)
            ahead = (exact > best[query]) | ((exact == best[query]) & (offsets[row] < at[query]))
            before += np.bincount(query[ahead], minlength=len(grid))
        return before + 1

    def _scan(self, grid: Floats) -> Iterator[tuple[Ids, npt.NDArray[np.float32], npt.NDArray[np.float32], Floats]]:
        """Blocks of live rows: positions [n], rows float32 [n,D], first-pass scores float32 [Q,n], error bound [Q]."""
        D = grid.shape[1]
        single = grid.astype(np.float32)
        # Each component is a multiple of 2^-24 below 1 and so exact in float32; longer queries may round once more.
        unit = np.finfo(np.float32).eps / 2
        gamma = (D + 2) * unit / (1 - (D + 2) * unit)  # Higham, Accuracy and Stability, section 3.1: any order, any FMA
        norms = np.linalg.norm(grid, axis=1)
        start = 0
        for shard in self.shards:
            for low in range(0, len(shard), _BLOCK):
                rows = np.asarray(shard[low : low + _BLOCK])
                offsets = np.arange(start + low, start + low + len(rows))
                if self.live is not None:
                    live = self.live[offsets]
                    rows, offsets = rows[live], offsets[live]
                if not len(rows):
                    continue
                block = rows.astype(np.float32)
                longest = float(np.sqrt(np.einsum("nd,nd->n", block, block).max())) * (1 + 1e-4)
                if not longest * norms.max(initial=0.0) < 32:  # also true for NaN
                    raise ClipretError(
                        f"rows of length {longest:.3g} and queries of length {norms.max():.3g} are beyond exact "
                        "ranking (their product must be below 32): normalise them"
                    )
                yield offsets, block, single @ block.T, gamma * longest * norms + 1e-12
            start += len(shard)

    def _gather(self, positions: Ids) -> npt.NDArray[np.float32]:
        starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        rows = np.empty((len(positions), self.shards[0].shape[1]), dtype=np.float32)
        which = np.searchsorted(starts, positions, side="right") - 1
        for number in np.unique(which):
            mine = which == number
            rows[mine] = self.shards[number][positions[mine] - starts[number]]
        return rows

    def _checked(self, queries: npt.ArrayLike) -> Floats:
        grid = snap(queries)
        width = self.shards[0].shape[1] if self.shards else None
        if grid.ndim != 2 or (width is not None and grid.shape[1] != width):
            raise ClipretError(f"queries have shape {grid.shape}, the rows need [Q,{width}]")
        if not np.isfinite(grid).all():
            raise ClipretError("a query holds a value that is not finite: its text tower overflowed; export again")
        return grid


def _exact(block: npt.NDArray[np.float32], row: Ids, grid: Floats, query: Ids) -> Floats:
    """Float64 scores of the pairs (row[i], query[i]); exact, see the module's head."""
    scores = np.empty(len(row))
    step = max(1, _PAIRS // grid.shape[1])
    for low in range(0, len(row), step):
        pairs = slice(low, low + step)
        scores[pairs] = np.einsum("pd,pd->p", block[row[pairs]].astype(np.float64), grid[query[pairs]])
    return scores
