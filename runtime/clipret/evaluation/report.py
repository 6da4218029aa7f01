"""The page of an evaluation: charts of its metrics, the worst queries, and a sample of the others."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipret.arrays import Ids
from clipret.evaluation.charts import Chart, Matrix, Table, curve, histogram
from clipret.evaluation.evaluate import Evaluation, as_text, names
from clipret.evaluation.metrics import average_precision
from clipret.ranking.embedding_shards import EmbeddingShards
from clipret.ranking.ranker import snap
from clipret.reports.page import Card, Section, write_page
from clipret.search.searcher import Searcher

__all__ = ["Attribute", "Scores", "attributes", "recall_curve", "scores_of", "worst", "write_report"]

Values = list[dict[str, str]]

_POINTS = 160  # of the recall curve, evenly on its logarithmic axis
_MARKS = (1, 5, 10, 20, 50, *(10**power for power in range(2, 10)))  # those k that the table has
_PAIRS = 200_000  # scores drawn for each of the two distributions
_BINS = 40
_VALUES = 12  # of an attribute in its matrix; the others are one
_MOST_VALUES = 30  # a column of more is no attribute but a name or a time
_ATTRIBUTES = 4  # columns of a gallery that are looked at where nobody named any
_MISSED = 5  # images of a query that should have been found
OTHERS, NOTHING = "(others)", "(none)"


@dataclass(frozen=True)
class Scores:
    """The distribution of the scores of right and wrong images: counts in the bins between `edges`.

    `above`: how often a right image scores higher than a wrong one of any query; equal scores count half. `drawn`:
    whether the pairs of query and image are a sample.
    """

    edges: list[float]
    right: list[int]
    wrong: list[int]
    above: float
    drawn: bool


@dataclass(frozen=True)
class Attribute:
    """What queries wanted of a column, and what their first image has there.

    `counts[w][f]`: queries that wanted `wanted[w]` and found `found[f]`; `among[w]`: the share of their first ten
    images that have what they wanted. `several`: values hold several names; then a query counts once for each name
    that it wanted, `found` is "yes" and "no", and an image has a name among others.
    """

    column: str
    wanted: list[str]
    found: list[str]
    counts: list[list[int]]
    among: list[float]
    several: bool = False


def recall_curve(first: Ids, count: int) -> list[tuple[int, float]]:
    """(k, recall@k) for k from 1 to `count`, or some of them if there are many; `first` [Q] are the ranks of the first
    right images.
    """
    every = np.unique(np.rint(np.geomspace(1, max(count, 1), _POINTS)).astype(np.int64))
    every = np.union1d(every, [k for k in _MARKS if k <= count])
    ordered = np.sort(first)
    return [(int(k), float(np.searchsorted(ordered, k, "right") / len(first))) for k in every]


def worst(result: Evaluation) -> list[int]:
    """The numbers of the queries, the worst first: by AP@10, then by the rank of the first right image."""
    precision = [
        average_precision(line, set(right)) for line, right in zip(result.found.tolist(), result.relevant, strict=True)
    ]
    return sorted(range(len(precision)), key=lambda at: (precision[at], -int(result.first[at]), at))


def scores_of(searcher: Searcher, result: Evaluation, *, most: int = _PAIRS, seed: int = 0) -> Scores:
    """The scores of pairs of query and image, right and wrong: all of each kind, or an even sample of `most`."""
    rng = np.random.default_rng(seed)
    ids, live = searcher.stored.ids, searcher.stored.live
    count = len(ids)
    query = np.repeat(np.arange(len(result.relevant)), [len(right) for right in result.relevant])
    row = np.array([at for right in result.relevant for at in right], dtype=np.int64)
    keys = query * count + row
    every = len(result.relevant) * count
    if every <= 4 * most:
        other = np.setdiff1d(np.arange(every), keys)
    else:
        other = np.setdiff1d(rng.integers(0, every, 2 * most), keys)
    if live is not None:
        other = other[live[other % count]]
    drawn = every > 4 * most or len(other) > most or len(keys) > most
    right, wrong = (_values(searcher, result, _drawn(some, most, rng), count) for some in (keys, other))
    both = np.concatenate([right, wrong])
    edges = np.linspace(both.min(), both.max() + 1e-9, _BINS + 1)
    of_right, of_wrong = (np.histogram(some, edges)[0].tolist() for some in (right, wrong))
    ordered = np.sort(wrong)
    below = np.searchsorted(ordered, right, "left") + np.searchsorted(ordered, right, "right")
    above = float(below.mean() / 2 / len(wrong)) if len(wrong) else 1.0
    return Scores(edges.tolist(), of_right, of_wrong, above, drawn)


def _drawn(keys: Ids, most: int, rng: np.random.Generator) -> Ids:
    return keys if len(keys) <= most else rng.choice(keys, most, replace=False)


def _values(searcher: Searcher, result: Evaluation, keys: Ids, count: int) -> npt.NDArray[np.float64]:
    return EmbeddingShards(searcher.ranker.shards).scores(keys % count, keys // count, snap(result.embeddings))


def attributes(searcher: Searcher, result: Evaluation) -> list[Attribute]:
    """Confusion by attribute: by what the queries ask for where the truth says it, else by what their right images
    have in common in those columns of the gallery that hold few different values."""
    found = _metadata(searcher, result.found)
    if result.truth.asked:
        asked = [result.truth.asked[text] for text in result.truth.relevant]
        columns = list(dict.fromkeys(column for one in asked for column in one))
        return [_attribute(column, asked, found, column in result.truth.includes) for column in columns]
    if not searcher.gallery.columns():
        return []
    common = _common(searcher, result.relevant)
    kept = []
    for column in searcher.gallery.columns():
        values = {one[column] for one in common if one.get(column)}
        if 1 < len(values) <= _MOST_VALUES:
            kept.append(_attribute(column, common, found, several=False))
    return kept[:_ATTRIBUTES]


def _metadata(searcher: Searcher, positions: Ids) -> list[Values]:
    """The metadata of the embeddings at positions [Q,K], as text."""
    used = np.unique(positions[positions >= 0])
    held = searcher.gallery.metadata(searcher.stored.ids[used])
    of = {
        at: {name: as_text(value) for name, value in one.items()} for at, one in zip(used.tolist(), held, strict=True)
    }
    return [[of[at] for at in line if at >= 0] for line in positions.tolist()]


def _common(searcher: Searcher, relevant: Sequence[Sequence[int]]) -> list[Mapping[str, str]]:
    """The values that all right images of a query have in common."""
    used = np.unique(np.array([at for right in relevant for at in right], dtype=np.int64))
    of = dict(zip(used.tolist(), (one[0] for one in _metadata(searcher, used[:, None])), strict=True))
    return [dict(set.intersection(*(set(of[at].items()) for at in right))) for right in relevant]


def _attribute(column: str, asked: Sequence[Mapping[str, str]], found: Sequence[Values], several: bool) -> Attribute:
    pairs = Counter[tuple[str, str]]()
    hits, places = Counter[str](), Counter[str]()
    for one, images in zip(asked, found, strict=True):
        value = one.get(column)
        if not value or not images:
            continue
        for want in sorted(names(value)) if several else [value]:
            has = [want in names(held[column]) if several else want == held[column] for held in images]
            first = ("yes" if has[0] else "no") if several else images[0][column] or NOTHING
            pairs[want, first] += 1
            hits[want] += sum(has)
            places[want] += len(has)
    total = Counter[str]()
    for (want, _), number in pairs.items():
        total[want] += number
    order = [want for want, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))]
    wanted, rest = order[:_VALUES], order[_VALUES:]
    heads = ["yes", "no"] if several else [*wanted, *_more_found(pairs, wanted)]
    lines = {want: [0] * len(heads) for want in [*wanted, *([OTHERS] if rest else [])]}
    for (want, first), number in pairs.items():
        lines[want if want in lines else OTHERS][heads.index(first if first in heads else OTHERS)] += number
    groups = [[want] for want in wanted] + ([rest] if rest else [])
    among = [sum(hits[want] for want in group) / max(sum(places[want] for want in group), 1) for group in groups]
    return Attribute(column, list(lines), heads, list(lines.values()), among, several)


def _more_found(pairs: Counter[tuple[str, str]], wanted: Sequence[str]) -> list[str]:
    """The columns of a matrix in addition to those of what was wanted."""
    others = {first for _, first in pairs} - set(wanted)
    return [*([OTHERS] if others - {NOTHING} else []), *([NOTHING] if NOTHING in others else [])]


def write_report(
    out: Path, searcher: Searcher, result: Evaluation, *, facts: Sequence[tuple[str, str]], title: str, queries: int
) -> None:
    """Write the page, completely or not at all.

    Args:
        out: The file.
        searcher: Of the gallery.
        result: The evaluation.
        facts: The main figures, name and value.
        title: The heading.
        queries: Queries to show: half of them the worst, the others an even sample of the rest.

    Raises:
        ClipretError: The file cannot be written.
    """
    order = worst(result)
    bad = order if len(order) <= queries else order[: (queries + 1) // 2]
    rest = sorted(set(order) - set(bad))
    count = min(queries - len(bad), len(rest))
    sample = [rest[number * len(rest) // count] for number in range(count)]
    sections = [*_sections(searcher, result, bad), *_sections(searcher, result, sample)]
    shown = f"The {len(bad)} worst queries, by AP@10" if sample else "All queries, the worst first"
    shown += f", then {len(sample)} of the other {len(rest)}, evenly drawn." if sample else "."
    write_page(
        out,
        title=title,
        facts=facts,
        sections=sections,
        template="evaluation.html.j2",
        charts=_charts(searcher, result),
        shown=shown,
    )


def _charts(searcher: Searcher, result: Evaluation) -> list[Chart]:
    live = searcher.stored.live
    count = len(searcher.stored.ids) if live is None else int(live.sum())
    points = recall_curve(result.first, count)
    marked = [k for k in _MARKS if k <= count]
    note = f"The share of {len(result.first):,} queries that have a right image among the first k of {count:,}."
    made: list[Chart] = [curve("Recall", note, points, marked)]
    scores = scores_of(searcher, result)
    some = "drawn evenly" if scores.drawn else "all there are"
    note = (
        f"Pairs of a query and an image, {some}: {sum(scores.right):,} right, {sum(scores.wrong):,} wrong. "
        f"A right one scores above a wrong one, of any query each, in {scores.above:.1%}."
    )
    made.append(histogram("Scores", note, scores.edges, scores.right, scores.wrong, ("right images", "wrong images")))
    for one in attributes(searcher, result):
        total = sum(map(sum, one.counts))
        if one.several:
            rows = [
                (want, f"{sum(line):,}", f"{line[0] / max(sum(line), 1):.1%}", f"{share:.1%}")
                for want, line, share in zip(one.wanted, one.counts, one.among, strict=True)
            ]
            head = ("wanted", "queries", "the first has it", "of the first 10")
            made.append(Table(f"What was found: {one.column}", "By each name that a query asks for.", head, rows))
        else:
            note = f"What {total:,} queries wanted, and what their first image is; the last column is of all first ten."
            made.append(Matrix(f"Confusion: {one.column}", note, one.wanted, one.found, one.counts, one.among))
    return made


def _sections(searcher: Searcher, result: Evaluation, chosen: Sequence[int]) -> list[Section]:
    texts = list(result.truth.relevant)
    hits = searcher.hits(result.scores[chosen], result.found[chosen]) if len(chosen) else []
    missed = _missed(searcher, result, chosen)
    sections = []
    for at, line in zip(chosen, hits, strict=True):
        right = set(result.truth.relevant[texts[at]])
        cards = [Card(hit.file, hit.path, hit.score, hit.path in right) for hit in line]
        noun = "image" if len(right) == 1 else "images"
        found = sum(hit.path in right for hit in line)
        note = f"{found} of the first {len(line)} right; {len(right)} {noun} to find"
        if result.first[at] > len(line):
            note += f", the first at rank {result.first[at]:,}"
        sections.append(Section(texts[at], cards, note, missed[at]))
    return sections


def _missed(searcher: Searcher, result: Evaluation, chosen: Sequence[int]) -> dict[int, list[Card]]:
    """The best of each query's right images that were not found among the first, with their ranks."""
    grid, cards = snap(result.embeddings), dict[int, list[Card]]()
    pairs = list[tuple[int, int]]()
    for at in chosen:
        right, there = set(result.relevant[at]), set(result.found[at].tolist())
        room = min(len(right), result.found.shape[1]) - len(right & there)
        if not room:
            continue  # no ranking could have shown more of them
        left = np.array(sorted(right - there), dtype=np.int64)
        values = EmbeddingShards(searcher.ranker.shards).scores(left, np.full(len(left), at), grid)
        pairs += [(at, int(left[place])) for place in np.lexsort((left, -values))[: min(room, _MISSED)]]
    if not pairs:
        return {at: [] for at in chosen}
    query, row = (np.array(column) for column in zip(*pairs, strict=True))
    ranks = searcher.ranker.first_ranks(result.embeddings[query], [[at] for at in row.tolist()])
    values = EmbeddingShards(searcher.ranker.shards).scores(row, query, grid)
    for at, place, rank, score in zip(query.tolist(), row.tolist(), ranks.tolist(), values.tolist(), strict=True):
        path = searcher.gallery.paths([int(searcher.stored.ids[place])])[0]
        cards.setdefault(at, []).append(Card(searcher.gallery.file(path), path, score, True, rank))
    return {at: cards.get(at, []) for at in chosen}
