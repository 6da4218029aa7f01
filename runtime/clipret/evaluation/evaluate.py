"""Evaluating a gallery: queries with their relevant images from a list, and what the search makes of them."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError
from clipret.evaluation.metrics import Metric, Metrics, summarise
from clipret.search.searcher import Searcher
from clipret.tables import as_number, pick_column, read_table

__all__ = [
    "Evaluation",
    "GroundTruth",
    "as_text",
    "evaluate_search",
    "measure",
    "measure_lists",
    "names",
    "read_attribute_truth",
    "read_ground_truth",
]

Find = Callable[[npt.NDArray[np.float64], int], tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]

_PLACES = 1 << 22  # ranks held at a time: of 41 queries over 100,000 images, 32 MiB


@dataclass(frozen=True)
class GroundTruth:
    """Each distinct text with the stored paths of all its images."""

    relevant: dict[str, list[str]]
    missing: int  # images of the list that the gallery does not hold
    unanswerable: int  # texts left out because the gallery holds none of their images
    # What each text asks for, by column, where attributes say which images answer; `includes`: the columns of those
    # that name several things.
    asked: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    includes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What the queries of `truth`, in its order, found.

    `rows` float64 [Q,D]; `relevant`: the positions of the rows that answer each; `scores` and `found` [Q,K], K = 10 or
    what the gallery holds: the first ones as `Ranker.rank` gives them; `first` int64 [Q]: the rank, from 1, of the
    first relevant row.
    """

    metrics: Metrics
    truth: GroundTruth
    embeddings: npt.NDArray[np.float64]
    relevant: list[list[int]]
    scores: npt.NDArray[np.float64]
    found: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]


def read_ground_truth(
    searcher: Searcher,
    path: Path,
    *,
    caption_column: str | None = None,
    image_column: str | None = None,
    image_root: Path | None = None,
    where: str | None = None,
) -> GroundTruth:
    """Read a list with a caption and an image a row; rows with the same caption are one query with several answers.

    An image is found by the path that the gallery stores or by its place on disk (relative to `image_root`, by
    default the list's folder). Raises ClipretError when no image of the list is in the gallery.
    """
    table = read_table(path, where)
    caption, image = pick_column(table, caption_column, "caption"), pick_column(table, image_column, "image")
    root = image_root or path.parent
    found = searcher.find({row[image]: root / row[image] for row in table.rows})
    relevant: dict[str, dict[str, None]] = {}
    lost: set[str] = set()
    for row in table.rows:
        text, name = row[caption].strip(), row[image]
        if not text:
            raise ClipretError(f"{path} has a row with an empty {caption} (image {name}): remove it or fill it in")
        answers = relevant.setdefault(text, {})
        if name in found:
            answers[found[name][0]] = None
        else:
            lost.add(name)
    answerable = {text: list(paths) for text, paths in relevant.items() if paths}
    if not answerable:
        raise ClipretError(
            f"gallery {searcher.searched.name} holds none of the {len(lost)} images of {path} "
            f"(the first: {sorted(lost)[0]}): set --image-root, or index those images"
        )
    return GroundTruth(answerable, len(lost), len(relevant) - len(answerable))


def read_attribute_truth(
    searcher: Searcher,
    path: Path,
    *,
    equal: Sequence[str] = (),
    includes: Sequence[str] = (),
    caption_column: str | None = None,
    where: str | None = None,
) -> GroundTruth:
    """Read a list with a caption a row and the attributes that it asks for; images answer by their own attributes.

    An image answers when its value in every column of `equal` is the query's (colour, brand, type), and when what it
    holds in every column of `includes` includes what the query holds there: names between commas or semicolons,
    such as  hat, backpack.  Where the query has no value it asks for nothing. Images have the columns
    that the list they were indexed from had. Raises ClipretError for a column that the list or the gallery lacks, a
    query that asks for nothing, two rows with the same caption that ask for different things, and when no
    image answers any query.
    """
    table = read_table(path, where)
    caption = pick_column(table, caption_column, "caption")
    columns = (*equal, *includes)
    if not columns:
        raise ClipretError("name at least one column to compare: there is nothing to tell which images answer")
    held = searcher.gallery.columns()
    for column in columns:
        for owner, there in ((path, table.columns), (searcher.gallery.path, held)):
            if column not in there:
                known = ", ".join(there) or "none; index a list with it"
                raise ClipretError(f"{owner} has no column {column!r}: its columns are {known}")
    asked: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(table.rows, 1):
        if not row[caption].strip():
            raise ClipretError(f"{path}: query {number} is blank: fill it in or remove it")
        text, values = row[caption].strip(), tuple(as_text(row[column]) for column in columns)
        if not any(values[: len(equal)]) and not any(map(names, values[len(equal) :])):
            raise ClipretError(f"{path}: the query {text!r} asks for nothing: fill in {' or '.join(columns)}")
        if asked.setdefault(text, values) != values:
            raise ClipretError(f"{path}: the query {text!r} is there twice and asks for different things: remove one")
    of_values = defaultdict[tuple[str, ...], list[str]](list)
    ids = searcher.gallery.ids_by_path()
    for name, metadata in zip(ids, searcher.gallery.metadata(list(ids.values())), strict=True):
        of_values[tuple(as_text(metadata[column]) for column in columns)].append(name)
    relevant = {}
    for text, values in asked.items():
        paths = [name for has, some in of_values.items() if _answers(values, has, len(equal)) for name in some]
        if paths:
            relevant[text] = paths
    if not relevant:
        raise ClipretError(f"no image of {searcher.gallery.path} answers any of {path}: check {', '.join(columns)}")
    wanted = {
        text: {column: value for column, value in zip(columns, asked[text], strict=True) if value} for text in relevant
    }
    return GroundTruth(relevant, 0, len(asked) - len(relevant), wanted, tuple(includes))


