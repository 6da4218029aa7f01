"""Search over a gallery: embed texts and images, mix them where asked, rank all stored embeddings exactly."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipret.arrays import Floats
from clipret.bundle import check_bundle
from clipret.errors import ClipretError
from clipret.gallery.gallery import Gallery, Stored, id_of, stored_path
from clipret.images.walk import ImageFile
from clipret.inference.encoder import Encoder
from clipret.ranking.ranker import Ranker
from clipret.search.searchable import Searchable
from clipret.search.snapshot import GallerySnapshot

__all__ = ["Forms", "Hit", "Part", "Query", "Searcher"]

_log = logging.getLogger(__name__)

ImageInput = Path | bytes | Image.Image | npt.NDArray[np.uint8]
Forms = Sequence[str] | Callable[[str], Sequence[str]]
"""Templates with a {}, or what gives each text the forms that are embedded in its place."""

_REMEMBERED = 16384  # embedded texts that a searcher keeps: 64 MiB at 512 dimensions


@dataclass(frozen=True)
class Part:
    """A text, or an image (its path, its file's bytes, a Pillow image or uint8 [H,W,3]), and its weight in a query.

    A negative weight moves the query away from it.
    """

    content: str | ImageInput
    weight: float = 1.0


@dataclass(frozen=True)
class Query:
    """A query of several parts: the weighted sum of their unit embeddings, brought to unit length.

    Query((Part("red truck"), Part("fire engine", -0.5))) looks for red trucks that are no fire engines.
    """

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Hit:
    """One image found: rank from 1, its id and path in the gallery, the cosine of the stored embedding and the
    query."""

    rank: int
    id: int
    path: str
    file: Path
    score: float


class Searcher:
    """Searches a gallery, as it was when its embeddings were first needed, or a collection in Milvus.

    Args:
        searched: What is searched; closed when the searcher is left as a context.
        encoder: Of the bundle that made the embeddings.
        templates: A text is embedded as the mean of its forms in all of them, such as "a photo of a {}."; each form is
            normalised before the mean is taken and the mean after it (Radford et al., Learning Transferable Visual
            Models From Natural Language Supervision, 2021, section 3.1.4). A function gives each text the forms that
            suit it, such as `Prompts.forms`. A text is embedded once, however often it is asked for.
        resident: Of a gallery, see `GallerySnapshot`; for searchers that live long.

    Raises:
        ClipretError: The encoder's bundle is not the one that made the embeddings, or a template has no {}.
    """

    def __init__(
        self,
        searched: Gallery | Searchable,
        encoder: Encoder,
        *,
        templates: Forms = ("{}",),
        resident: bool = False,
    ) -> None:
        own = GallerySnapshot(searched, encoder, resident=resident) if isinstance(searched, Gallery) else searched
        self.searched: Searchable = own
        check_bundle(encoder.bundle, self.searched.fingerprint, self.searched.name)
        for template in () if callable(templates) else templates:
            if "{}" not in template:
                raise ClipretError(f"template {template!r} has no {{}}: put one where the text belongs")
        self.encoder = encoder
        self.templates = templates if callable(templates) else tuple(templates) or ("{}",)
        self._known = OrderedDict[str, Floats]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.searched.close()

    @property
    def snapshot(self) -> GallerySnapshot:
        """What is searched, where that is a gallery: for what looks at every embedding. Raises ClipretError."""
        if isinstance(self.searched, GallerySnapshot):
            return self.searched
        raise ClipretError(f"{self.searched.name} does not give all of its embeddings: use the gallery itself")

    @property
    def gallery(self) -> Gallery:
        return self.snapshot.gallery

    @property
    def stored(self) -> Stored:
        return self.snapshot.stored

    @property
    def ranker(self) -> Ranker:
        return self.snapshot.ranker

    def search(
        self,
        queries: Sequence[str | Query],
        k: int = 10,
        *,
        where: str | None = None,
        exclude: Collection[int] = (),
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        """The k best images of each query, best first, ties by id; fewer where fewer are allowed.

        `where`: an SQL expression over the columns of the gallery, such as  camera = 'A3' and hour < 6;  `exclude`: ids
        that are not wanted; `min_score`: the least cosine that counts.
        Raises ClipretError for a blank text, an image that cannot be decoded, k < 1 or a wrong expression.
        """
        embeddings = self.embed(queries)
        return self.search_embeddings(embeddings, k, where=where, exclude=exclude, min_score=min_score)

    def search_embeddings(
        self,
        queries: npt.NDArray[np.floating],
        k: int = 10,
        *,
        where: str | None = None,
        exclude: Collection[int] = (),
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        """The same for queries that are embedded already, [Q,D]."""
        began = time.perf_counter()
        scores, ids = self.searched.rank(queries, k, self.searched.filter(where, exclude), min_score)
        milliseconds = 1000 * (time.perf_counter() - began)
        _log.debug("ranked %d queries in %s, k = %d, in %.1f ms", len(queries), self.searched.name, k, milliseconds)
        return self._hits(scores, ids)

    def hits(self, scores: Floats, positions: npt.NDArray[np.int64]) -> list[list[Hit]]:
        """What a ranking, [Q,K] each as `Ranker.rank` returns them, found."""
        return self._hits(scores, self.snapshot.ids_at(positions))

    def _hits(self, scores: Floats, ids: npt.NDArray[np.int64]) -> list[list[Hit]]:
        """Of an image that was deleted between the ranking and this there is no record and no hit."""
        records, root = self.searched.records(np.unique(ids[ids >= 0]).tolist()), self.searched.root
        lines = []
        for line, line_scores in zip(ids.tolist(), scores.tolist(), strict=True):
            there = [(one, score) for one, score in zip(line, line_scores, strict=True) if one in records]
            lines.append(
                [
                    Hit(rank, one, records[one].path, root / records[one].path, score)
                    for rank, (one, score) in enumerate(there, 1)
                ]
            )
        return lines

    def among(self, where: str | None = None, exclude: Collection[int] = ()) -> npt.NDArray[np.bool_] | None:
        """Which embeddings may be found, bool [N]; None for all. Raises ClipretError for a wrong expression."""
        return self.snapshot.filter(where, exclude)

    def find(self, files: Mapping[str, Path]) -> dict[str, tuple[str, int]]:
        """The stored path and the id of the images that names stand for, as far as they are there.

        Args:
            files: Where the file of each name may lie. A name may also be a stored path itself, which goes first.
        """
        places = {name: stored_path(file, self.searched.root) for name, file in files.items()}
        ids = self.searched.ids_of({*places, *places.values()})
        stored = {name: name if name in ids else place for name, place in places.items()}
        return {name: (path, ids[path]) for name, path in stored.items() if path in ids}

    def id_of(self, name: str) -> int:
        """The id of an image, by its stored path or its place on disk. Raises ClipretError for no such one."""
        return id_of(name, self.searched.root, self.searched.ids_of, self.searched.name)

    def embed(self, queries: Sequence[str | Query]) -> Floats:
        """Unit embeddings float64 [Q,D]. Raises ClipretError as `search` does, and where the parts of a query cancel
        out."""
        asked = [Query((Part(query),)) if isinstance(query, str) else query for query in queries]
        parts = [part for query in asked for part in query.parts]
        texts = self._embed_texts([part.content for part in parts if isinstance(part.content, str)])
        images = iter(self._embed_images([part.content for part in parts if not isinstance(part.content, str)]))
        embeddings = np.zeros((len(asked), self.encoder.bundle.manifest.embedding_dim))
        for vector, query in zip(embeddings, asked, strict=True):
            for part in query.parts:
                vector += part.weight * (texts[part.content] if isinstance(part.content, str) else next(images))
            length = np.linalg.norm(vector)
            if length < 1e-6:
                named = " ".join(f"{part.weight:+g} x {_shown(part.content)}" for part in query.parts)
                raise ClipretError(f"the query {named or 'without parts'} points nowhere: change its parts or weights")
            if [part.weight for part in query.parts] != [1]:
                vector /= length
        return embeddings

    def _embed_texts(self, texts: Sequence[str]) -> dict[str, Floats]:
        unknown = [text for text in dict.fromkeys(texts) if text not in self._known]
        if unknown:
            blank = next((text for text in unknown if not text.strip()), None)
            if blank is not None:
                raise ClipretError(f"text {blank!r} is blank: leave it out or fill it in")
            forms = [self._forms(text) for text in unknown]
            encoded = self.encoder.encode_texts([form for some in forms for form in some]).astype(np.float64)
            ends = np.cumsum([len(some) for some in forms])
            for text, embeddings in zip(unknown, np.split(encoded, ends[:-1]), strict=True):
                mean = embeddings.mean(axis=0)
                self._known[text] = embeddings[0] if len(embeddings) == 1 else mean / np.linalg.norm(mean)
        found = {text: self._known[text] for text in texts}
        for text in found:
            self._known.move_to_end(text)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return found

    def _forms(self, text: str) -> Sequence[str]:
        if callable(self.templates):
            return self.templates(text)
        return [template.replace("{}", text) for template in self.templates]

    def _embed_images(self, images: Sequence[ImageInput]) -> list[Floats]:
        embeddings = list[Floats]()
        if not images:
            return embeddings  # the image tower of a large model takes longer to open than a query by text
        for batch in self.encoder.encode_images(images, _read):
            for content, reason in batch.skipped:
                raise ClipretError(f"{_shown(content)} cannot be a query: {reason}")
            embeddings.extend(batch.embeddings.astype(np.float64))
        return embeddings


def _read(image: ImageInput) -> ImageInput | ImageFile:
    """A path may lead into an archive, as those of hits do."""
    if not isinstance(image, Path):
        return image
    from clipret.sources.source import read_stored  # a query by text opens no archives

    return read_stored(image.parent, image.name)


def _shown(content: str | ImageInput) -> str:
    if isinstance(content, str):
        return repr(content)
    return str(content) if isinstance(content, Path) else "the image"
