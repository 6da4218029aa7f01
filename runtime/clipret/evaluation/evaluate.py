"""Evaluation of a gallery: queries with their relevant images, and metrics of their results."""

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

Rank = Callable[[npt.NDArray[np.float64], int], tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]

_RANKS = 1 << 22  # ranks in memory at a time: 32 MiB, or 41 queries over 100,000 images


@dataclass(frozen=True)
class GroundTruth:
    """Distinct queries with their relevant images.

    Attributes:
        relevant: The stored paths of the relevant images of each query.
        missing: Number of images of the annotations file that are not in the gallery.
        unanswerable: Number of queries left out because none of their images is in the gallery.
        wanted: With `read_attribute_truth`, the attribute values of each query by column.
        includes: The columns of `wanted` whose values are several names.
    """

    relevant: dict[str, list[str]]
    missing: int
    unanswerable: int
    wanted: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    includes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """The results of the queries of a ground truth, in its order.

    Attributes:
        metrics: The metrics.
        truth: The ground truth.
        embeddings: The embeddings of the queries, float64 [Q,D].
        relevant: The positions of each query's relevant embeddings.
        scores, positions: The first results, float64 and int64 [Q,K], where K is 10 or the size of a smaller gallery.
        first_ranks: The rank, from 1, of each query's first relevant image, int64 [Q].
    """

    metrics: Metrics
    truth: GroundTruth
    embeddings: npt.NDArray[np.float64]
    relevant: list[list[int]]
    scores: npt.NDArray[np.float64]
    positions: npt.NDArray[np.int64]
    first_ranks: npt.NDArray[np.int64]


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

    Rows with the same caption are one query with several relevant images. An image is looked up by its stored path or
    by its file.

    Args:
        searcher: The searcher of the gallery.
        path: The annotations file.
        caption_column: Column of the captions. Default: detected.
        image_column: Column of the image paths. Default: detected.
        image_root: Folder that relative image paths start from. Default: the folder of the file.
        where: An SQL expression that selects rows.

    Raises:
        ClipretError: No image of the file is in the gallery, or a row lacks a caption.
    """
    table = read_table(path, where)
    caption, image = pick_column(table, caption_column, "caption"), pick_column(table, image_column, "image")
    root = image_root or path.parent
    stored = searcher.find({row[image]: root / row[image] for row in table.rows})
    relevant: dict[str, dict[str, None]] = {}
    absent: set[str] = set()
    for row in table.rows:
        text, name = row[caption].strip(), row[image]
        if not text:
            raise ClipretError(f"{path} has a row with an empty {caption} (image {name}): remove it or fill it in")
        images = relevant.setdefault(text, {})
        if name in stored:
            images[stored[name][0]] = None
        else:
            absent.add(name)
    answerable = {text: list(paths) for text, paths in relevant.items() if paths}
    if not answerable:
        raise ClipretError(
            f"gallery {searcher.searched.name} has none of the {len(absent)} images of {path} "
            f"(the first: {sorted(absent)[0]}): set --image-root, or index these images"
        )
    return GroundTruth(answerable, len(absent), len(relevant) - len(answerable))


def read_attribute_truth(
    searcher: Searcher,
    path: Path,
    *,
    equal: Sequence[str] = (),
    includes: Sequence[str] = (),
    caption_column: str | None = None,
    where: str | None = None,
) -> GroundTruth:
    """Read an annotations file with a caption and the attributes of its relevant images per row.

    An image is relevant if its metadata has the query's value in every column of `equal` (color, brand, type) and
    contains the query's names in every column of `includes`: names separated by commas or semicolons, such as  hat,
    backpack.  An empty value matches all images.

    Args:
        searcher: The searcher of the gallery, whose metadata has these columns.
        path: The annotations file.
        equal: Columns whose values must be equal.
        includes: Columns whose values must include the names of the query.
        caption_column: Column of the captions. Default: detected.
        where: An SQL expression that selects rows.

    Raises:
        ClipretError: The file or the gallery lacks a column, a query has no attribute, two rows with the same caption
            have different attributes, or no image is relevant to any query.
    """
    table = read_table(path, where)
    caption = pick_column(table, caption_column, "caption")
    columns = (*equal, *includes)
    if not columns:
        raise ClipretError("there is no column to compare: name at least one of equal and includes")
    gallery_columns = searcher.gallery.columns()
    for column in columns:
        for owner, available in ((path, table.columns), (searcher.gallery.path, gallery_columns)):
            if column not in available:
                listing = ", ".join(available) or "none; index an annotations file with it"
                raise ClipretError(f"{owner} has no column {column!r}: its columns are {listing}")
    wanted: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(table.rows, 1):
        if not row[caption].strip():
            raise ClipretError(f"{path}: query {number} is blank: fill it in or remove it")
        text, values = row[caption].strip(), tuple(as_text(row[column]) for column in columns)
        if not any(values[: len(equal)]) and not any(map(names, values[len(equal) :])):
            raise ClipretError(f"{path}: the query {text!r} has no attribute: fill in {' or '.join(columns)}")
        if wanted.setdefault(text, values) != values:
            raise ClipretError(f"{path}: the query {text!r} is there twice with different attributes: remove one")
    paths_by_values = defaultdict[tuple[str, ...], list[str]](list)
    ids = searcher.gallery.ids_by_path()
    for name, metadata in zip(ids, searcher.gallery.metadata(list(ids.values())), strict=True):
        paths_by_values[tuple(as_text(metadata[column]) for column in columns)].append(name)
    relevant = {}
    for text, values in wanted.items():
        matching = (paths for has, paths in paths_by_values.items() if _matches(values, has, len(equal)))
        paths = [path for group in matching for path in group]
        if paths:
            relevant[text] = paths
    if not relevant:
        raise ClipretError(
            f"no image of {searcher.gallery.path} matches any query of {path}: check {', '.join(columns)}"
        )
    by_column = {
        text: {column: value for column, value in zip(columns, wanted[text], strict=True) if value} for text in relevant
    }
    return GroundTruth(relevant, 0, len(wanted) - len(relevant), by_column, tuple(includes))


def _matches(wanted: Sequence[str], has: Sequence[str], equal: int) -> bool:
    """Whether the values of an image match: the first `equal` values are the same, and the others include the names."""
    if any(value and value != other for value, other in zip(wanted[:equal], has[:equal], strict=True)):
        return False
    return all(names(value) <= names(other) for value, other in zip(wanted[equal:], has[equal:], strict=True))


def names(value: str) -> set[str]:
    """The names in a value, separated by commas or semicolons."""
    return {as_text(name) for name in re.split("[,;]", value) if name.strip()}


def as_text(value: Any) -> str:
    """A value as text, so that a file's 007 equals the number 7 in a gallery's metadata."""
    return "" if value is None else str(as_number(value)).strip()


def evaluate_search(searcher: Searcher, truth: GroundTruth) -> Evaluation:
    """Encode every query, rank the whole gallery, and compute the metrics.

    Args:
        searcher: The searcher of the gallery.
        truth: The queries and their relevant images.
    """
    queries, relevant = _embed(searcher, truth)
    scores, positions = searcher.ranker.rank(queries, 10)
    first_ranks = searcher.ranker.first_ranks(queries, relevant)
    metrics = summarise(positions, first_ranks, relevant)
    return Evaluation(metrics, truth, queries, relevant, scores, positions, first_ranks)


def measure(
    searcher: Searcher, truth: GroundTruth, metrics: Sequence[Metric], rank: Rank | None = None
) -> dict[str, float]:
    """Compute metrics as means over the queries.

    Args:
        searcher: The searcher of the gallery.
        truth: The queries and their relevant images.
        metrics: The metrics to compute.
        rank: Returns scores and positions [Q,K] for queries [Q,D] and k, as `Reranker.rank` does; it is called once for
            all queries. Default: `Ranker.rank`.

    Returns:
        The value of each metric by its name.
    """
    queries, relevant = _embed(searcher, truth)
    depth = max((metric.k or len(searcher.stored.ids) for metric in metrics), default=1)
    step = max(1, _RANKS // depth) if rank is None else len(queries)
    values = defaultdict[str, list[float]](list)
    for low in range(0, len(queries), step):
        _, positions = (rank or searcher.ranker.rank)(queries[low : low + step], depth)
        for results, relevant_positions in zip(positions.tolist(), relevant[low : low + step], strict=True):
            ranked, right = [at for at in results if at >= 0], set(relevant_positions)
            for metric in metrics:
                values[str(metric)].append(metric.of(ranked, right))
    return {name: float(np.mean(of_queries)) for name, of_queries in values.items()}


def measure_lists(
    truth: GroundTruth, rankings: Mapping[str, Sequence[str]], metrics: Sequence[Metric], origin: str
) -> dict[str, float]:
    """Compute metrics of finished rankings.

    Args:
        truth: The queries and their relevant images.
        rankings: The ranked stored paths of each query. Images that a short ranking leaves out count as not found.
        metrics: The metrics to compute.
        origin: The source of the rankings, for error messages.

    Raises:
        ClipretError: A query has no ranking.
    """
    absent = next((text for text in truth.relevant if text not in rankings), None)
    if absent is not None:
        raise ClipretError(f"{origin} has no results for {absent!r}: search for all texts of the ground truth")
    return {
        str(metric): float(np.mean([metric.of(rankings[text], set(right)) for text, right in truth.relevant.items()]))
        for metric in metrics
    }


def _embed(searcher: Searcher, truth: GroundTruth) -> tuple[npt.NDArray[np.float64], list[list[int]]]:
    """The queries' embeddings [Q,D], and the positions of each query's relevant embeddings."""
    position = {int(id): at for at, id in enumerate(searcher.stored.ids)}
    ids = searcher.gallery.ids_by_path()
    relevant = [[position[ids[path]] for path in paths] for paths in truth.relevant.values()]
    return searcher.embed(list(truth.relevant)), relevant
