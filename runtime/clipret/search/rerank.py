"""Re-ranking of an exact ranking. All steps are optional and off by default.

Three steps, in this order:

    adapt         moves each query towards the common component of its own first images
    hubness       lowers the scores of images that are close to every query ("hubs")
    k_reciprocal  reorders the first images by the neighbours that they share

Each step documents which other images and queries it looks at. A step that looks at the gallery depends on the other
images in it. A step that is *transductive over the queries* depends on the other queries: the rules of a competition
may forbid that, and a service that gets its queries one at a time cannot do it. With fixed reference queries, such as
the captions of the training data, hubness is not transductive.

Uses numpy only, and at most `_SCORES` scores of memory, whatever the number of embeddings and queries.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clipret.arrays import Floats, Ids, Mask
from clipret.errors import ClipretError
from clipret.gallery.info import Stored
from clipret.ranking.candidates import place
from clipret.ranking.embedding_shards import EmbeddingShards, widened
from clipret.ranking.ranker import Ranker, snap

__all__ = ["HUBNESS", "Hubness", "Rerank", "Reranker", "adapted", "k_reciprocal_order"]

Hubness = Literal["none", "nnn", "dual-softmax"]
HUBNESS: tuple[Hubness, ...] = ("none", "nnn", "dual-softmax")

_SCORES = 1 << 22  # scores held at a time: 32 MiB
_ROWS = 8192  # embeddings widened at a time: 32 MiB at 512 dimensions


@dataclass(frozen=True)
class Rerank:
    """The settings of re-ranking. The defaults do nothing: an exact ranking by cosine similarity.

    Attributes:
        adapt: Number of first images that adapt each query; 50 is usual, 0 turns the step off. Looks at the gallery,
            not at other queries.
        adapt_weight: See `adapted`.
        hubness: "nnn" is nearest neighbor normalization (Chowdhury et al., Nearest Neighbor Normalization Improves
            Multimodal Retrieval, 2024): an image's score is reduced by `strength` times the mean of its `neighbours`
            best scores over the reference queries. "dual-softmax" (Cheng et al., Improving Video-Text Retrieval by
            Multi-Stream Corpus Alignment and Dual Softmax Loss, 2021): a score is multiplied by the softmax, over the
            reference queries, of the image's scores times `temperature`; negative scores are kept. Both are
            transductive over the queries if the reference queries are the queries themselves.
        k_reciprocal: Number of first images to reorder (see `k_reciprocal_order`); 100 is usual, 0 turns the step off.
            Looks at the gallery, not at other queries.
        k1, k2, share: Parameters of `k_reciprocal_order`, by default those of Zhong et al.

    Raises:
        ClipretError: A value is out of range.
    """

    adapt: int = 0
    adapt_weight: float = 0.5
    hubness: Hubness = "none"
    neighbours: int = 16
    strength: float = 0.75
    temperature: float = 100.0
    k_reciprocal: int = 0
    k1: int = 20
    k2: int = 6
    share: float = 0.3

    def __post_init__(self) -> None:
        ranges = {"adapt": 0, "neighbours": 1, "strength": 0, "temperature": 0, "k_reciprocal": 0, "k1": 1, "k2": 1}
        for name, least in ranges.items():
            if not least <= getattr(self, name) < math.inf:
                raise ClipretError(f"{name} is {getattr(self, name)}: use a number of at least {least}")
        for name in ("adapt_weight", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ClipretError(f"{name} is {getattr(self, name)}: use a number from 0 to 1")
        if self.hubness not in HUBNESS:
            raise ClipretError(f"hubness {self.hubness!r} is unknown: use {', '.join(HUBNESS)}")

    @property
    def steps(self) -> list[str]:
        """The active steps by the names of reports; empty for a plain ranking."""
        names = [f"adapt {self.adapt}"] if self.adapt else []
        names += [self.hubness] if self.hubness != "none" else []
        return names + ([f"k-reciprocal {self.k_reciprocal}"] if self.k_reciprocal else [])


class Reranker:
    """Ranks like `Ranker`, with the steps of `how`.

    Args:
        stored: The gallery's embeddings.
        ranker: Of the same embeddings.
        how: The steps.
        reference: Float [R,D], queries to measure hubness with. Default: the queries of each call, all together.
    """

    def __init__(self, stored: Stored, ranker: Ranker, how: Rerank, reference: npt.ArrayLike | None = None) -> None:
        self.how = how
        self._ranker = ranker
        self._embeddings = EmbeddingShards(ranker.shards)
        self._live = stored.live
        self._hub = None if reference is None or how.hubness == "none" else self._measured(snap(reference))

    def rank(self, queries: npt.ArrayLike, k: int, *, among: Mask | None = None) -> tuple[Floats, Ids]:
        """The k best embeddings of each query, best first, ties by position.

        Args:
            queries: Float [Q,D].
            k: Results per query.
            among: Bool [N], the embeddings that may be returned. Default: all live ones.

        Returns:
            Scores, float64 [Q,K], and positions, int64 [Q,K]. A score is that of the last step: a cosine, a cosine
            minus the image's hubness, or 1 minus the distance of `k_reciprocal_order`.

        Raises:
            ClipretError: As `Ranker.rank`.
        """
        how = self.how
        embeddings = snap(queries)
        if how.adapt and len(embeddings):
            scores, positions = self._ranker.rank(embeddings, how.adapt, among=among)
            embeddings = snap([self._adapt(*line) for line in zip(embeddings, scores, positions, strict=True)])
        depth = max(k, how.k_reciprocal)
        if how.hubness == "none":
            scores, positions = self._ranker.rank(embeddings, depth, among=among)
        else:
            self._ranker.rank(embeddings[:1], 1)  # refuses what is no query, in the ranker's words
            scores, positions = self._scan(embeddings, depth, self._adjustment(embeddings), among)
        if how.k_reciprocal:
            for query in range(len(embeddings)):
                found = positions[query] >= 0
                head = np.flatnonzero(found)[: how.k_reciprocal]
                if len(head):
                    order, better = self._reorder(scores[query, head], positions[query, head])
                    positions[query, head], scores[query, head] = positions[query, head][order], better
        return scores[:, :k], positions[:, :k]

    def _take(self, positions: Ids) -> Floats:
        """The embeddings float64 [P,D] at positions in any order."""
        order = np.argsort(positions)
        embeddings = np.empty((len(positions), self._embeddings.shards[0].shape[1]))
        embeddings[order] = self._embeddings.take(positions[order])
        return embeddings

    def _adapt(self, query: Floats, scores: Floats, positions: Ids) -> Floats:
        found = positions >= 0
        if not found.any():
            return query
        return adapted(query, self._take(positions[found]), scores[found], self.how.adapt_weight)

    def _reorder(self, scores: Floats, positions: Ids) -> tuple[Ids, Floats]:
        how = self.how
        distance = k_reciprocal_order(scores, self._take(positions), k1=how.k1, k2=how.k2, share=how.share)
        order = np.lexsort((positions, distance))
        return order, 1 - distance[order]

    def _blocks(self, queries: int) -> Iterator[tuple[int, Floats]]:
        """The first position and the embeddings, float64 [n,D], of each block, small enough for so many queries."""
        step = max(1, min(_ROWS, _SCORES // max(queries, 1)))
        for start in range(0, self._ranker.count, step):
            positions = np.arange(start, min(start + step, self._ranker.count))
            yield start, widened(self._embeddings.take(positions)).astype(np.float64)

    def _measured(self, reference: Floats) -> Floats:
        """What hubness takes from each embedding's scores, float64 [N]; see `_adjustment`."""
        if not len(reference):
            raise ClipretError("there are no queries to measure hubness with: name some")
        hub = np.empty(self._ranker.count)
        nearest = min(self.how.neighbours, len(reference))
        for start, embeddings in self._blocks(len(reference)):
            scores = reference @ embeddings.T  # [R,n], exact
            if self.how.hubness == "nnn":
                best = np.partition(scores, len(reference) - nearest, axis=0)[len(reference) - nearest :]
                values = self.how.strength * best.mean(axis=0)
            else:
                heat = self.how.temperature * scores
                top = heat.max(axis=0)
                values = top + np.log(np.exp(heat - top).sum(axis=0))
            hub[start : start + len(embeddings)] = values
        # Of nnn: on the grid of the scores a difference has no rounding either, so that equal embeddings still tie.
        return snap(hub) if self.how.hubness == "nnn" else hub

    def _adjustment(self, queries: Floats) -> Callable[[Floats, int], Floats]:
        """What turns exact scores [Q,n] of the embeddings from a position on into those that count."""
        hub = self._measured(queries) if self._hub is None else self._hub
        if self.how.hubness == "nnn":
            return lambda scores, start: scores - hub[start : start + scores.shape[1]]

        def multiplied(scores: Floats, start: int) -> Floats:
            share = np.exp(self.how.temperature * scores - hub[start : start + scores.shape[1]])
            return np.where(scores > 0, scores * share, scores)

        return multiplied

    def _scan(
        self, queries: Floats, k: int, adjust: Callable[[Floats, int], Floats], among: Mask | None
    ) -> tuple[Floats, Ids]:
        """As `Ranker.rank`, by adjusted scores: every embedding against every query, block by block."""
        allowed = self._live if among is None else among if self._live is None else among & self._live
        found = self._ranker.count if allowed is None else int(allowed.sum())
        k = min(k, found)
        best, at = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1, dtype=np.int64)
        if not k:
            return best, at
        for start, embeddings in self._blocks(len(queries) + k):
            scores = adjust(queries @ embeddings.T, start)  # [Q,n]
            if allowed is not None:
                scores[:, ~allowed[start : start + len(embeddings)]] = -np.inf
            worth = scores > best[:, -1:]  # an equal one further back does not come before
            if len(embeddings) > k:  # nor do those that k of this very block surpass
                worth &= scores >= np.partition(scores, len(embeddings) - k, axis=1)[:, len(embeddings) - k, None]
            query, position = np.nonzero(worth)
            old, rank = np.nonzero(at >= 0)
            owner = np.concatenate([old, query])
            score = np.concatenate([best[old, rank], scores[query, position]])
            where = np.concatenate([at[old, rank], position + start])
            order = np.lexsort((where, -score, owner))
            seat = place(owner[order], len(queries))
            order, seat = order[seat < k], seat[seat < k]
            best[owner[order], seat], at[owner[order], seat] = score[order], where[order]
        return best, at


