"""Compaction: the live embeddings of a gallery in few large shards, without the deleted ones."""

import logging
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from clipret.gallery.database import ShardEntry, name_shard
from clipret.gallery.gallery import Gallery
from clipret.gallery.shards import ids_and_live, write_shard
from clipret.ranking.embedding_shards import EmbeddingShards
from clipret.ranking.quantization import mean, quantize

__all__ = ["compact_gallery"]

_log = logging.getLogger(__name__)

_ROWS = 65536  # 64 MiB a shard at 512 dimensions


def compact_gallery(
    gallery: Gallery, progress: Callable[[Iterable[int]], Iterable[int]] = lambda starts: starts
) -> int:
    """Rewrite the live embeddings, quantized around their own mean, and drop the deleted ones.

    Ids and order stay the same, and so do search results. Open searches continue with their snapshot; one that meets an
    image deleted since must be opened again. Needs disk space for a second copy of the embeddings.

    Args:
        gallery: The gallery.
        progress: Called with the numbers of the blocks, such as tqdm.

    Returns:
        The number of embeddings dropped.

    Raises:
        ClipretError: There is another writer, or the disk refuses. Nothing is changed then.
    """
    with gallery.writing():
        entries, deleted, shards, _ = gallery.consistent(lambda _: None)
        ids, live = ids_and_live(entries, deleted)
        positions, embeddings = np.arange(len(ids)) if live is None else np.flatnonzero(live), EmbeddingShards(shards)
        center, scale, first = _mean_at(embeddings, positions), 0.0, gallery.database.next_shard()
        made: list[ShardEntry] = []
        with gallery.refusable():
            for start in progress(range(0, len(positions), _ROWS)):
                part = positions[start : start + _ROWS]
                stored = embeddings.take(part)
                quantized = quantize(stored, center, scale)
                scale = quantized.scale
                number = first + len(made)
                write_shard(gallery.path, number, stored, quantized)
                made.append(ShardEntry(number, ids[part], center, quantized.scale, quantized.residual, quantized.reach))
            with gallery.database.transaction() as transaction:
                transaction.execute("DELETE FROM shards")
                transaction.execute("DELETE FROM rows WHERE deleted = 1")
                transaction.execute("DELETE FROM metadata WHERE id NOT IN (SELECT id FROM rows)")
                for entry in made:
                    name_shard(transaction, entry)
                    bounds = (entry.number, int(entry.ids[0]), int(entry.ids[-1]))
                    transaction.execute("UPDATE rows SET shard = ? WHERE id BETWEEN ? AND ?", bounds)
        gallery.sweep()
    _log.info("compacted %s: %d embeddings, %d dropped", gallery.path, len(positions), len(ids) - len(positions))
    return len(ids) - len(positions)


def _mean_at(embeddings: EmbeddingShards, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """The mean of the embeddings at ascending positions, a part of them in memory at a time."""
    total = np.zeros(embeddings.shards[0].shape[1] if embeddings.shards else 0)
    for start in range(0, len(positions), _ROWS):
        part = embeddings.take(positions[start : start + _ROWS])
        total += mean(part).astype(np.float64) * len(part)
    return (total / max(len(positions), 1)).astype(np.float32)
