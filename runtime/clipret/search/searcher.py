"""Search over a gallery: encode texts and images, combine them into queries, rank all embeddings exactly."""

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
from clipret.gallery.gallery import Gallery
from clipret.gallery.info import Stored, id_of, stored_path
from clipret.images.walk import ImageFile
from clipret.inference.encoder import Encoder
from clipret.ranking.ranker import Ranker
from clipret.search.searchable import Searchable
from clipret.search.snapshot import GallerySnapshot

__all__ = ["Forms", "Hit", "Part", "Query", "Searcher"]

_log = logging.getLogger(__name__)

ImageInput = Path | bytes | Image.Image | npt.NDArray[np.uint8]
Forms = Sequence[str] | Callable[[str], Sequence[str]]
"""Templates with a {}, or a function from a text to the texts that are encoded in its place."""

_REMEMBERED = 16384  # encoded texts that a searcher caches: 64 MiB at 512 dimensions


@dataclass(frozen=True)
class Part:
    """One part of a query.

    Attributes:
        content: A text, or an image: its path, its file's bytes, a Pillow image or uint8 [H,W,3].
        weight: Its weight; a negative one moves the query away from the content.
    """

    content: str | ImageInput
    weight: float = 1.0


@dataclass(frozen=True)
class Query:
    """A query of several parts: the weighted sum of their embeddings, scaled to unit length.

    Examples:
        >>> query = Query((Part("red truck"), Part("fire engine", -0.5)))  # red trucks that are not fire engines
        >>> [part.weight for part in query.parts]
        [1.0, -0.5]
    """

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        rank: From 1.
        id: Of the image in the gallery.
        path: Its stored path.
        file: Where its file is.
        score: The cosine similarity of its embedding and the query.
    """

    rank: int
    id: int
    path: str
    file: Path
    score: float


class Searcher:
    """Searches a gallery, in its state at the first search, or a Milvus collection.

    A searcher is a context manager, which closes what it searches.

    Args:
        searched: A gallery, or anything else that implements `Searchable`.
        encoder: Of the bundle that made the embeddings.
        templates: Templates such as "a photo of a {}.". A text's embedding is the mean over all templates, normalised
            before and after the mean (Radford et al., Learning Transferable Visual Models From Natural Language
            Supervision, 2021, section 3.1.4). Or a function from a text to its forms, such as `Prompts.forms`. Each
            text is encoded once and cached.
        resident: Keep quantized embeddings in memory, see `GallerySnapshot`; for long-lived searchers of a gallery.

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
                raise ClipretError(f"template {template!r} has no {{}}: put it where the text belongs")
        self.encoder = encoder
        self.templates = templates if callable(templates) else tuple(templates) or ("{}",)
        self._known = OrderedDict[str, Floats]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.searched.close()

    @property
    def snapshot(self) -> GallerySnapshot:
        """The snapshot of the gallery, for methods that need every embedding. Raises ClipretError for Milvus."""
        if isinstance(self.searched, GallerySnapshot):
            return self.searched
        raise ClipretError(f"{self.searched.name} cannot return all embeddings: search the gallery instead")

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
        """The k best images of each query, best first, ties by id.

        Args:
            queries: Texts, or queries of several parts.
            k: Results per query; there are fewer if fewer images are allowed.
            where: An SQL expression over the columns of the gallery, such as  camera = 'A3' and hour < 6.
            exclude: Ids to leave out.
            min_score: The lowest cosine similarity that is returned.

        Returns:
            The results of each query.

        Raises:
            ClipretError: A blank text, an image that cannot be decoded, k < 1 or a wrong expression.
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
        """The same for embeddings of queries, float [Q,D]."""
        began = time.perf_counter()
        scores, ids = self.searched.rank(queries, k, self.searched.filter(where, exclude), min_score)
        milliseconds = 1000 * (time.perf_counter() - began)
        _log.debug("ranked %d queries in %s, k = %d, in %.1f ms", len(queries), self.searched.name, k, milliseconds)
        return self._hits(scores, ids)

    def hits(self, scores: Floats, positions: npt.NDArray[np.int64]) -> list[list[Hit]]:
        """The results of a ranking: scores and positions [Q,K] as `Ranker.rank` returns them."""
        return self._hits(scores, self.snapshot.ids_at(positions))

    def _hits(self, scores: Floats, ids: npt.NDArray[np.int64]) -> list[list[Hit]]:
        """Images that were deleted after the ranking have no record and are left out."""
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
        """The embeddings that a filter allows, bool [N]; None for all. Raises ClipretError for a wrong expression."""
        return self.snapshot.filter(where, exclude)

    def find(self, files: Mapping[str, Path]) -> dict[str, tuple[str, int]]:
        """The stored path and the id of images, for those that the gallery has.

        Args:
            files: The file of each name. A name may also be a stored path, which takes precedence.
        """
        places = {name: stored_path(file, self.searched.root) for name, file in files.items()}
        ids = self.searched.ids_of({*places, *places.values()})
        stored = {name: name if name in ids else place for name, place in places.items()}
        return {name: (path, ids[path]) for name, path in stored.items() if path in ids}

    def id_of(self, name: str) -> int:
        """The id of an image, by its stored path or its file. Raises ClipretError if there is none."""
        return id_of(name, self.searched.root, self.searched.ids_of, self.searched.name)

    def embed(self, queries: Sequence[str | Query]) -> Floats:
        """Embeddings of unit length, float64 [Q,D].

        Raises:
            ClipretError: As `search`, and for a query whose parts cancel out.
        """
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
                raise ClipretError(f"the query {named or 'without parts'} has parts that cancel out: change them")
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
