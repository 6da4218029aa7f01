"""Export of embeddings to other tools, and import of embeddings computed elsewhere.

Both work block by block, so memory does not grow with the number of embeddings. An import keeps the paths in memory; a
faiss index is built in memory, because faiss cannot build it elsewhere.
"""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from clipret.arrays import Ids
from clipret.errors import ClipretError, require
from clipret.files import sync_folder
from clipret.gallery.embeddings import BLOCK, FINGERPRINT, Embeddings, Record, Value, list_beside
from clipret.gallery.gallery import Gallery, ImageRecord
from clipret.images.walk import ImageError, read_image
from clipret.ranking.embedding_shards import EmbeddingShards
from clipret.tables import OWN_COLUMNS

__all__ = ["ImportReport", "Kind", "export_gallery", "import_embeddings"]

Kind = Literal["parquet", "npy", "faiss"]
Progress = Callable[[Iterable[Any]], Iterable[Any]]

_KINDS: dict[str, Kind] = {".parquet": "parquet", ".npy": "npy", ".faiss": "faiss", ".index": "faiss"}


def export_gallery(
    gallery: Gallery,
    target: Path,
    *,
    kind: Kind | None = None,
    where: str | None = None,
    progress: Progress = lambda blocks: blocks,
) -> int:
    """Write the live embeddings of a gallery, in ascending order of their ids.

    - .parquet: columns id, path, size, mtime_ns, hash, the metadata, and embedding (float32 lists of length D).
    - .npy: float16 [N,D], and TARGET.jsonl, whose line n describes row n with the same columns.
    - .faiss, .index: an exact inner-product index with the gallery's ids (IndexIDMap2 over IndexFlatIP), and
    TARGET.jsonl. It takes 4 N D bytes of memory, here and wherever it is loaded.

    All formats keep every bit of the embeddings.

    Args:
        gallery: The gallery.
        target: The file. An existing one is replaced when the new one is complete.
        kind: The format. Default: by the extension.
        where: An SQL expression as for `Gallery.select`.
        progress: Called with the blocks, such as tqdm.

    Returns:
        The number of embeddings.

    Raises:
        ClipretError: An unknown extension, a missing package, nothing to export, or an error of the disk. The target is
            unchanged then.
    """
    kind = kind or _KINDS.get(target.suffix.lower())
    if kind is None:
        raise ClipretError(f"{target} is of no known kind: end its name in .parquet, .npy or .faiss")
    if target.is_dir():
        raise ClipretError(f"{target} is a folder: name a file")
    source = _Source(gallery, where)
    if not len(source.ids):
        reason = "no images" if where is None else f"no image with {where}"
        raise ClipretError(f"{gallery.path} holds {reason}: nothing to export")
    {"parquet": _write_parquet, "npy": _write_npy, "faiss": _write_faiss}[kind](source, target, progress)
    return len(source.ids)


class _Source:
    """The live embeddings of a gallery for which `where` holds, block by block."""

    def __init__(self, gallery: Gallery, where: str | None) -> None:
        self.gallery = gallery
        stored = gallery.read()
        live = np.ones(len(stored.ids), np.bool_) if stored.live is None else stored.live
        if where is not None:
            live = live & np.isin(stored.ids, gallery.select(where))
        self._positions = np.flatnonzero(live)
        self._rows = EmbeddingShards(stored.shards)
        self.ids: Ids = stored.ids[self._positions]
        self.starts = range(0, len(self.ids), BLOCK)

    def embeddings(self, start: int) -> npt.NDArray[np.float16]:
        return self._rows.take(self._positions[start : start + BLOCK])

    def records(self, start: int) -> list[dict[str, Value]]:
        """What the gallery knows of each image: OWN_COLUMNS, then the metadata."""
        ids = self.ids[start : start + BLOCK]
        records = []
        for number, image, more in zip(ids, self.gallery.images_of(ids), self.gallery.metadata(ids), strict=True):
            own: tuple[Value, ...] = (int(number), image.path, image.size, image.mtime_ns, image.hash)
            records.append(dict(zip(OWN_COLUMNS, own, strict=True)) | more)
        return records


