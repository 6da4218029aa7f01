"""Search over a gallery: embed texts and pictures, mix them where asked, rank all stored rows exactly."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipret.errors import ClipretError
from clipret.gallery.gallery import Gallery, Stored
from clipret.images.decode import PictureFile
from clipret.inference.encoder import Encoder
from clipret.ort.session import has_device
from clipret.ranking.ranker import Ranker
from clipret.sources.source import read_stored

__all__ = ["Forms", "Hit", "Part", "Query", "Searcher"]

Floats = npt.NDArray[np.float64]
Picture = Path | bytes | Image.Image | npt.NDArray[np.uint8]
Forms = Sequence[str] | Callable[[str], Sequence[str]]
"""Templates with a {}, or what gives each text the forms that are embedded in its place."""

_REMEMBERED = 16384  # embedded texts that a searcher keeps: 64 MiB at 512 dimensions


@dataclass(frozen=True)
class Part:
    """A text, or a picture (its path, its file's bytes, a Pillow picture or uint8 [H,W,3]), and its weight in a query.

    A negative weight moves the query away from it.
    """

    content: str | Picture
    weight: float = 1.0


@dataclass(frozen=True)
class Query:
    """A query of several parts: the weighted sum of their unit embeddings, brought to unit length.

    Query((Part("red truck"), Part("fire engine", -0.5))) looks for red trucks that are no fire engines.
    """

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Hit:
    """One picture found: rank from 1, its id and path in the gallery, the cosine of the stored row and the query."""

    rank: int
    id: int
    path: str
    file: Path
    score: float


class Searcher:
    """Searches the rows that the gallery held when they were first needed.

    `templates`: a text is embedded as the mean of its forms in all of them, such as "a photo of a {}."; each form is
    normalised before the mean is taken and the mean after it (Radford et al., Learning Transferable Visual Models
    From Natural Language Supervision, 2021, section 3.1.4). A function gives each text the forms that suit it, such as
    `Prompts.forms`. `resident`: keep codes in memory in the order that makes a single query fastest, for searchers
    that live long. A text is embedded once, however often it is asked for.
    Raises ClipretError when the encoder's bundle is not the one that made the gallery, or a template has no {}.
    """

    def __init__(
        self,
        gallery: Gallery,
        encoder: Encoder,
        *,
        templates: Forms = ("{}",),
        resident: bool = False,
    ) -> None:
        gallery.check(encoder.bundle)
        for template in () if callable(templates) else templates:
            if "{}" not in template:
                raise ClipretError(f"template {template!r} has no {{}}: put one where the text belongs")
        self.gallery = gallery
        self.encoder = encoder
        self.templates = templates if callable(templates) else tuple(templates) or ("{}",)
        self.resident = resident
        self._known = OrderedDict[str, Floats]()

    @cached_property
    def stored(self) -> Stored:
        return self.gallery.read()

    @cached_property
    def ranker(self) -> Ranker:
        stored, encoder = self.stored, self.encoder
        # A TensorRT plan may run the towers where onnxruntime has no CUDA; the order is the same on the CPU.
        device = encoder.devices[0] if has_device(encoder.devices[0]) else "cpu"
        return Ranker(
            stored.shards,
            stored.live,
            stored.codes,
            threads=encoder.threads,
            resident=self.resident and device == "cpu",
            device=device,
        )

    def search(
        self,
        queries: Sequence[str | Query],
        k: int = 10,
        *,
        where: str | None = None,
        exclude: Collection[int] = (),
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        """The k best pictures of each query, best first, ties by id; fewer where fewer are allowed.

        `where`: an SQL expression over the columns of the gallery, such as  camera = 'A3' and hour < 6;  `exclude`: ids
        that are not wanted; `min_score`: the least cosine that counts.
        Raises ClipretError for a blank text, a picture that cannot be decoded, k < 1 or a wrong expression.
        """
        rows = self.embed(queries)
        return self.search_rows(rows, k, where=where, exclude=exclude, min_score=min_score)

    def search_rows(
        self,
        queries: npt.NDArray[np.floating],
        k: int = 10,
        *,
        where: str | None = None,
        exclude: Collection[int] = (),
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        """The same for queries that are embedded already, [Q,D]."""
        return self.hits(*self.ranker.rank(queries, k, among=self.among(where, exclude), min_score=min_score))

    def hits(self, scores: Floats, positions: npt.NDArray[np.int64]) -> list[list[Hit]]:
        """What a ranking, [Q,K] each as `Ranker.rank` returns them, found."""
        used = np.unique(positions[positions >= 0])
        names = dict(zip(used.tolist(), self.gallery.paths(self.stored.ids[used]), strict=True))
        return [
            [
                Hit(rank, int(self.stored.ids[at]), names[at], self.gallery.file(names[at]), score)
                for rank, (at, score) in enumerate(zip(row, row_scores, strict=True), 1)
                if at >= 0
            ]
            for row, row_scores in zip(positions.tolist(), scores.tolist(), strict=True)
        ]

    def among(self, where: str | None = None, exclude: Collection[int] = ()) -> npt.NDArray[np.bool_] | None:
        """Which rows may be found, bool [N]; None for all. Raises ClipretError for a wrong expression."""
        if where is None and not len(exclude):
            return None
        ids = self.stored.ids
        among = np.ones(len(ids), bool) if where is None else np.isin(ids, self.gallery.select(where))
        among &= ~np.isin(ids, np.fromiter(exclude, np.int64, len(exclude)))
        return among

    def embed(self, queries: Sequence[str | Query]) -> Floats:
        """Unit rows float64 [Q,D]. Raises ClipretError as `search` does, and where the parts of a query cancel out."""
        asked = [Query((Part(query),)) if isinstance(query, str) else query for query in queries]
        parts = [part for query in asked for part in query.parts]
        texts = self._embed_texts([part.content for part in parts if isinstance(part.content, str)])
        pictures = iter(self._embed_pictures([part.content for part in parts if not isinstance(part.content, str)]))
        rows = np.zeros((len(asked), self.encoder.bundle.manifest.embedding_dim))
        for row, query in zip(rows, asked, strict=True):
            for part in query.parts:
                row += part.weight * (texts[part.content] if isinstance(part.content, str) else next(pictures))
            length = np.linalg.norm(row)
            if length < 1e-6:
                named = " ".join(f"{part.weight:+g} x {_shown(part.content)}" for part in query.parts)
                raise ClipretError(f"the query {named or 'without parts'} points nowhere: change its parts or weights")
            if len(query.parts) > 1 or query.parts[0].weight != 1:
                row /= length
        return rows

    def _embed_texts(self, texts: Sequence[str]) -> dict[str, Floats]:
        unknown = [text for text in dict.fromkeys(texts) if text not in self._known]
        if unknown:
            blank = next((text for text in unknown if not text.strip()), None)
            if blank is not None:
                raise ClipretError(f"text {blank!r} is blank: leave it out or fill it in")
            forms = [self._forms(text) for text in unknown]
            encoded = self.encoder.encode_texts([form for some in forms for form in some]).astype(np.float64)
            ends = np.cumsum([len(some) for some in forms])
            for text, rows in zip(unknown, np.split(encoded, ends[:-1]), strict=True):
                mean = rows.mean(axis=0)
                self._known[text] = rows[0] if len(rows) == 1 else mean / np.linalg.norm(mean)
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

    def _embed_pictures(self, pictures: Sequence[Picture]) -> list[Floats]:
        rows = list[Floats]()
        if not pictures:
            return rows  # the image tower of a large model takes longer to open than a query by text
        for batch in self.encoder.encode_images(pictures, _read):
            for content, reason in batch.skipped:
                raise ClipretError(f"{_shown(content)} cannot be a query: {reason}")
            rows.extend(batch.rows.astype(np.float64))
        return rows


def _read(picture: Picture) -> Picture | PictureFile:
    """A path may lead into an archive, as those of hits do."""
    return read_stored(picture.parent, picture.name) if isinstance(picture, Path) else picture


def _shown(content: str | Picture) -> str:
    if isinstance(content, str):
        return repr(content)
    return str(content) if isinstance(content, Path) else "the picture"
