"""Flip averaging: a gallery whose rows are the mean of each picture and its mirror image.

A caption seldom says left or right, so what a tower makes of the mirror image is a second opinion on the same picture;
the mean of the two is a little better than either where the training mirrored pictures at random or saw few of them.
It looks at nothing but the picture. It costs one more pass of the image tower, once, and nothing at search time.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError
from clipret.gallery.gallery import Gallery
from clipret.images.decode import PictureError, load
from clipret.inference.encoder import Encoder
from clipret.ranking.rows import StoredRows
from clipret.sources.source import read_stored

__all__ = ["mirror_gallery"]

_ROWS = 4096  # pictures a commit


def mirror_gallery(
    gallery: Gallery,
    out: Path,
    encoder: Encoder,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda starts: starts,
) -> tuple[int, list[tuple[str, str]]]:
    """Make the gallery `out` from every picture of `gallery`, or go on with one that an earlier call began.

    A row is the unit mean of the stored row and that of the picture mirrored as the tower sees it. Returns how many
    pictures were added, and those left out with the reason. Raises ClipretError when `encoder` is of another bundle
    or `out` is a gallery of other pictures.
    """
    gallery.check(encoder.bundle)
    if gallery.info.mirrored:
        raise ClipretError(f"{gallery.path} is mirrored already: name the gallery that it was made from")
    root = Path(gallery.info.root)
    if (out / "gallery.json").is_file():
        made = Gallery.open(out)
        made.check(encoder.bundle)
        if not made.info.mirrored:
            raise ClipretError(f"{out} holds pictures as they are, without their mirror images: choose a new folder")
        if made.info.root != gallery.info.root:
            raise ClipretError(f"{out} holds pictures of {made.info.root}, not of {root}: choose a new folder")
    else:
        made = Gallery.create(out, encoder.bundle, root, mirrored=True)
    stored = gallery.read()
    positions = np.arange(len(stored.ids)) if stored.live is None else np.flatnonzero(stored.live)
    rows, spec = StoredRows(stored.shards), encoder.bundle.manifest.image
    skipped: list[tuple[str, str]] = []
    added = 0

    def mirrored(at: int) -> npt.NDArray[np.uint8]:
        file = read_stored(root, pictures[at].path)
        if file.digest != pictures[at].hash:
            raise PictureError("it has changed since it was indexed: index again")
        return np.ascontiguousarray(load(file.content, spec)[:, ::-1])

    with made, made.writing():
        for start in progress(range(0, len(positions), _ROWS)):
            part = positions[start : start + _ROWS]
            ids = stored.ids[part]
            pictures = gallery.pictures_of(ids)
            # Those of other bytes than before are made anew, as indexing does.
            known = made.database.by_path([picture.path for picture in pictures])
            todo = [at for at, one in enumerate(pictures) if one.path not in known or known[one.path][1] != one]
            if not todo:
                continue
            kept: list[int] = []
            means: list[npt.NDArray[np.float32]] = []
            own = rows.take(part).astype(np.float32)
            for batch in encoder.encode_images(todo, mirrored):
                skipped += [(pictures[at].path, reason) for at, reason in batch.skipped]
                mean = own[batch.items] + batch.rows
                kept += batch.items
                means.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
            if kept:
                made.append([pictures[at] for at in kept], np.concatenate(means), gallery.metadata(ids[kept]))
                added += len(kept)
    return added, skipped
