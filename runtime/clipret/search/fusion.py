"""One ranking from several: galleries of different models, and result files, over the same images.

Images are matched by stored path. With several galleries, only images that all of them have count.

    sum   the weighted sum of the similarities, for models with similar scales
    z     the same with each query's similarities standardised to mean 0 and deviation 1 over the gallery, or over the
          ranking of a result file, so that no model dominates by its scale alone
    rrf   reciprocal rank fusion (Cormack, Clarke and Buettcher, 2009): the sum of weight / (60 + rank) over the
          sources that have the image among their first `depth`; needs no scores

The first two are exact: rankings are extended until no other image could be among the first k (the threshold algorithm
of Fagin, Lotem and Naor, 2001), which is rarely far. An image that a result file does not list gets the score of the
last one that it lists.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from clipret.arrays import Floats, Ids
from clipret.errors import ClipretError
from clipret.ranking.embedding_shards import EmbeddingShards, widened
from clipret.ranking.ranker import snap
from clipret.search.results import RankedPaths
from clipret.search.searcher import Searcher

__all__ = ["HOW", "FusionSource", "How", "merge"]

How = Literal["sum", "z", "rrf"]
HOW: tuple[How, ...] = ("sum", "z", "rrf")

_RRF = 60  # of the paper: the first rank counts 2 % more than the second
_QUERIES = 64  # queries at a time
_ROWS = 16384  # embeddings whose scores are summed up at a time


@dataclass
class FusionSource:
    """A gallery or a result file to merge; exactly one of `searcher` and `results` is set.

    Attributes:
        name: For messages.
        weight: Its weight.
        answers: The queries that it takes part in; None for all.
    """

    name: str
    searcher: Searcher | None = None
    results: dict[str, RankedPaths] | None = None
    weight: float = 1.0
    answers: frozenset[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.weight < np.inf:
            raise ClipretError(f"the weight of {self.name} is {self.weight}: use a number above 0")

    def asks(self, text: str) -> bool:
        return self.answers is None or text in self.answers


def merge(
    sources: Sequence[FusionSource], texts: Sequence[str], k: int = 10, *, how: How = "z", depth: int = 1000
) -> list[RankedPaths]:
    """Rank images by several sources together.

    Args:
        sources: Galleries and result files.
        texts: The queries.
        k: Results per query.
        how: "sum", "z" or "rrf", see above.
        depth: Images of each source that count, for rrf.

    Returns:
        The k best images of each query by all sources that answer it, best first; ties by age in the first gallery.

    Raises:
        ClipretError: A query has no source, a result file lacks a query or has no scores where they are needed, or the
            galleries have no image in common.
    """
    if k < 1:
        raise ClipretError(f"k is {k}: ask for at least one result")
    groups = defaultdict[tuple[int, ...], list[int]](list)
    for at, text in enumerate(texts):
        chosen = tuple(number for number, source in enumerate(sources) if source.asks(text))
        if not chosen:
            raise ClipretError(f"no source answers the text {text!r}: name one for the texts that no rule fits")
        for number in chosen:
            results = sources[number].results
            if results is not None and text not in results:
                raise ClipretError(f"{sources[number].name} has no results for {text!r}: make it with the same texts")
            if results is not None and how != "rrf" and results[text].scores is None:
                raise ClipretError(f"{sources[number].name} has no scores: merge it with rrf, which needs none")
        groups[chosen].append(at)
    merged: dict[int, RankedPaths] = {}
    for chosen, places in groups.items():
        fusion = _Fusion([sources[number] for number in chosen], how, max(depth, k))
        for low in range(0, len(places), _QUERIES):
            part = places[low : low + _QUERIES]
            merged.update(zip(part, fusion.ranked([texts[at] for at in part], k), strict=True))
    return [merged[at] for at in range(len(texts))]


class _CommonImages:
    """The images that count, numbered: those that every gallery has, or those that some result file lists."""

    def __init__(self, sources: Sequence[FusionSource], texts: Sequence[str] | None) -> None:
        searchers = [source.searcher for source in sources if source.searcher is not None]
        held = [searcher.gallery.ids_by_path() for searcher in searchers]
        if held:
            common = set(held[0]).intersection(*held[1:])
            self.paths = sorted(common, key=lambda path: held[0][path])
        else:
            lists = [source.results[text].paths for source in sources if source.results for text in texts or ()]
            self.paths = list(dict.fromkeys(path for paths in lists for path in paths))
        if not self.paths:
            raise ClipretError(
                f"{' and '.join(source.name for source in sources)} have no image in common: index them from the "
                "same folder, so that the same image has the same path"
            )
        self.number = {path: at for at, path in enumerate(self.paths)}
        self.positions: list[Ids] = []  # of each gallery: the position of each image in it
        self.numbers: list[Ids] = []  # of each gallery: the image at each position, -1 for one that does not count
        for searcher, ids in zip(searchers, held, strict=True):
            stored = searcher.stored.ids
            positions = np.searchsorted(stored, np.array([ids[path] for path in self.paths]))
            numbers = np.full(len(stored), -1, dtype=np.int64)
            numbers[positions] = np.arange(len(self.paths))
            self.positions.append(positions)
            self.numbers.append(numbers)


class _Fusion:
    """The merging of a set of sources, which is the same for all its queries."""

    def __init__(self, sources: Sequence[FusionSource], how: How, depth: int) -> None:
        self.how: How = how
        self.depth = depth
        self.sources = sources
        self.galleries = [(source, source.searcher) for source in sources if source.searcher is not None]
        self.files = [(source, source.results) for source in sources if source.results is not None]

    @cached_property
    def images(self) -> _CommonImages:
        return _CommonImages(self.sources, None)

    @cached_property
    def embeddings(self) -> list[EmbeddingShards]:
        return [EmbeddingShards(searcher.ranker.shards) for _, searcher in self.galleries]

    @cached_property
    def moments(self) -> list[tuple[Floats, Floats]]:
        """Mean [D] and covariance [D,D] of each gallery's embeddings that count: a query's similarities have mean q·m
        and variance q·C·q.
        """
        found = []
        for embeddings, positions in zip(self.embeddings, self.images.positions, strict=True):
            D = embeddings.shards[0].shape[1]
            total, square = np.zeros(D), np.zeros((D, D))
            order = np.sort(positions)
            for low in range(0, len(order), _ROWS):
                part = widened(embeddings.take(order[low : low + _ROWS])).astype(np.float64)
                total += part.sum(axis=0)
                square += part.T @ part
            mean = total / len(order)
            found.append((mean, square / len(order) - np.outer(mean, mean)))
        return found

    def ranked(self, texts: Sequence[str], k: int) -> list[RankedPaths]:
        images = self.images if self.galleries else _CommonImages(self.sources, texts)
        queries = [snap(searcher.embed(texts)) for _, searcher in self.galleries]
        if self.how == "rrf":
            return list(self._fused_ranks(images, texts, queries, k))
        listed = [[_listed(results[text], images, self.how) for text in texts] for _, results in self.files]
        scales = [self._scale(at, embeddings) for at, embeddings in enumerate(queries)]
        found: list[RankedPaths | None] = [None] * len(texts)
        depth, count = max(2 * k, 64), len(images.paths)
        left = list(range(len(texts)))
        while left:
            tops = [self._top(images, at, embeddings[left], depth) for at, embeddings in enumerate(queries)]
            unsure = []
            for line, text in enumerate(left):
                lists = [top[1][line] for top in tops] + [file[text].numbers for file in listed]
                numbers = np.unique(np.concatenate(lists))
                total, bound = np.zeros(len(numbers)), 0.0
                for at, (source, _) in enumerate(self.galleries):
                    mean, deviation = scales[at][0][text], scales[at][1][text]
                    owner = np.full(len(numbers), text)
                    own = self.embeddings[at].scores(images.positions[at][numbers], owner, queries[at])
                    total += source.weight * ((own - mean) / deviation)
                    bound += source.weight * ((tops[at][0][line][-1] - mean) / deviation)
                for (source, _), file in zip(self.files, listed, strict=True):
                    total += source.weight * file[text].scores(numbers)
                    bound += source.weight * file[text].floor
                order = np.lexsort((numbers, -total))[:k]
                # Every operation above is monotone, rounding included: what is not listed has at most `bound`.
                sure = not tops or depth >= count or (len(order) == k and total[order[-1]] > bound)
                if sure:
                    names = tuple(images.paths[number] for number in numbers[order])
                    found[text] = RankedPaths(names, tuple(total[order].tolist()))
                else:
                    unsure.append(text)
            left, depth = unsure, 4 * depth
        return [one for one in found if one is not None]

    def _scale(self, at: int, queries: Floats) -> tuple[Floats, Floats]:
        """What is subtracted from each query's similarities and what they are divided by, [Q] each."""
        if self.how == "sum":
            return np.zeros(len(queries)), np.ones(len(queries))
        mean, covariance = self.moments[at]
        variance = np.maximum(np.einsum("qd,de,qe->q", queries, covariance, queries), 0)
        return queries @ mean, _or_one(np.sqrt(variance))

    def _top(self, images: _CommonImages, at: int, queries: Floats, depth: int) -> tuple[Floats, Ids]:
        """The first images of a gallery among those that count, by their numbers."""
        _, searcher = self.galleries[at]
        scores, positions = searcher.ranker.rank(queries, depth, among=images.numbers[at] >= 0)
        return scores, images.numbers[at][positions]

    def _fused_ranks(
        self, images: _CommonImages, texts: Sequence[str], queries: Sequence[Floats], k: int
    ) -> Iterator[RankedPaths]:
        tops = [self._top(images, at, embeddings, self.depth)[1] for at, embeddings in enumerate(queries)]
        for line, text in enumerate(texts):
            fused = defaultdict[int, float](float)
            lists = [(source, top[line].tolist()) for (source, _), top in zip(self.galleries, tops, strict=True)]
            for source, results in self.files:
                known = [images.number.get(path, -1) for path in results[text].paths[: self.depth]]
                lists.append((source, known))
            for source, numbers in lists:
                for rank, number in enumerate(numbers, 1):
                    if number >= 0:
                        fused[number] += source.weight / (_RRF + rank)
            best = sorted(fused, key=lambda number: (-fused[number], number))[:k]
            yield RankedPaths(tuple(images.paths[number] for number in best), tuple(fused[number] for number in best))


@dataclass(frozen=True)
class _Listed:
    """What a result file says about one query: image numbers, ascending, their scores, and the score of any other."""

    numbers: Ids
    values: Floats
    floor: float

    def scores(self, numbers: Ids) -> Floats:
        scores = np.full(len(numbers), self.floor)
        _, own, there = np.intersect1d(self.numbers, numbers, assume_unique=True, return_indices=True)
        scores[there] = self.values[own]
        return scores


def _listed(found: RankedPaths, images: _CommonImages, how: How) -> _Listed:
    values = np.array(found.scores or (), dtype=np.float64)
    if how == "z" and len(values):
        values = (values - values.mean()) / float(_or_one(np.array([values.std()]))[0])
    numbers = np.array([images.number.get(path, -1) for path in found.paths], dtype=np.int64)
    order = np.argsort(numbers)
    order = order[numbers[order] >= 0]
    return _Listed(numbers[order], values[order], float(values.min()) if len(values) else 0.0)


def _or_one(deviation: Floats) -> Floats:
    """1 where a deviation is 0: all similarities are the same."""
    return np.where(deviation > 1e-12, deviation, 1.0)
