"""Changes of a gallery by a service: adding uploaded images, and deleting images."""

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
    """Add images to a gallery, all of them or none.

    Args:
        path: The folder of the gallery, or milvus+URI, which is refused.
        name: The name under which it is served.
        images: The bytes and the embedding, float [D], of each image by the digest of its bytes.
        metadata: The metadata of all these images.

    Returns:
        The id of each image by its digest, and whether it is new.

    Raises:
        ConflictError: The gallery cannot be written.
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
            stored_path = gallery.stored_path(file)
            records[digest] = ImageRecord(stored_path, len(content), file.stat().st_mtime_ns, digest)
        present = gallery.database.by_path([image.path for image in records.values()])
        new = [digest for digest, image in records.items() if image.path not in present]
        if record:
            gallery.update({id: (image, record) for id, image in present.values()})
        if new:
            embeddings = np.array([images[digest][1] for digest in new], np.float32)
            gallery.append([records[digest] for digest in new], embeddings, [record] * len(new) if record else None)
        stored = gallery.database.by_path([image.path for image in records.values()])
        return {digest: (stored[image.path][0], digest in new) for digest, image in records.items()}


def remove_image(path: Path | str, name: str, id: int) -> None:
    """Delete an image from a gallery, and its file if `add_images` wrote it.

    Args:
        path: The folder of the gallery, or milvus+URI, which is refused.
        name: The name under which it is served.
        id: The image.

    Raises:
        NotFoundError: The gallery has no such image.
        ConflictError: The gallery cannot be written.
    """
    with _writing(path, name) as gallery:
        image = gallery.database.images([id]).get(id)
        if image is None or not gallery.remove([id]):
            raise NotFoundError(f"there is no image {id}")
        file = gallery.file(image.path)
        if file.parent == gallery.path / "added":
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path | str, name: str) -> Iterator[Gallery]:
    """The gallery, locked for writing. Error messages have its name instead of its path."""
    try:
        if isinstance(path, str):
            raise ClipretError(f"{name} is a Milvus collection: change its gallery, then run clipret-search export")
        with Gallery.open(path) as gallery, gallery.writing():
            yield gallery
    except ClipretError as error:
        raise ConflictError(str(error).replace(str(path), name)) from error
    except OSError as error:
        raise ConflictError(f"{name} cannot be written: {error.strerror}") from error


def _suffix(content: bytes) -> str:
    with Image.open(io.BytesIO(content)) as image:
        format = FORMATS.get(image.format or "", Format())
        return format.extensions[0] if format.media_type else ".img"
