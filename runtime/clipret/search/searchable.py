"""What can be searched, as the rooms above see it: a snapshot of a gallery, or a collection in Milvus."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from clipret.arrays import Floats, Ids
from clipret.gallery.database import ImageRecord
from clipret.sources.item import Value

__all__ = ["Searchable"]


class Searchable(Protocol):
    """Embeddings that can be ranked, and what is known of their images. An image goes by its id."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """That of the bundle its embeddings come from."""
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
        """How many images there are."""
        ...

    def filter(self, where: str | None, exclude: Collection[int] = ()) -> Any:
        """What `rank` takes as `allowed`; None for all images.

        Args:
            where: An SQL expression over the columns, such as  camera = 'A3' and hour < 6.
            exclude: Ids that are not wanted.

        Raises:
            ClipretError: The expression is wrong.
        """

    def rank(
        self, queries: npt.ArrayLike, k: int, allowed: Any = None, min_score: float | None = None
    ) -> tuple[Floats, Ids]:
        """The k best images of each query, best first, ties by id.

        Args:
            queries: Float [Q,D].
            k: How many images are asked for.
            allowed: What `filter` gave.
            min_score: The least cosine that counts.

        Returns:
            Scores float64 [Q,K] and ids int64 [Q,K]; -inf and -1 where there are fewer.

        Raises:
            ClipretError: k is out of range, or a query is no vector of this model.
        """
        ...

    def records(self, ids: Sequence[int]) -> dict[int, ImageRecord]:
        """Path, size, time and hash of those of these images that are there."""
        ...

    def metadata(self, ids: Sequence[int]) -> dict[int, dict[str, Value]]:
        """Every column of those of these images that are there, None where an image has no value."""
        ...

    def embedding(self, number: int) -> Floats:
        """The stored embedding of an image, float64 [D]. Raises ClipretError where there is no such image."""
        ...

    def ids_of(self, paths: Collection[str]) -> dict[str, int]:
        """The ids of those of these stored paths that are there."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...