def _write_parquet(source: _Source, target: Path, progress: Progress) -> None:
    pa, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    # float32, though the rows are float16: of halves, polars 1.20 and duckdb 1.1 make a panic and bytes. Split by
    # bytes and compressed, the zeros behind them take no room: 1.76 bytes a value, where halves take 1.89.
    embedding = pa.list_(pa.float32(), source.gallery.info.embedding_dim)
    metadata = _metadata_types(source, pa)
    if "embedding" in metadata:
        raise ClipretError(f"{source.gallery.path} has a metadata column called embedding: export to .npy instead")
    types = {name: pa.int64() if kind is int else pa.string() for name, kind in OWN_COLUMNS.items()}
    schema = pa.schema(
        list({**types, **metadata, "embedding": embedding}.items()),
        metadata={FINGERPRINT: source.gallery.info.fingerprint},
    )
    texts = [name for name, type_ in metadata.items() if type_ == pa.string()]
    with (
        _replacing(target) as (file,),
        parquet.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=texts or False,
            column_encoding={"embedding.list.element": "BYTE_STREAM_SPLIT"},
        ) as writer,
    ):
        for start in progress(source.starts):
            records = source.records(start)
            columns = [pa.array([record.get(name) for record in records], type_) for name, type_ in types.items()]
            for name, type_ in metadata.items():
                values = [record.get(name) for record in records]
                if type_ == pa.string():
                    values = [None if value is None else str(value) for value in values]
                columns.append(pa.array(values, type_))
            flat = pa.array(source.embeddings(start).astype(np.float32).reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, type=embedding))
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _metadata_types(source: _Source, pa: Any) -> dict[str, Any]:
    """The Arrow type of each metadata column: int64 or float64 if all values are such numbers, else string."""
    seen: dict[str, set[type]] = {}
    for start in source.starts:
        for record in source.records(start):
            for name, value in record.items():
                if name not in OWN_COLUMNS:
                    seen.setdefault(name, set()).add(type(value))
    types = {}
    for name, kinds in seen.items():
        kinds.discard(type(None))
        number = pa.float64() if float in kinds else pa.int64()
        types[name] = number if kinds and kinds <= {int, float} else pa.string()
    return types


def _write_npy(source: _Source, target: Path, progress: Progress) -> None:
    shape = (len(source.ids), source.gallery.info.embedding_dim)
    with _replacing(target, list_beside(target)) as (file, lines):
        # Written, not memory-mapped: on a full disk a map is a SIGBUS where a write is an error.
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for start in progress(source.starts):
            file.write(source.embeddings(start).astype("<f2", copy=False).data)
            _write_lines(lines, source.records(start))


def _write_faiss(source: _Source, target: Path, progress: Progress) -> None:
    faiss = require("faiss", "faiss")
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(source.gallery.info.embedding_dim))
    with _replacing(target, list_beside(target)) as (file, lines):
        for start in progress(source.starts):
            index.add_with_ids(source.embeddings(start).astype(np.float32), source.ids[start : start + BLOCK])
            _write_lines(lines, source.records(start))
        # Through a file of ours: faiss's own writer takes no notice when the last bytes find the disk full.
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _write_lines(file: IO[bytes], records: Iterable[Record]) -> None:
    file.writelines(json.dumps(record).encode() + b"\n" for record in records)


@contextlib.contextmanager
def _replacing(*targets: Path) -> Iterator[list[IO[bytes]]]:
    """Yield a new file for each target; all of them replace their targets if the block succeeds, else none."""
    temporary = [target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp") for target in targets]
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in temporary]
            yield list(files)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for path, target in zip(temporary, targets, strict=True):
            path.replace(target)
        sync_folder(targets[0].parent)
    except OSError as error:
        raise ClipretError(
            f"{targets[0]} cannot be written: {error.strerror or error}; choose another place or free space"
        ) from error
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class ImportReport:
    """The result of an import.

    Attributes:
        imported: Number of embeddings.
        replaced: Those of images that the gallery already had.
        normalised: Those that were not of unit length.
        skipped: Path and reason of each embedding that was not imported.
    """

    imported: int
    replaced: int
    normalised: int
    skipped: list[tuple[str, str]]


