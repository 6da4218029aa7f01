"""The protocol of what can be searched: a snapshot of a gallery, or a Milvus collection."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from clipret.arrays import Floats, Ids
from clipret.gallery.database import ImageRecord
from clipret.sources.item import Value

__all__ = ["Searchable"]


class Searchable(Protocol):
    """Embeddings that can be ranked, with the records and metadata of their images. Images are named by id."""

    @property
    def name(self) -> str:
        """The name for messages."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the bundle that made the embeddings."""
        ...

    @property
    def root(self) -> Path:
        """What stored paths are relative to."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """The metadata columns."""
        ...

    def count(self) -> int:
        """The number of images."""
        ...

    def filter(self, where: str | None, exclude: Collection[int] = ()) -> Any:
        """A filter for `rank`; None allows all images.

        Args:
            where: An SQL expression over the columns, such as  camera = 'A3' and hour < 6.
            exclude: Ids to leave out.

        Raises:
            ClipretError: The expression is wrong.
        """

    def rank(
        self, queries: npt.ArrayLike, k: int, allowed: Any = None, min_score: float | None = None
    ) -> tuple[Floats, Ids]:
        """The k best images of each query, best first, ties by id.

        Args:
            queries: Float [Q,D].
            k: Results per query.
            allowed: A result of `filter`.
            min_score: The lowest cosine similarity that is returned.

        Returns:
            Scores, float64 [Q,K], and ids, int64 [Q,K]; -inf and -1 if there are fewer results.

        Raises:
            ClipretError: k is out of range, or a query has another dimension.
        """
        ...

    def records(self, ids: Sequence[int]) -> dict[int, ImageRecord]:
        """Path, size, time and hash of those of the images that exist."""
        ...

    def metadata(self, ids: Sequence[int]) -> dict[int, dict[str, Value]]:
        """All columns of those of the images that exist; None without a value."""
        ...

    def embedding(self, number: int) -> Floats:
        """The stored embedding of an image, float64 [D]. Raises ClipretError if there is no such image."""
        ...

    def ids_of(self, paths: Collection[str]) -> dict[str, int]:
        """The ids of those of the stored paths that exist."""
        ...

    def close(self) -> None:
        """Close files and connections."""
        ...
