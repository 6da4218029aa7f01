"""What a service writes into a gallery: images that were sent to it, and deletions."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from clipret.arrays import Floats
from clipret.errors import ClipretError
from clipret.files import write_file
from clipret.gallery.gallery import Gallery, ImageRecord
from clipret.images.formats import FORMATS, Format
from clipret.server.limits import ConflictError, NotFoundError
from clipret.sources.item import Value, free_names

__all__ = ["add_images", "remove_image"]


def add_images(
    path: Path | str, name: str, images: Mapping[str, tuple[bytes, Floats]], metadata: Mapping[str, Value]
) -> dict[str, tuple[int, bool]]:
    """Take images into a gallery, all of them or none.

    Args:
        path: The gallery's folder, or milvus+URI, which is refused.
        name: What the service calls it.
        images: The bytes and the embedding, float [D], of each image by the digest of its bytes.
        metadata: What all of them get.

    Returns:
        The id of each image by its digest, and whether it is new.

    Raises:
        ConflictError: It cannot be written.
    """
    names = free_names(list(metadata))
    record = {names[name]: value for name, value in metadata.items()}
    with _writing(path, name) as gallery:
        folder = gallery.path / "added"
        folder.mkdir(exist_ok=True)
        records = dict[str, ImageRecord]()
        for digest, (content, _) in images.items():
            file = folder / f"{digest}{_suffix(content)}"
            if not file.exists():
                write_file(file, content)
            stored = gallery.stored_path(file)
            records[digest] = ImageRecord(stored, len(content), file.stat().st_mtime_ns, digest)
        held = gallery.database.by_path([one.path for one in records.values()])
        new = [digest for digest, one in records.items() if one.path not in held]
        if record:
            gallery.update({number: (one, record) for number, one in held.values()})
        if new:
            rows = np.array([images[digest][1] for digest in new], np.float32)
            gallery.append([records[digest] for digest in new], rows, [record] * len(new) if record else None)
        found = gallery.database.by_path([one.path for one in records.values()])
        return {digest: (found[one.path][0], digest in new) for digest, one in records.items()}


def remove_image(path: Path | str, name: str, number: int) -> None:
    """Delete an image from a gallery, and its file where `add_images` wrote it. Raises NotFoundError, ConflictError."""
    with _writing(path, name) as gallery:
        image = gallery.database.images([number]).get(number)
        if image is None or not gallery.remove([number]):
            raise NotFoundError(f"there is no image {number}")
        file = gallery.file(image.path)
        if file.parent == gallery.path / "added":
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path | str, name: str) -> Iterator[Gallery]:
    """The gallery, with its one lock for writers; what it cannot do is told without its place on disk."""
    try:
        if isinstance(path, str):
            raise ClipretError(f"{name} is changed by clipret-search export: change its gallery, then export")
        with Gallery.open(path) as gallery, gallery.writing():
            yield gallery
    except ClipretError as error:
        raise ConflictError(str(error).replace(str(path), name)) from error
    except OSError as error:
        raise ConflictError(f"{name} cannot be written: {error.strerror}") from error


def _suffix(content: bytes) -> str:
    with Image.open(io.BytesIO(content)) as image:
        known = FORMATS.get(image.format or "", Format())
        return known.extensions[0] if known.media_type else ".img"
