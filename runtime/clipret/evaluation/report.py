"""The HTML report of an evaluation: charts of the metrics, the worst queries, and a sample of the others."""

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

_POINTS = 160  # of the recall curve, evenly spaced on its logarithmic axis
_MARKS = (1, 5, 10, 20, 50, *(10**power for power in range(2, 10)))  # values of k in the table
_PAIRS = 200_000  # scores sampled for each of the two distributions
_BINS = 40
_MATRIX_VALUES = 12  # of an attribute in its matrix; the others are combined
_MAX_VALUES = 30  # a column with more distinct values is not an attribute but a name or a time
_MAX_ATTRIBUTES = 4  # columns of a gallery that are shown if the ground truth names none
_MISSED = 5  # relevant images of a query that are shown although they were not found
OTHERS, NO_VALUE = "(others)", "(none)"


@dataclass(frozen=True)
class Scores:
    """The distributions of the scores of right and wrong images.

    Attributes:
        edges: Edges of the bins, one more than bins.
        right: Counts of pairs of a query and a relevant image.
        wrong: Counts of pairs of a query and another image.
        above: How often a right pair scores higher than a wrong pair, of any query each; equal scores count half.
        sampled: Whether the pairs are a sample.
    """

    edges: list[float]
    right: list[int]
    wrong: list[int]
    above: float
    sampled: bool


@dataclass(frozen=True)
class Attribute:
    """Confusion by one column: the values that queries want, and those of their first results.

    Attributes:
        column: The column.
        wanted: The values that queries want.
        found: The values of first results. With `several`: "yes" and "no".
        counts: `counts[w][f]` is the number of queries that want `wanted[w]` and whose first result has `found[f]`.
        among: The share of the first ten results of these queries that have the value, by wanted value.
        several: Whether a value is several names; then a query counts once for each name that it wants.
    """

    column: str
    wanted: list[str]
    found: list[str]
    counts: list[list[int]]
    among: list[float]
    several: bool = False


def recall_curve(first_ranks: Ids, count: int) -> list[tuple[int, float]]:
    """k and recall@k, for k from 1 to the number of images, or for some of them if there are many.

    Args:
        first_ranks: The rank, from 1, of the first relevant image of each query, int64 [Q].
        count: The number of images.
    """
    ks = np.unique(np.rint(np.geomspace(1, max(count, 1), _POINTS)).astype(np.int64))
    ks = np.union1d(ks, [k for k in _MARKS if k <= count])
    ordered = np.sort(first_ranks)
    return [(int(k), float(np.searchsorted(ordered, k, "right") / len(first_ranks))) for k in ks]


def worst(result: Evaluation) -> list[int]:
    """The numbers of the queries, worst first: by AP@10, then by the rank of the first relevant image.

    Args:
        result: The evaluation.
    """
    precision = [
        average_precision(ranked, set(relevant))
        for ranked, relevant in zip(result.positions.tolist(), result.relevant, strict=True)
    ]
    return sorted(range(len(precision)), key=lambda at: (precision[at], -int(result.first_ranks[at]), at))


def scores_of(searcher: Searcher, result: Evaluation, *, pairs: int = _PAIRS, seed: int = 0) -> Scores:
    """The scores of right and wrong pairs of a query and an image.

    Args:
        searcher: The searcher of the gallery.
        result: The evaluation.
        pairs: The number of pairs of each kind from which on they are sampled.
        seed: Of the sample.
    """
    rng = np.random.default_rng(seed)
    ids, live = searcher.stored.ids, searcher.stored.live
    count = len(ids)
    query = np.repeat(np.arange(len(result.relevant)), [len(right) for right in result.relevant])
    row = np.array([at for right in result.relevant for at in right], dtype=np.int64)
    keys = query * count + row
    total = len(result.relevant) * count
    if total <= 4 * pairs:
        other = np.setdiff1d(np.arange(total), keys)
    else:
        other = np.setdiff1d(rng.integers(0, total, 2 * pairs), keys)
    if live is not None:
        other = other[live[other % count]]
    sampled = total > 4 * pairs or len(other) > pairs or len(keys) > pairs
    right, wrong = (_values(searcher, result, _sample(kind, pairs, rng), count) for kind in (keys, other))
    both = np.concatenate([right, wrong])
    edges = np.linspace(both.min(), both.max() + 1e-9, _BINS + 1)
    of_right, of_wrong = (np.histogram(values, edges)[0].tolist() for values in (right, wrong))
    ordered = np.sort(wrong)
    below = np.searchsorted(ordered, right, "left") + np.searchsorted(ordered, right, "right")
    above = float(below.mean() / 2 / len(wrong)) if len(wrong) else 1.0
    return Scores(edges.tolist(), of_right, of_wrong, above, sampled)


