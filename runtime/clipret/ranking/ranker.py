"""Exact ranking of stored embeddings against queries.

Scores are exact. Embeddings are float16, hence multiples of 2^-24. Queries are rounded to multiples of 2^-24 too, which
changes a component by at most 3e-8. Every product is then a multiple of 2^-48, and a sum of products stays below 2^5 as
long as the product of the two norms is below 32, so it fits into the 53 bits of a float64 without rounding. The score
does not depend on the order of summation, the machine or the library, and equal embeddings tie exactly.

Speed comes from a first stage (`ranking.scan`) that computes approximate scores with a proven error bound. Only
embeddings that could still be among the first k are scored in float64.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from clipret.arrays import Floats, Ids, Mask, StoredEmbeddings
from clipret.errors import ClipretError
from clipret.hardware.cpu import cpu_count
from clipret.ranking.candidates import Pool, candidates, kth_value, place
from clipret.ranking.embedding_shards import EmbeddingShards, widened
from clipret.ranking.gpu_scan import DeviceScan
from clipret.ranking.quantization import QuantizedEmbeddings
from clipret.ranking.scan import FloatScan, PackedScan, QuantizedScan, Scan, check_lengths, longest, rounding

__all__ = ["Ranker", "snap"]


_GRID = 2.0**24
_QUERIES = 256  # queries at a time
_FEW = 32  # queries up to which packed quantized embeddings are faster than those of the files
_DIRECT = 2048  # embeddings up to which a first stage costs more than it saves
_BLOCK = 4096  # embeddings converted to float64 at a time: 16 MiB at 512 dimensions
_SCORES = 1 << 22  # scores or candidates held at a time, at least those of one query: 32 MiB
# Candidates that may wait for their exact score: 64 MiB; more only when very many embeddings are equal.
_POOL = 1 << 21


def snap(queries: npt.ArrayLike) -> Floats:
    """Queries [Q,D] rounded to multiples of 2^-24, as float64: the grid on which scores are exact."""
    return np.rint(np.asarray(queries, dtype=np.float64) * _GRID) / _GRID


class Ranker:
    """Exact top-k search by inner product, which for embeddings of unit length is the cosine similarity.

    Args:
        shards: Embeddings, float16 [n,D], in memory or memory-mapped; one array or several. An embedding's position
            counts through all shards in order. Equal scores are ordered by position.
        live: Bool [N], False for embeddings that are never returned, such as deleted ones. Default: all are live.
        quantized: The quantized embeddings of each shard. With them and onnxruntime the first stage reads one byte per
            component; without them it computes in float32 with numpy. The results are the same.
        threads: Threads of the first stage. Default: all processors.
        resident: Keep a copy of the quantized embeddings in memory, N x D bytes. Single queries become about three
            times faster; making the copy takes some seconds per million embeddings.
        device: "cuda" or "cuda:N" runs the first stage on that GPU, for large galleries. The results are the same.

    Raises:
        ClipretError: The shards are not float16 of one width, or `live` or `quantized` do not match them.

    Examples:
        >>> import numpy as np
        >>> ranker = Ranker(np.eye(3, dtype=np.float16))
        >>> scores, positions = ranker.rank([[0.0, 1.0, 0.5]], k=2)
        >>> scores.tolist(), positions.tolist()
        ([[1.0, 0.5]], [[1, 2]])
    """

    def __init__(
        self,
        shards: StoredEmbeddings | Sequence[StoredEmbeddings],
        live: Mask | None = None,
        quantized: Sequence[QuantizedEmbeddings] | None = None,
        *,
        threads: int | None = None,
        resident: bool = False,
        device: str = "cpu",
    ) -> None:
        given = [shards] if isinstance(shards, np.ndarray) else shards
        # Plain views: indexing a np.memmap costs several times that of an array.
        self.shards = [np.asarray(shard) for shard in given]
        widths = {shard.shape[1] for shard in self.shards}
        if len(widths) > 1 or any(shard.dtype != np.float16 for shard in self.shards):
            raise ClipretError(f"embeddings must be float16 of one width, these have widths {sorted(widths)}")
        self.count = sum(len(shard) for shard in self.shards)
        if live is not None and len(live) != self.count:
            raise ClipretError(f"{len(live)} live flags for {self.count} embeddings: give one for each")
        if quantized is not None and [one.values.shape for one in quantized] != [shard.shape for shard in self.shards]:
            raise ClipretError(
                "quantized embeddings do not match the shards: give one array of the same shape for each"
            )
        self.live = live
        self._embeddings = EmbeddingShards(self.shards)
        self._floats = FloatScan(self.shards)
        self._many: Scan = self._floats
        if quantized is not None and importlib.util.find_spec("onnxruntime"):
            self._many = QuantizedScan(quantized, threads or cpu_count())
        packed = resident and isinstance(self._many, QuantizedScan) and quantized is not None
        self._few: Scan = (
            PackedScan(quantized, threads or cpu_count()) if packed and quantized is not None else self._many
        )
        self._device = None if device == "cpu" else DeviceScan(self.shards, device, quantized=quantized)
        # Length of the longest embedding if the first stage is coarser than float32, else None.
        self._length = None if quantized is None else max(map(longest, quantized), default=0.0)
        if self._device is not None:
            self._length = self._device.longest

    def rank(
        self, queries: npt.ArrayLike, k: int, *, among: Mask | None = None, min_score: float | None = None
    ) -> tuple[Floats, Ids]:
        """The k best embeddings of each query, best first, ties by position.

        Args:
            queries: Float [Q,D].
            k: Results per query.
            among: Bool [N], the embeddings that may be returned. Default: all live ones.
            min_score: The lowest score that is returned.

        Returns:
            Scores, float64 [Q,K], and positions, int64 [Q,K], with K = min(k, embeddings that may be returned). If
            fewer reach `min_score`, the rest of a row is -inf and -1.

        Raises:
            ClipretError: k < 1, a wrong number of dimensions, or a value that is not finite.
        """
        if k < 1:
            raise ClipretError(f"k is {k}: ask for at least one result")
        if among is not None and len(among) != self.count:
            raise ClipretError(f"{len(among)} flags for {self.count} embeddings: give one for each")
        grid = self._checked(queries)
        allowed = self.live if among is None else among if self.live is None else among & self.live
        found = self.count if allowed is None else int(allowed.sum())
        k = min(k, found)
        scores, positions = np.empty((len(grid), k)), np.empty((len(grid), k), dtype=np.int64)
        least = -np.inf if min_score is None else float(min_score)
        staged = self._best if self._device is None else self._best_by_device
        # A few allowed embeddings are gathered; otherwise the scan passes over all embeddings.
        direct = found <= max(_DIRECT, self.count // 64)
        step = max(1, min(_QUERIES, _SCORES // (found if direct else 4 * k))) if k else 1
        for start in range(0, len(grid) if k else 0, step):
            part = grid[start : start + step]
            best = (self._score_all if direct else staged)(part, k, allowed, least)
            scores[start : start + step], positions[start : start + step] = best
        return scores, positions

    def first_ranks(self, queries: npt.ArrayLike, relevant: Sequence[Sequence[int]]) -> Ids:
        """The rank of each query's first relevant embedding.

        Args:
            queries: Float [Q,D].
            relevant: For each query the positions of the relevant embeddings, at least one of them live.

        Returns:
            Ranks from 1, int64 [Q], in the ranking of all embeddings.

        Raises:
            ClipretError: As `rank`, and for a query without a relevant embedding.
        """
        grid = self._checked(queries)
        if len(relevant) != len(grid):
            raise ClipretError(
                f"{len(relevant)} lists of relevant embeddings for {len(grid)} queries: give one for each"
            )
        ranks = np.empty(len(grid), dtype=np.int64)
        for start in range(0, len(grid), _QUERIES):
            part = slice(start, start + _QUERIES)
            ranks[part] = self._ranks(grid[part], relevant[part])
        return ranks

    def _best(self, grid: Floats, k: int, allowed: Mask | None, least: float) -> tuple[Floats, Ids]:
        Q = len(grid)
        scan = self._few if Q <= _FEW else self._many
        lower = np.full(Q, least)  # no embedding below this counts: the least score, later the k-th best so far
        parts, pairs = list[Pool](), 0
        seen = raised = 0
        for block in scan.blocks(grid):
            seen = block.start + block.count
            mask = None if allowed is None else allowed[block.start : seen]
            if mask is not None and not mask.any():
                continue
            threshold = (lower - block.error - block.base) / block.unit
            if (not raised or np.isneginf(lower).any()) and (own := kth_value(block, mask, k)) is not None:
                # The k-th best of this block is a lower limit of the k-th best of all, up to the error of both.
                threshold = np.maximum(threshold, own - 2 * block.error / block.unit)
            parts.append(candidates(block, threshold, mask))
            pairs += len(parts[-1])
            # The limit rises with the logarithm of the embeddings seen: raising it at each doubling is often enough.
            if seen >= 2 * raised or pairs > _POOL:
                lower, pool = self._narrowed(Pool.joined(parts), lower, grid, k)
                if len(pool) > _POOL:  # very many embeddings are equal, or nearly
                    pool = self._resolved(pool, grid, k)
                parts, pairs, raised = [pool], len(pool), seen
        return self._listed(Pool.joined(parts), lower, grid, k, least)

    def _best_by_device(self, grid: Floats, k: int, allowed: Mask | None, least: float) -> tuple[Floats, Ids]:
        device = self._device
        assert device is not None
        lower = np.full(len(grid), least)
        wide = device.width(k)  # most often no embedding beyond these could be among the k best
        limits = np.empty((len(device.parts), len(grid)))
        pool = Pool.joined([])
        for number in range(len(device.parts)):
            more, limits[number] = device.top(number, grid, wide, allowed)
            pool = Pool.joined([pool, more])
            if len(pool) > _POOL:
                lower, pool = self._narrowed(pool, lower, grid, k)
        lower, pool = self._narrowed(pool, lower, grid, k)
        for number, part in enumerate(device.parts):
            width = wide
            # Where an embedding that the device did not list may still be among the best, it lists more of that part.
            while len(unsure := np.flatnonzero((limits[number] >= lower) & (limits[number] > -np.inf))):
                width = min(8 * width, part.count)
                step = max(1, _SCORES // width)
                for some in (unsure[low : low + step] for low in range(0, len(unsure), step)):
                    known = (
                        (pool.position >= part.start)
                        & (pool.position < part.start + part.count)
                        & np.isin(pool.query, some)
                    )
                    more, limits[number, some] = device.top(number, grid[some], width, allowed)
                    more = replace(more, query=some[more.query])
                    lower, pool = self._narrowed(Pool.joined([pool.taken(~known), more]), lower, grid, k)
        return self._listed(pool, lower, grid, k, least)

    def _listed(self, pool: Pool, lower: Floats, grid: Floats, k: int, least: float) -> tuple[Floats, Ids]:
        """The k best embeddings of the pool for each query, as `rank` returns them."""
        lower, pool = self._narrowed(pool, lower, grid, k)
        _, pool = self._narrowed(self._sharpened(pool, grid), lower, grid, k)
        best = self._resolved(pool, grid, k)
        best = best.taken(best.low >= least)
        scores, positions = np.full((len(grid), k), -np.inf), np.full((len(grid), k), -1, dtype=np.int64)
        at = place(best.query, len(grid))
        scores[best.query, at], positions[best.query, at] = best.low, best.position
        return scores, positions

    def _narrowed(self, pool: Pool, lower: Floats, grid: Floats, k: int) -> tuple[Floats, Pool]:
        """`lower` [Q] raised to what the pool knows of the k-th best scores, and the pool without what lies below.

        The k most promising embeddings of each query get their exact scores, which leaves few of the others.
        """
        pool = pool.sorted()
        at = place(pool.query, len(grid))
        head = at < k
        pool = pool.scored(np.flatnonzero(head), self._exact_scores(pool.taken(head), grid))
        starts = np.flatnonzero(at == 0)
        whole = np.bincount(pool.query, minlength=len(grid))[pool.query[starts]] >= k
        if len(starts):
            least = np.minimum.reduceat(np.where(head, pool.low, np.inf), starts)[whole]
            lower = lower.copy()
            lower[pool.query[starts[whole]]] = np.maximum(lower[pool.query[starts[whole]]], least)
        return lower, pool.taken(pool.high >= lower[pool.query])

    def _resolved(self, pool: Pool, grid: Floats, k: int) -> Pool:
        """The k best of each query with their exact scores, sorted by query, score and position."""
        exact = self._exact_scores(pool, grid)
        order = np.lexsort((pool.position, -exact, pool.query))
        order = order[place(pool.query[order], len(grid)) < k]
        return Pool(pool.query[order], pool.position[order], exact[order], exact[order])

    def _sharpened(self, pool: Pool, grid: Floats) -> Pool:
        """The pool with the bounds of float32 where they are narrower than its own."""
        if self._length is None:
            return pool
        unknown = np.flatnonzero(pool.low < pool.high)
        query = pool.query[unknown]
        score = self._embeddings.estimates(pool.position[unknown], query, grid)
        error = (rounding(grid.shape[1]) * self._length * np.linalg.norm(grid, axis=1) + 1e-12)[query]
        low, high = pool.low.copy(), pool.high.copy()
        low[unknown] = np.maximum(low[unknown], score - error)
        high[unknown] = np.minimum(high[unknown], score + error)
        return replace(pool, low=low, high=high)

    def _exact_scores(self, pool: Pool, grid: Floats) -> Floats:
        """The score of each pair, computed where the pool does not hold it yet."""
        scores = pool.low.copy()
        unknown = np.flatnonzero(pool.low < pool.high)
        scores[unknown] = self._embeddings.scores(pool.position[unknown], pool.query[unknown], grid)
        return scores

    def _score_all(self, grid: Floats, k: int, allowed: Mask | None, least: float) -> tuple[Floats, Ids]:
        """As `_best`, with all allowed embeddings in float64."""
        where = np.arange(self.count) if allowed is None else np.flatnonzero(allowed)
        scores = np.empty((len(grid), len(where)))
        norms = np.linalg.norm(grid, axis=1)
        for low in range(0, len(where), _BLOCK):
            embeddings = widened(self._embeddings.take(where[low : low + _BLOCK])).astype(np.float64)
            check_lengths(float(np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings).max())), norms)
            np.matmul(grid, embeddings.T, out=scores[:, low : low + len(embeddings)])
        kth = np.partition(scores, len(where) - k, axis=1)[:, len(where) - k]
        query, position = np.nonzero(scores >= np.maximum(kth, least)[:, None])
        score = scores[query, position]
        order = np.lexsort((position, -score, query))
        at = place(query[order], len(grid))
        order, at = order[at < k], at[at < k]
        best, positions = np.full((len(grid), k), -np.inf), np.full((len(grid), k), -1, dtype=np.int64)
        best[query[order], at], positions[query[order], at] = score[order], where[position[order]]
        return best, positions

    def _ranks(self, grid: Floats, relevant: Sequence[Sequence[int]]) -> Ids:
        owner = np.repeat(np.arange(len(grid)), [len(embeddings) for embeddings in relevant])
        target = np.fromiter(
            (position for embeddings in relevant for position in embeddings), dtype=np.int64, count=len(owner)
        )
        if self.live is not None:
            owner, target = owner[self.live[target]], target[self.live[target]]
        if len(np.unique(owner)) != len(grid):
            raise ClipretError("a query has no relevant embedding in the gallery: leave it out")
        score = self._embeddings.scores(target, owner, grid)
        order = np.lexsort((target, -score, owner))
        first = order[np.searchsorted(owner[order], np.arange(len(grid)))]
        best, at = score[first], target[first]
        before = np.zeros(len(grid), dtype=np.int64)
        for block in self._floats.blocks(
            grid
        ):  # the narrow bounds: a wide one would leave half the embeddings undecided
            mask = None if self.live is None else self.live[block.start : block.start + block.count]
            pool = candidates(block, best - block.error, mask)
            sure = pool.low > best[pool.query]
            before += np.bincount(pool.query[sure], minlength=len(grid))
            query, position = pool.query[~sure], pool.position[~sure]
            exact = self._embeddings.scores(position, query, grid)
            ahead = (exact > best[query]) | ((exact == best[query]) & (position < at[query]))
            before += np.bincount(query[ahead], minlength=len(grid))
        return before + 1

    def _checked(self, queries: npt.ArrayLike) -> Floats:
        grid = snap(queries)
        width = self.shards[0].shape[1] if self.shards else None
        if grid.ndim != 2 or (width is not None and grid.shape[1] != width):
            raise ClipretError(f"queries have shape {grid.shape}, the embeddings need [Q,{width}]")
        if not np.isfinite(grid).all():
            raise ClipretError("a query holds a value that is not finite: its text tower overflowed; export again")
        return grid