def adapted(query: Floats, embeddings: Floats, scores: Floats, weight: float) -> Floats:
    """A query [D] moved towards its first images [n,D]: a unit embedding [D].

    It becomes (1 - weight) times itself plus weight times the first principal component, through the origin, of the
    images weighted by their scores [n]: pseudo relevance feedback, as a winning solution of the traffic retrieval
    challenge used it with the 50 first images. Helps where most of those are right and harms where they are not.
    """
    weights = np.maximum(scores, 0)
    if not weights.any():
        return query
    weighted = weights[:, None] * embeddings
    _, vectors = np.linalg.eigh(weighted @ weighted.T)  # [n,n] rather than [D,D]
    component = weighted.T @ vectors[:, -1]
    component *= np.sign(component @ weighted.sum(axis=0)) / np.linalg.norm(component)
    mixed: Floats = (1 - weight) * query + weight * component
    return mixed / np.linalg.norm(mixed)


def k_reciprocal_order(scores: Floats, embeddings: Floats, *, k1: int = 20, k2: int = 6, share: float = 0.3) -> Floats:
    """The distance of a query to each of its first n images by their shared neighbours.

    After Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, 2017, computed within the n
    images. An image is encoded by its k-reciprocal neighbours: the images among its k1 nearest that have it among
    theirs, expanded by neighbours on which their own k1/2 nearest agree, and averaged over its k2 nearest. The distance
    is (1 - share) times the Jaccard distance of the encodings plus share times the original distance. In the paper a
    query is an image. A text is never among an image's neighbours, because other images are always closer; so a text's
    neighbours are its k1 first images, k-reciprocal or not, and its original distance is its score, scaled from the
    best (0) to the worst (1) of the n.

    Args:
        scores: Descending scores [n] of the query and each image.
        embeddings: The images' embeddings of unit length [n,D].
        k1, k2, share: See above.

    Returns:
        Distances from 0 to 1, float64 [n].
    """
    n = len(scores)
    near = embeddings @ embeddings.T
    rank = np.empty((n, n), dtype=np.int64)
    order = np.argsort(-near, axis=1, kind="stable")
    np.put_along_axis(rank, order, np.arange(n)[None], axis=1)

    def mutual(k: int) -> Mask:
        among: Mask = rank <= k  # itself and k more
        return among & among.T

    def widened_by(own: Mask, half: npt.NDArray[Any]) -> Mask:
        shared = own.astype(np.float64) @ half.T  # [m,n]: how many of each one's half are in it already
        joins = own & (shared >= 2 / 3 * half.sum(axis=1))
        wider: Mask = own | (joins.astype(np.float64) @ half > 0)
        return wider

    half = mutual(max(k1 // 2, 1)).astype(np.float64)
    asked = np.arange(n)[None] < k1
    neighbours = np.concatenate([widened_by(asked, half), widened_by(mutual(k1), half)])  # [1+n,n], the query's first
    similarity = np.concatenate([scores[None], near])
    description = np.where(neighbours, np.exp(2 * similarity - 2), 0)  # exp(-d) of the squared distance
    description /= description.sum(axis=1, keepdims=True)
    nearest = rank < k2
    first = np.concatenate([[1.0], np.arange(n) < k2])
    blurred = np.concatenate(
        [(first @ description)[None] / first.sum(), nearest @ description[1:] / nearest.sum(axis=1, keepdims=True)]
    )
    common = np.minimum(blurred[0], blurred[1:]).sum(axis=1)
    jaccard = 1 - common / (2 - common)
    spread = scores.max() - scores.min()
    original = (scores.max() - scores) / spread if spread else np.zeros(n)
    distance: Floats = (1 - share) * jaccard + share * original
    return distance
