"""Shards on disk: immutable numpy files, written under temporary names, synced, renamed."""

import contextlib
import os
import re
import secrets
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError
from clipret.files import sync_folder
from clipret.gallery.database import ShardEntry
from clipret.ranking.quantization import QuantizedEmbeddings

__all__ = ["ids_and_live", "open_quantized", "open_rows", "sweep", "write_shard"]


_OURS = re.compile(r"(rows|codes)-\d{6,}\.npy|((rows|codes)|\..+)\.[0-9a-f]{8}\.tmp")


def write_shard(folder: Path, number: int, embeddings: npt.NDArray[np.float16], quantized: QuantizedEmbeddings) -> None:
    """Write rows-NUMBER.npy and codes-NUMBER.npy; a shard with this number that no database lists is replaced.

    Raises OSError as the disk does, with nothing left behind under a temporary name.
    """
    for kind, array in (("rows", embeddings), ("codes", quantized.values)):
        temporary = folder / f"{kind}.{secrets.token_hex(4)}.tmp"
        try:
            with temporary.open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / _name(kind, number))
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    sync_folder(folder)


def open_rows(folder: Path, entry: ShardEntry) -> npt.NDArray[np.float16]:
    """float16 [n,D], memory-mapped. Raises ClipretError where the file is another than the database says;
    FileNotFoundError where there is none."""
    return _open(folder / _name("rows", entry.number), np.float16, entry, "restore it or index again")


def open_quantized(folder: Path, entry: ShardEntry) -> QuantizedEmbeddings:
    """The quantized embeddings of a shard, memory-mapped. Raises as `open_rows` does."""
    advice = f"restore it with  clipret-search compact {folder}"
    values = _open(folder / _name("codes", entry.number), np.uint8, entry, advice)
    return QuantizedEmbeddings(values, entry.center, entry.scale, entry.residual, entry.reach)


def _open(file: Path, dtype: type[np.generic], entry: ShardEntry, advice: str) -> npt.NDArray[Any]:
    shape = (len(entry.ids), len(entry.center))
    try:
        array: npt.NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise ClipretError(f"{file} cannot be read ({error}): {advice}") from error
    if array.dtype != dtype or array.shape != shape:
        wanted = f"{np.dtype(dtype)} {list(shape)}"
        raise ClipretError(f"{file} holds {array.dtype} {list(array.shape)}, the database says {wanted}: {advice}")
    return array


def ids_and_live(
    entries: Sequence[ShardEntry], deleted: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_] | None]:
    """The id of each embedding through all shards, int64 [N] ascending, and whether it is live, bool [N]; None for
    all."""
    ids = np.concatenate([np.empty(0, np.int64), *(entry.ids for entry in entries)])
    if not len(deleted):
        return ids, None
    live = np.ones(len(ids), np.bool_)
    live[np.searchsorted(ids, deleted)] = False
    return ids, live


def sweep(folder: Path, named: Collection[int]) -> None:
    """Remove the shards that no transaction named and what an interrupted writer left half done. Raises OSError."""
    wanted = {_name(kind, number) for kind in ("rows", "codes") for number in named}
    for file in folder.iterdir():
        # Only what this module or clipret.files writes: a user may keep other things here.
        if _OURS.fullmatch(file.name) and file.name not in wanted:
            with contextlib.suppress(PermissionError):  # Windows, where a search still has it open
                file.unlink(missing_ok=True)


def _name(kind: str, number: int) -> str:
    return f"{kind}-{number:06d}.npy"