def _sample(keys: Ids, count: int, rng: np.random.Generator) -> Ids:
    return keys if len(keys) <= count else rng.choice(keys, count, replace=False)


def _values(searcher: Searcher, result: Evaluation, keys: Ids, count: int) -> npt.NDArray[np.float64]:
    return EmbeddingShards(searcher.ranker.shards).scores(keys % count, keys // count, snap(result.embeddings))


def attributes(searcher: Searcher, result: Evaluation) -> list[Attribute]:
    """Confusion by attribute.

    The wanted values are those of the ground truth, if it has any; otherwise those that all relevant images of a query
    have in common, in the columns of the gallery with few distinct values.

    Args:
        searcher: The searcher of the gallery.
        result: The evaluation.
    """
    found = _metadata(searcher, result.positions)
    if result.truth.wanted:
        wanted = [result.truth.wanted[text] for text in result.truth.relevant]
        columns = list(dict.fromkeys(column for values in wanted for column in values))
        return [_attribute(column, wanted, found, column in result.truth.includes) for column in columns]
    if not searcher.gallery.columns():
        return []
    common = _common(searcher, result.relevant)
    chosen = []
    for column in searcher.gallery.columns():
        values = {metadata[column] for metadata in common if metadata.get(column)}
        if 1 < len(values) <= _MAX_VALUES:
            chosen.append(_attribute(column, common, found, several=False))
    return chosen[:_MAX_ATTRIBUTES]


def _metadata(searcher: Searcher, positions: Ids) -> list[Values]:
    """The metadata of the embeddings at positions [Q,K], as text."""
    used = np.unique(positions[positions >= 0])
    metadata = searcher.gallery.metadata(searcher.stored.ids[used])
    by_position = {
        at: {name: as_text(value) for name, value in values.items()}
        for at, values in zip(used.tolist(), metadata, strict=True)
    }
    return [[by_position[at] for at in ranked if at >= 0] for ranked in positions.tolist()]


def _common(searcher: Searcher, relevant: Sequence[Sequence[int]]) -> list[Mapping[str, str]]:
    """The values that all relevant images of a query have in common."""
    used = np.unique(np.array([at for positions in relevant for at in positions], dtype=np.int64))
    by_position = dict(zip(used.tolist(), (values[0] for values in _metadata(searcher, used[:, None])), strict=True))
    return [dict(set.intersection(*(set(by_position[at].items()) for at in positions))) for positions in relevant]


def _attribute(column: str, wanted: Sequence[Mapping[str, str]], found: Sequence[Values], several: bool) -> Attribute:
    pairs = Counter[tuple[str, str]]()
    hits, ranks = Counter[str](), Counter[str]()
    for of_query, images in zip(wanted, found, strict=True):
        value = of_query.get(column)
        if not value or not images:
            continue
        for want in sorted(names(value)) if several else [value]:
            has = [want in names(image[column]) if several else want == image[column] for image in images]
            first = ("yes" if has[0] else "no") if several else images[0][column] or NO_VALUE
            pairs[want, first] += 1
            hits[want] += sum(has)
            ranks[want] += len(has)
    total = Counter[str]()
    for (want, _), number in pairs.items():
        total[want] += number
    order = [want for want, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))]
    shown, rest = order[:_MATRIX_VALUES], order[_MATRIX_VALUES:]
    heads = ["yes", "no"] if several else [*shown, *_other_heads(pairs, shown)]
    lines = {want: [0] * len(heads) for want in [*shown, *([OTHERS] if rest else [])]}
    for (want, first), number in pairs.items():
        lines[want if want in lines else OTHERS][heads.index(first if first in heads else OTHERS)] += number
    groups = [[want] for want in shown] + ([rest] if rest else [])
    among = [sum(hits[want] for want in group) / max(sum(ranks[want] for want in group), 1) for group in groups]
    return Attribute(column, list(lines), heads, list(lines.values()), among, several)


def _other_heads(pairs: Counter[tuple[str, str]], shown: Sequence[str]) -> list[str]:
    """The columns of a matrix in addition to the wanted values."""
    others = {first for _, first in pairs} - set(shown)
    return [*([OTHERS] if others - {NO_VALUE} else []), *([NO_VALUE] if NO_VALUE in others else [])]