def _answers(asked: Sequence[str], has: Sequence[str], equal: int) -> bool:
    """Whether an image has what a query asks for: the first `equal` values alike, the others among its own."""
    if any(want and want != own for want, own in zip(asked[:equal], has[:equal], strict=True)):
        return False
    return all(names(want) <= names(own) for want, own in zip(asked[equal:], has[equal:], strict=True))


def names(value: str) -> set[str]:
    """The names in a value that holds several, between commas or semicolons."""
    return {as_text(name) for name in re.split("[,;]", value) if name.strip()}


def as_text(value: Any) -> str:
    """A value of a list or of a gallery's metadata, so that both say the same: a gallery holds 007 as the number 7."""
    return "" if value is None else str(as_number(value)).strip()


def evaluate_search(searcher: Searcher, truth: GroundTruth) -> Evaluation:
    """Encode every text, rank the whole gallery, and measure."""
    rows, relevant = _embedded(searcher, truth)
    scores, found = searcher.ranker.rank(rows, 10)
    first = searcher.ranker.first_ranks(rows, relevant)
    return Evaluation(summarise(found, first, relevant), truth, rows, relevant, scores, found, first)


def measure(
    searcher: Searcher, truth: GroundTruth, metrics: Sequence[Metric], find: Find | None = None
) -> dict[str, float]:
    """Each metric by its name, the mean over the queries.

    `find(queries [Q,D], k)` gives scores and positions [Q,K] as `Ranker.rank` does, the default; another one measures
    what re-ranking makes of the same queries, and is called once, for all of them.
    """
    rows, relevant = _embedded(searcher, truth)
    depth = max((metric.k or len(searcher.stored.ids) for metric in metrics), default=1)
    step = max(1, _PLACES // depth) if find is None else len(rows)
    values = defaultdict[str, list[float]](list)
    for low in range(0, len(rows), step):
        _, found = (find or searcher.ranker.rank)(rows[low : low + step], depth)
        for line, right in zip(found.tolist(), relevant[low : low + step], strict=True):
            order, answers = [at for at in line if at >= 0], set(right)
            for metric in metrics:
                values[str(metric)].append(metric.of(order, answers))
    return {name: float(np.mean(one)) for name, one in values.items()}


def measure_lists(
    truth: GroundTruth, found: Mapping[str, Sequence[str]], metrics: Sequence[Metric], origin: str
) -> dict[str, float]:
    """The same of what each text has found already, by stored paths; `origin` is for messages.

    A list that ends before the metric's depth misses what it leaves out. Raises ClipretError for a text without one.
    """
    lost = next((text for text in truth.relevant if text not in found), None)
    if lost is not None:
        raise ClipretError(f"{origin} has no results for {lost!r}: make it with the same texts")
    return {
        str(metric): float(np.mean([metric.of(found[text], set(right)) for text, right in truth.relevant.items()]))
        for metric in metrics
    }


def _embedded(searcher: Searcher, truth: GroundTruth) -> tuple[npt.NDArray[np.float64], list[list[int]]]:
    """The queries' rows [Q,D], and for each of them the positions of the rows that answer it."""
    position = {int(number): at for at, number in enumerate(searcher.stored.ids)}
    ids = searcher.gallery.ids_by_path()
    relevant = [[position[ids[path]] for path in paths] for paths in truth.relevant.values()]
    return searcher.embed(list(truth.relevant)), relevant
