"""What a gallery consists of: its description, its embeddings, and how it names files."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from clipret.arrays import Ids
from clipret.errors import ClipretError
from clipret.ranking.quantization import QuantizedEmbeddings
from clipret.schema import Count, Hash

__all__ = ["GalleryInfo", "Stored", "id_of", "stored_path"]


class GalleryInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of gallery.json.

    Attributes:
        fingerprint: Of the bundle that made the embeddings.
        bundle: Where the bundle was at indexing time. A bundle elsewhere with the same fingerprint is as good.
        flipped: Each embedding is the mean of an image's and its horizontal flip's; "mirrored" in the file.
    """

    format: int
    fingerprint: Hash
    embedding_dim: Count
    root: str
    bundle: str
    bundle_relative: str
    flipped: bool = msgspec.field(default=False, name="mirrored")


@dataclass(frozen=True)
class Stored:
    """The committed embeddings of a gallery.

    Attributes:
        shards: float16 [n,D] each, memory-mapped.
        ids: The id of each embedding through all shards, int64 [N], ascending.
        live: Whether each embedding is live, bool [N]; None if all are.
        quantized: The quantized embeddings of each shard.
    """

    shards: list[npt.NDArray[np.float16]]
    ids: Ids
    live: npt.NDArray[np.bool_] | None
    quantized: list[QuantizedEmbeddings]


def id_of(name: str, root: Path, ids_of: Callable[[Collection[str]], dict[str, int]], owner: str) -> int:
    """The id of an image, by its stored path or its file.

    Args:
        name: Either of the two; a stored path goes first.
        root: What stored paths are relative to.
        ids_of: Gives the ids of those stored paths that are there.
        owner: What holds the images, for messages.

    Raises:
        ClipretError: There is no such image.
    """
    place = stored_path(Path(name), root)
    ids = ids_of((name, place))
    for one in (name, place):
        if one in ids:
            return ids[one]
    raise ClipretError(f"{owner} holds no image {name}: clipret-search query shows how it names them")


def stored_path(file: Path, root: Path) -> str:
    """The stored path of a file: relative to the root if it is below it, else absolute."""
    # abspath takes .. out of it; Path.resolve would follow links out of the root.
    absolute = Path(os.path.abspath(file))  # noqa: PTH100
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else absolute.as_posix()