def write_report(
    out: Path, searcher: Searcher, result: Evaluation, *, facts: Sequence[tuple[str, str]], title: str, queries: int
) -> None:
    """Write the page, completely or not at all.

    Args:
        out: The file of the page.
        searcher: The searcher of the gallery.
        result: The evaluation.
        facts: The main figures, name and value.
        title: The heading.
        queries: Number of queries to show: half of them the worst, the others an even sample of the rest.

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
    shown += f", then an even sample of {len(sample)} of the other {len(rest)}." if sample else "."
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
    points = recall_curve(result.first_ranks, count)
    marked = [k for k in _MARKS if k <= count]
    note = f"The share of {len(result.first_ranks):,} queries with a relevant image among the first k of {count:,}."
    charts: list[Chart] = [curve("Recall", note, points, marked)]
    scores = scores_of(searcher, result)
    pairs = "A sample of pairs" if scores.sampled else "All pairs"
    note = (
        f"{pairs} of a query and an image: {sum(scores.right):,} right, {sum(scores.wrong):,} wrong. "
        f"A right pair scores above a wrong pair, of any query each, in {scores.above:.1%}."
    )
    charts.append(histogram("Scores", note, scores.edges, scores.right, scores.wrong, ("right images", "wrong images")))
    for attribute in attributes(searcher, result):
        total = sum(map(sum, attribute.counts))
        if attribute.several:
            rows = [
                (want, f"{sum(line):,}", f"{line[0] / max(sum(line), 1):.1%}", f"{share:.1%}")
                for want, line, share in zip(attribute.wanted, attribute.counts, attribute.among, strict=True)
            ]
            head = ("wanted", "queries", "first result has it", "of the first 10")
            note = "For each name that queries want."
            charts.append(Table(f"Found: {attribute.column}", note, head, rows))
        else:
            note = (
                f"The values that {total:,} queries want and their first results have; last column: of the first ten."
            )
            counts, among = attribute.counts, attribute.among
            charts.append(
                Matrix(f"Confusion: {attribute.column}", note, attribute.wanted, attribute.found, counts, among)
            )
    return charts


def _sections(searcher: Searcher, result: Evaluation, chosen: Sequence[int]) -> list[Section]:
    texts = list(result.truth.relevant)
    hits = searcher.hits(result.scores[chosen], result.positions[chosen]) if len(chosen) else []
    missed = _missed(searcher, result, chosen)
    sections = []
    for at, ranked in zip(chosen, hits, strict=True):
        relevant = set(result.truth.relevant[texts[at]])
        cards = [Card(hit.file, hit.path, hit.score, hit.path in relevant) for hit in ranked]
        noun = "image" if len(relevant) == 1 else "images"
        right = sum(hit.path in relevant for hit in ranked)
        note = f"{right} of the first {len(ranked)} right; {len(relevant)} relevant {noun}"
        if result.first_ranks[at] > len(ranked):
            note += f", the first at rank {result.first_ranks[at]:,}"
        sections.append(Section(texts[at], cards, note, missed[at]))
    return sections


def _missed(searcher: Searcher, result: Evaluation, chosen: Sequence[int]) -> dict[int, list[Card]]:
    """The best relevant images of each query that are not among its first results, with their ranks."""
    grid, cards = snap(result.embeddings), dict[int, list[Card]]()
    pairs = list[tuple[int, int]]()
    for at in chosen:
        relevant, shown = set(result.relevant[at]), set(result.positions[at].tolist())
        room = min(len(relevant), result.positions.shape[1]) - len(relevant & shown)
        if not room:
            continue  # no ranking could have more of them among its first results
        left = np.array(sorted(relevant - shown), dtype=np.int64)
        values = EmbeddingShards(searcher.ranker.shards).scores(left, np.full(len(left), at), grid)
        pairs += [(at, int(left[number])) for number in np.lexsort((left, -values))[: min(room, _MISSED)]]
    if not pairs:
        return {at: [] for at in chosen}
    query, row = (np.array(column) for column in zip(*pairs, strict=True))
    ranks = searcher.ranker.first_ranks(result.embeddings[query], [[at] for at in row.tolist()])
    values = EmbeddingShards(searcher.ranker.shards).scores(row, query, grid)
    for at, position, rank, score in zip(query.tolist(), row.tolist(), ranks.tolist(), values.tolist(), strict=True):
        path = searcher.gallery.paths([int(searcher.stored.ids[position])])[0]
        cards.setdefault(at, []).append(Card(searcher.gallery.file(path), path, score, True, rank))
    return {at: cards.get(at, []) for at in chosen}