def import_embeddings(
    gallery: Gallery,
    embeddings: Embeddings,
    *,
    image_root: Path | None = None,
    progress: Progress = lambda blocks: blocks,
) -> ImportReport:
    """Append embeddings that were computed elsewhere, 8,192 per commit.

    They must come from the image tower of the model whose text tower is in the gallery's bundle; no check can tell
    whether they do. They are stored as float16. Embeddings of unit length, up to the rounding of float16, keep every
    bit; others are normalised. An embedding that is zero or not finite, or whose image appeared before, is skipped. An
    image that the gallery already has is replaced.

    Args:
        gallery: The gallery.
        embeddings: From `open_embeddings`.
        image_root: What relative paths start from. Default: the gallery's root. The files are read for the size, time
            and hash that tell later whether an image has changed; an image that cannot be read gets size 0 and an empty
            hash.
        progress: Called with the blocks, such as tqdm.

    Raises:
        ClipretError: Another dimension or bundle than the gallery's, no usable embedding, another writer, or a full
            disk. What was committed by then is kept.
    """
    info = gallery.info
    if embeddings.dimension != info.embedding_dim:
        raise ClipretError(
            f"{embeddings.name} has rows of {embeddings.dimension} values, gallery {gallery.path} of "
            f"{info.embedding_dim}: import what the same model made"
        )
    if embeddings.fingerprint not in (None, info.fingerprint):
        raise ClipretError(
            f"{embeddings.name} comes from another bundle than gallery {gallery.path} (fingerprint "
            f"{embeddings.fingerprint[:12]}…, not {info.fingerprint[:12]}…): import it into a new gallery"
        )
    root = image_root or Path(info.root)
    imported = replaced = normalised = 0
    skipped: list[tuple[str, str]] = []
    seen: set[str] = set()
    with gallery.writing(), ThreadPoolExecutor() as pool:
        for block, records in progress(embeddings.blocks()):
            rows, lengths = _unit(block)
            kept: list[int] = []
            paths: list[str] = []
            for number, record in enumerate(records):
                name = str(record[embeddings.image_column] or "")
                # Addresses of the web have no place below a root, and Path would take one of their slashes.
                stored = name if "://" in name else gallery.stored_path(root / name)
                reason = _reason(name, lengths[number], stored in seen)
                if reason:
                    skipped.append((name, reason))
                else:
                    seen.add(stored)
                    kept.append(number)
                    paths.append(stored)
            chosen = [records[number] for number in kept]
            images = list(pool.map(partial(_identity, gallery), paths, chosen))
            metadata = [_metadata(record, embeddings.image_column) for record in chosen]
            before = len(gallery)
            gallery.append(images, rows[kept], metadata)
            imported += len(kept)
            replaced += len(kept) - (len(gallery) - before)
            normalised += int((~_is_unit(lengths[kept], info.embedding_dim)).sum())
    if not imported:
        name, reason = skipped[0]
        raise ClipretError(f"none of the {len(skipped)} rows could be used; the first: {name}: {reason}")
    return ImportReport(imported, replaced, normalised, skipped)


def _unit(block: npt.NDArray[np.floating[Any]]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float64]]:
    """Embeddings float16 [b,D] of unit length, and their lengths before [b]: 0 or not finite if they have no
    direction."""
    rows = block.astype(np.float64)
    largest = np.abs(rows).max(axis=1)
    usable = np.isfinite(largest) & (largest > 0)
    rows[~usable] = 0
    # Divided first: the squares of what float64 can hold overflow or vanish.
    scaled = rows / np.where(usable, largest, 1)[:, None]
    norms = np.sqrt(np.einsum("nd,nd->n", scaled, scaled))
    lengths = np.where(usable, norms * np.where(usable, largest, 0), largest)
    change = usable & ~_is_unit(lengths, rows.shape[1])
    rows[change] = scaled[change] / norms[change, None]
    return rows.astype(np.float16), lengths


def _is_unit(lengths: npt.NDArray[np.float64], dimension: int) -> npt.NDArray[np.bool_]:
    """Whether embeddings are of unit length but for the rounding of the length and of each value to float16."""
    rounding = (
        2**-11 + math.sqrt(dimension) * 2**-25
    )  # of an embedding of unit length: 2^-11 of a value, 2^-25 of a subnormal one
    return np.abs(lengths - 1) <= 2 * rounding


def _reason(name: str, length: float, again: bool) -> str | None:
    """Why an embedding cannot be imported, or None."""
    if not name:
        return "it names no image"
    if not math.isfinite(length):
        return "its embedding is not finite"
    if not length:
        return "its embedding is zero"
    return "a row before it has the same image" if again else None


def _identity(gallery: Gallery, stored: str, record: Record) -> ImageRecord:
    """The record of an image's file. An exported record saves reading a file that has not changed since, and is used
    for a missing file.
    """
    recorded = None
    if set(OWN_COLUMNS) <= record.keys():
        recorded = ImageRecord(
            stored, int(record["size"] or 0), int(record["mtime_ns"] or 0), str(record["hash"] or "")
        )
    file = gallery.file(stored)
    try:
        status = file.stat()
        if recorded and (recorded.size, recorded.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return recorded
        content = read_image(file)
    except (OSError, ImageError):
        return recorded or ImageRecord(stored, 0, 0, "")
    return ImageRecord(stored, content.size, content.mtime_ns, content.digest)


def _metadata(record: Record, image_column: str) -> dict[str, Value]:
    """The user's columns; an empty field of a text file is no value."""
    own = {image_column, *(OWN_COLUMNS if set(OWN_COLUMNS) <= record.keys() else ())}
    return {name: None if value == "" else value for name, value in record.items() if name not in own}
