"""Export of a gallery to Milvus: sends new and changed images, deletes others, and nothing else.

What is in Milvus is asked of Milvus, not stored here: an interrupted export is completed by the next one, on any
machine.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipret.arrays import Ids
from clipret.errors import ClipretError
from clipret.gallery.gallery import Gallery, ImageRecord
from clipret.milvus.collection import INDEXES, LITE_INDEXES, RECORD, Address, Collection
from clipret.ranking.embedding_shards import EmbeddingShards
from clipret.sources.item import Value, scalar

__all__ = ["MilvusReport", "export_to_milvus"]

_log = logging.getLogger(__name__)


_BLOCK = 1024  # entities a message: 8 MiB at 2048 dimensions, where servers take 64


@dataclass(frozen=True)
class MilvusReport:
    """The result of an export: entities `sent` (new ones and those with another record), `deleted`, and in all."""

    sent: int
    deleted: int
    total: int


def export_to_milvus(
    gallery: Gallery,
    address: Address,
    *,
    where: str | None = None,
    index: str | None = None,
    parameters: Mapping[str, int] | None = None,
    take_over: bool = False,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda starts: starts,
) -> MilvusReport:
    """Make a collection contain the live images of a gallery for which `where` holds, and no others.

    Args:
        gallery: The gallery.
        address: The collection.
        where: An SQL expression. Default: all images.
        index: FLAT (the default), IVF_FLAT, HNSW and so on. The index of an existing collection is changed.
        parameters: Of the index, such as nlist, M and efConstruction.
        take_over: Let the collection of another gallery belong to this one. A gallery is known by its folder.
        progress: Called with the numbers of the blocks, such as tqdm.

    Raises:
        ClipretError: A collection of another model or gallery, an unknown index, or an error of the server. What was
            sent is kept, and the next export sends the rest.
    """
    collection = Collection(address)
    try:
        return _export(gallery, collection, where, index, parameters or {}, take_over, progress)
    finally:
        collection.close()


def _export(
    gallery: Gallery,
    collection: Collection,
    where: str | None,
    index: str | None,
    parameters: Mapping[str, int],
    take_over: bool,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> MilvusReport:
    address, columns = collection.address, gallery.columns()
    if index is not None and index not in (LITE_INDEXES if address.lite else INDEXES):
        names = ", ".join(LITE_INDEXES if address.lite else INDEXES)
        raise ClipretError(f"{address} has no index {index}: it has {names}")
    clash = next((name for name in columns if name in ("embedding", RECORD)), None)
    if clash is not None:
        raise ClipretError(f"{gallery.path} has a metadata column called {clash}, as Milvus's own: index it otherwise")
    facts = {"fingerprint": gallery.info.fingerprint, "dim": gallery.info.embedding_dim, "gallery": gallery.path}
    facts |= {"root": gallery.info.root, "bundle": gallery.info.bundle, "columns": columns}
    if not collection.there:
        collection.create(gallery.info.embedding_dim, index or "FLAT", parameters, {**facts, "state": "filling"})
    else:
        _check(gallery, collection, take_over)
        if index is not None and index != collection.index():
            collection.change_index(index, parameters)
        before = collection.facts()
        collection.note(**facts, state="filling" if before["state"] == "filling" else "changing")
    stored = gallery.read()
    live = np.ones(len(stored.ids), np.bool_) if stored.live is None else stored.live
    if where is not None:
        live = live & np.isin(stored.ids, gallery.select(where))
    positions, rows = np.flatnonzero(live), EmbeddingShards(stored.shards)
    _log.info("exporting %d embeddings of %s to %s", len(positions), gallery.path, address)
    ids, records = _held(collection)
    sent = 0
    for start in progress(range(0, len(positions), _BLOCK)):
        part = positions[start : start + _BLOCK]
        numbers = stored.ids[part]
        known = zip(numbers.tolist(), gallery.images_of(numbers), gallery.metadata(numbers), strict=True)
        fresh = [
            (at, number, image, metadata, record)
            for at, (number, image, metadata) in enumerate(known)
            if (record := _record(image, metadata)) != _at(ids, records, number)
        ]
        if fresh:
            chosen = rows.take(part[[one[0] for one in fresh]]).astype(np.float32)
            collection.upsert([_entity(row, *one[1:]) for row, one in zip(chosen, fresh, strict=True)])
            sent += len(fresh)
    gone = np.setdiff1d(ids, stored.ids[positions])
    collection.delete(gone.tolist())
    collection.flush()
    collection.note(state="whole", images=len(positions))
    return MilvusReport(sent, len(gone), len(positions))


def _check(gallery: Gallery, collection: Collection, take_over: bool) -> None:
    """Check that a collection belongs to this gallery."""
    facts = collection.facts()
    if facts["fingerprint"] != gallery.info.fingerprint:
        raise ClipretError(
            f"{collection.address} holds rows of another model (fingerprint {facts['fingerprint'][:12]}…, gallery "
            f"{gallery.path} has {gallery.info.fingerprint[:12]}…): name another collection behind #"
        )
    if facts["gallery"] != str(gallery.path) and not take_over:
        raise ClipretError(
            f"{collection.address} holds gallery {facts['gallery']}: name another collection behind #, or pass "
            f"--overwrite to make it hold {gallery.path} and nothing else"
        )


def _held(collection: Collection) -> tuple[Ids, Ids]:
    """The ids in Milvus, ascending, and the record of each."""
    pages = [
        np.array([(one["id"], one[RECORD]) for one in page], np.int64) for page in collection.every(("id", RECORD))
    ]
    table = np.concatenate([np.empty((0, 2), np.int64), *pages])
    table = table[np.argsort(table[:, 0])]
    return table[:, 0], table[:, 1]


def _at(ids: Ids, records: Ids, number: int) -> int | None:
    at = int(np.searchsorted(ids, number))
    return int(records[at]) if at < len(ids) and ids[at] == number else None


def _record(image: ImageRecord, metadata: Mapping[str, Value]) -> int:
    """A number that changes with every field but the embedding, which never changes for an id."""
    said = sorted((name, value) for name, value in _plain(metadata).items() if value is not None)  # of any columns
    known = [image.path, image.size, image.mtime_ns, image.hash, said]
    return int.from_bytes(hashlib.blake2b(json.dumps(known).encode(), digest_size=7).digest(), "big")


def _plain(metadata: Mapping[str, Any]) -> dict[str, Value]:
    return {name: scalar(value) for name, value in metadata.items()}


def _entity(
    row: npt.NDArray[np.float32], number: int, image: ImageRecord, metadata: Mapping[str, Value], record: int
) -> dict[str, Any]:
    # Every column is named: a null takes the place of what an older record had.
    own = {"path": image.path, "size": image.size, "mtime_ns": image.mtime_ns, "hash": image.hash}
    return {"id": number, "embedding": row, **own, RECORD: record, **_plain(metadata)}
