"""Result files: the results of queries as JSON, as `clipret-search query --json` and `merge` write it.

    [{"query": "a red sedan", "hits": [{"rank": 1, "score": 0.31, "path": "0017.jpg", …}, …]}, …]

Answers to the traffic challenge, {"results": [{"text": …, "image_names": […]}]}, can be read too. They have no scores.
"""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from clipret.errors import ClipretError
from clipret.schema import checked

__all__ = ["RankedPaths", "as_results", "read_results"]


class _Hit(msgspec.Struct, frozen=True):
    """Further keys are ignored, here and in `_Entry`."""

    rank: int
    score: float
    path: str


class _Entry(msgspec.Struct, frozen=True):
    query: str
    hits: list[_Hit]

    def found(self) -> "RankedPaths":
        hits = sorted(self.hits, key=lambda hit: hit.rank)
        return RankedPaths(tuple(hit.path for hit in hits), tuple(hit.score for hit in hits))


class _Answer(msgspec.Struct, frozen=True):
    """One query of an answer to the traffic challenge."""

    query: str = msgspec.field(name="text")
    image_names: list[str]

    def found(self) -> "RankedPaths":
        return RankedPaths(tuple(self.image_names), None)


class _Answers(msgspec.Struct, frozen=True):
    results: list[_Answer]


@dataclass(frozen=True)
class RankedPaths:
    """The results of one query, best first; `scores` is None if the file has none."""

    paths: tuple[str, ...]
    scores: tuple[float, ...] | None


def as_results(queries: Iterable[str], found: Iterable[RankedPaths]) -> list[dict[str, object]]:
    """The content of a result file."""
    return [
        {
            "query": query,
            "hits": [
                {"rank": rank, "score": score, "path": path}
                for rank, (path, score) in enumerate(zip(one.paths, one.scores or (), strict=True), 1)
            ],
        }
        for query, one in zip(queries, found, strict=True)
    ]


def read_results(path: Path) -> dict[str, RankedPaths]:
    """Read the results of each query of a file.

    Raises:
        ClipretError: Not a result file; or, naming the query, an image listed twice, scores that rise, or a query
            listed twice with different images.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ClipretError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ClipretError(f"{path} is not JSON ({error}): name a result file or a gallery") from error
    results: dict[str, RankedPaths] = {}
    entries: Sequence[_Entry | _Answer]
    try:
        entries = checked(value, _Answers).results if isinstance(value, dict) else checked(value, list[_Entry])
    except ValueError as error:
        raise ClipretError(
            f"{path} is no result file ({error}): make one with  clipret-search query --json  or  clipret-search merge"
        ) from error
    for query, found in ((entry.query.strip(), entry.found()) for entry in entries):
        where = f"{path}: the query {query!r}"
        if len(set(found.paths)) < len(found.paths):
            double = next(name for name in found.paths if found.paths.count(name) > 1)
            raise ClipretError(f"{where} lists {double} twice: correct the file")
        if found.scores is not None and not _falls(found.scores):
            raise ClipretError(f"{where} has scores that rise or are no numbers: correct the file")
        if results.setdefault(query, found) != found:
            raise ClipretError(f"{where} is there twice with different images: remove one")
    if not results:
        raise ClipretError(f"{path} holds no queries: make it again")
    return results


def _falls(scores: Sequence[float]) -> bool:
    return all(map(math.isfinite, scores)) and all(a >= b for a, b in itertools.pairwise(scores))
