"""A snapshot of a gallery, ready to be ranked."""

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipret.arrays import Floats, Ids, Mask
from clipret.errors import ClipretError
from clipret.gallery.database import ImageRecord
from clipret.gallery.gallery import Gallery
from clipret.gallery.info import Stored
from clipret.inference.encoder import Encoder
from clipret.ort.session import has_device
from clipret.ranking.embedding_shards import EmbeddingShards
from clipret.ranking.ranker import Ranker
from clipret.sources.item import Value

__all__ = ["GallerySnapshot"]


class GallerySnapshot:
    """The embeddings of a gallery at the time of the first search; a `Searchable`.

    Args:
        gallery: Closed with the snapshot.
        encoder: Of the queries. Its device and threads are used for the ranking, too.
        resident: Keep quantized embeddings in memory, which makes single queries fastest.
    """

    def __init__(self, gallery: Gallery, encoder: Encoder, *, resident: bool = False) -> None:
        self.gallery = gallery
        self._encoder = encoder
        self._resident = resident

    @property
    def name(self) -> str:
        return str(self.gallery.path)

    @property
    def fingerprint(self) -> str:
        return self.gallery.info.fingerprint

    @property
    def root(self) -> Path:
        return Path(self.gallery.info.root)

    @property
    def columns(self) -> list[str]:
        return self._columns

    @cached_property
    def _columns(self) -> list[str]:
        return self.gallery.columns()

    @cached_property
    def stored(self) -> Stored:
        """The shards, ids and quantized embeddings of the snapshot."""
        return self.gallery.read()

    @cached_property
    def ranker(self) -> Ranker:
        """Ranks by positions in `stored`."""
        stored, first = self.stored, self._encoder.devices[0]
        # A TensorRT engine may run the towers where onnxruntime has no CUDA; the order is the same on the CPU.
        device = first if has_device(first) else "cpu"
        return Ranker(
            stored.shards,
            stored.live,
            stored.quantized,
            threads=self._encoder.config.thread_count,
            resident=self._resident and device == "cpu",
            device=device,
        )

    def count(self) -> int:
        return len(self.gallery)

    def filter(self, where: str | None, exclude: Collection[int] = ()) -> Mask | None:
        """Which embeddings may be found, bool [N]."""
        if where is None and not len(exclude):
            return None
        allowed = np.ones(len(self.stored.ids), bool) if where is None else self._mask(where)
        return allowed & ~np.isin(self.stored.ids, np.fromiter(exclude, np.int64, len(exclude)))

    def _mask(self, where: str) -> Mask:
        return np.isin(self.stored.ids, self.gallery.select(where))

    def rank(
        self, queries: npt.ArrayLike, k: int, allowed: Mask | None = None, min_score: float | None = None
    ) -> tuple[Floats, Ids]:
        scores, positions = self.ranker.rank(queries, k, among=allowed, min_score=min_score)
        return scores, self.ids_at(positions)

    def ids_at(self, positions: Ids) -> Ids:
        """The ids at positions in `stored`, -1 for position -1; of any shape."""
        if not len(self.stored.ids):
            return positions
        return np.where(positions >= 0, self.stored.ids[positions], -1)

    def position(self, number: int) -> int:
        """The position of a live image's embedding in `stored`. Raises ClipretError if there is no such image."""
        ids, live = self.stored.ids, self.stored.live
        at = int(np.searchsorted(ids, number))
        if at >= len(ids) or ids[at] != number or (live is not None and not live[at]):
            raise ClipretError(f"there is no image {number}")
        return at

    def records(self, ids: Sequence[int]) -> dict[int, ImageRecord]:
        return dict(zip(ids, self.gallery.images_of(ids), strict=True))

    def metadata(self, ids: Sequence[int]) -> dict[int, dict[str, Value]]:
        return dict(zip(ids, self.gallery.metadata(ids), strict=True))

    def embedding(self, number: int) -> Floats:
        vector: Floats = (
            EmbeddingShards(self.stored.shards).take(np.array([self.position(number)]))[0].astype(np.float64)
        )
        return vector

    def ids_of(self, paths: Collection[str]) -> dict[str, int]:
        return self.gallery.ids_of(paths)

    def close(self) -> None:
        self.gallery.close()
