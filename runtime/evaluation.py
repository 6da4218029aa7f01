"""Evaluating a gallery: queries with their relevant pictures from a list, and what the search makes of them."""

from dataclasses import dataclass
from pathlib import Path

from clipret.errors import ClipretError
from clipret.metrics import Metrics, evaluate
from clipret.search import Searcher
from clipret.tables import pick_column, read_table

__all__ = ["Evaluation", "GroundTruth", "evaluate_search", "read_ground_truth"]


@dataclass(frozen=True)
class GroundTruth:
    """Each distinct text with the stored paths of all pictures that some row names beside it."""

    relevant: dict[str, list[str]]
    missing: int  # pictures of the list that the gallery does not hold
    unanswerable: int  # texts left out because the gallery holds none of their pictures


@dataclass(frozen=True)
class Evaluation:
    metrics: Metrics
    truth: GroundTruth


def read_ground_truth(
    searcher: Searcher,
    path: Path,
    *,
    title_column: str | None = None,
    image_column: str | None = None,
    image_root: Path | None = None,
    where: str | None = None,
) -> GroundTruth:
    """Read a list with a title and an image a row; rows with the same title are one query with several answers.

    A picture is found by the path that the gallery stores or by its place on disk (relative to `image_root`, by
    default the list's folder). Raises ClipretError when no picture of the list is in the gallery.
    """
    table = read_table(path, where)
    title, image = pick_column(table, title_column, "title"), pick_column(table, image_column, "image")
    root = image_root or path.parent
    held = searcher.gallery.ids_by_path()
    relevant: dict[str, dict[str, None]] = {}
    lost: set[str] = set()
    for row in table.rows:
        text, name = row[title].strip(), row[image]
        if not text:
            raise ClipretError(f"{path} has a row with an empty {title} (picture {name}): remove it or fill it in")
        answers = relevant.setdefault(text, {})
        stored = name if name in held else searcher.gallery.stored_path(root / name)
        if stored in held:
            answers[stored] = None
        else:
            lost.add(name)
    answerable = {text: list(paths) for text, paths in relevant.items() if paths}
    if not answerable:
        raise ClipretError(
            f"gallery {searcher.gallery.path} holds none of the {len(lost)} pictures of {path} "
            f"(the first: {sorted(lost)[0]}): set --image-root, or index those pictures"
        )
    return GroundTruth(answerable, len(lost), len(relevant) - len(answerable))


def evaluate_search(searcher: Searcher, truth: GroundTruth) -> Evaluation:
    """Encode every text, rank the whole gallery, and measure."""
    position = {int(number): at for at, number in enumerate(searcher.stored.ids)}
    ids = searcher.gallery.ids_by_path()
    rows = searcher.encoder.encode_texts(list(truth.relevant))
    relevant = [[position[ids[path]] for path in paths] for paths in truth.relevant.values()]
    return Evaluation(evaluate(searcher.ranker, rows, relevant), truth)
