"""Evaluating a gallery: queries with their relevant images, and metrics of the search results."""

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
    """Each distinct query with the stored paths of all its relevant images."""

    relevant: dict[str, list[str]]
    missing: int  # images of the list that the gallery does not hold
    unanswerable: int  # texts left out because the gallery holds none of their images
    # What each text asks for, by column, where attributes say which images answer; `includes`: the columns of those
    # that name several things.
    asked: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    includes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """The results of the queries of a ground truth, in its order.

    Attributes:
        embeddings: Of the queries, float64 [Q,D].
        relevant: The positions of each query's relevant embeddings.
        scores, found: Scores and positions of the first results, [Q,K] with K = 10 or the size of the gallery.
        first: The rank, from 1, of each query's first relevant image, int64 [Q].
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
    """Read an annotations file with a caption and an image per row.

    Rows with the same caption are one query with several relevant images. An image is found by its stored path or by
    its file.

    Args:
        searcher: Of the gallery.
        path: The file.
        caption_column: Column of the captions. Default: detected.
        image_column: Column of the image paths. Default: detected.
        image_root: What relative paths start from. Default: the file's folder.
        where: An SQL expression: only rows for which it holds.

    Raises:
        ClipretError: No image of the file is in the gallery, or a row lacks a caption.
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
    """Read an annotations file with a caption per row and the attributes that it asks for.

    An image is relevant if its metadata has the query's value in every column of `equal` (color, brand, type) and
    contains the query's names in every column of `includes`: names separated by commas or semicolons, such as  hat,
    backpack.  An empty value asks for nothing.

    Args:
        searcher: Of the gallery, whose metadata has these columns.
        path: The file.
        equal: Columns that must be equal.
        includes: Columns that must include the query's names.
        caption_column: Column of the captions. Default: detected.
        where: An SQL expression: only rows for which it holds.

    Raises:
        ClipretError: The file or the gallery lacks a column, a query asks for nothing, two rows with the same caption
            ask for different things, or no image is relevant to any query.
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
    """Whether an image is relevant: the first `equal` values are the same and it includes the others."""
    if any(want and want != own for want, own in zip(asked[:equal], has[:equal], strict=True)):
        return False
    return all(names(want) <= names(own) for want, own in zip(asked[equal:], has[equal:], strict=True))


def names(value: str) -> set[str]:
    """The names in a value, separated by commas or semicolons."""
    return {as_text(name) for name in re.split("[,;]", value) if name.strip()}


def as_text(value: Any) -> str:
    """A value as text, so that a file's 007 equals the number 7 in a gallery's metadata."""
    return "" if value is None else str(as_number(value)).strip()


def evaluate_search(searcher: Searcher, truth: GroundTruth) -> Evaluation:
    """Encode every query, rank the whole gallery, and compute the metrics."""
    rows, relevant = _embedded(searcher, truth)
    scores, found = searcher.ranker.rank(rows, 10)
    first = searcher.ranker.first_ranks(rows, relevant)
    return Evaluation(summarise(found, first, relevant), truth, rows, relevant, scores, found, first)


def measure(
    searcher: Searcher, truth: GroundTruth, metrics: Sequence[Metric], find: Find | None = None
) -> dict[str, float]:
    """Compute metrics as means over the queries.

    Args:
        searcher: Of the gallery.
        truth: The queries and their relevant images.
        metrics: Which metrics.
        find: A function from queries [Q,D] and k to scores and positions [Q,K], such as `Reranker.rank`; it is called
            once for all queries. Default: `Ranker.rank`.

    Returns:
        The value of each metric by its name.
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
    """Compute metrics of given rankings.

    Args:
        truth: The queries and their relevant images.
        found: The ranked stored paths of each query. Images after the end of a short ranking count as not found.
        metrics: Which metrics.
        origin: Where the rankings come from, for messages.

    Raises:
        ClipretError: A query has no ranking.
    """
    lost = next((text for text in truth.relevant if text not in found), None)
    if lost is not None:
        raise ClipretError(f"{origin} has no results for {lost!r}: make it with the same texts")
    return {
        str(metric): float(np.mean([metric.of(found[text], set(right)) for text, right in truth.relevant.items()]))
        for metric in metrics
    }


def _embedded(searcher: Searcher, truth: GroundTruth) -> tuple[npt.NDArray[np.float64], list[list[int]]]:
    """The queries' embeddings [Q,D], and the positions of each query's relevant embeddings."""
    position = {int(number): at for at, number in enumerate(searcher.stored.ids)}
    ids = searcher.gallery.ids_by_path()
    relevant = [[position[ids[path]] for path in paths] for paths in truth.relevant.values()]
    return searcher.embed(list(truth.relevant)), relevant
