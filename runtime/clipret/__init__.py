"""clipret: exact text-to-image search on the bundles that `clipret-export` writes; never imports torch."""

import logging
import os
from typing import TYPE_CHECKING, Any

from clipret._faces import lazy_face

# Set before onnxruntime is imported: it would otherwise write a device id to the home folder and send telemetry.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    __version__: str
    from clipret.bundle import Bundle, ImageSpec, Manifest, TextSpec
    from clipret.errors import ClipretError
    from clipret.evaluation.metrics import Metrics
    from clipret.gallery.compaction import compact_gallery
    from clipret.gallery.embeddings import open_embeddings
    from clipret.gallery.gallery import Gallery
    from clipret.gallery.transfer import export_gallery, import_embeddings
    from clipret.images.walk import ImageError
    from clipret.indexing.index import IndexReport, index_images
    from clipret.inference.config import EncoderConfig
    from clipret.inference.encoder import EncodedBatch, Encoder, EncodeStats
    from clipret.inference.tokenizer import Tokenizer
    from clipret.ranking.ranker import Ranker
    from clipret.search.searcher import Hit, Part, Query, Searcher
    from clipret.sources.source import Source, open_source

__all__ = [
    "Bundle",
    "ClipretError",
    "EncodeStats",
    "EncodedBatch",
    "Encoder",
    "EncoderConfig",
    "Gallery",
    "Hit",
    "ImageError",
    "ImageSpec",
    "IndexReport",
    "Manifest",
    "Metrics",
    "Part",
    "Query",
    "Ranker",
    "Searcher",
    "Source",
    "TextSpec",
    "Tokenizer",
    "compact_gallery",
    "export_gallery",
    "import_embeddings",
    "index_images",
    "open_embeddings",
    "open_source",
]

_face = lazy_face(
    __name__,
    {
        "bundle": ["Bundle", "ImageSpec", "Manifest", "TextSpec"],
        "errors": ["ClipretError"],
        "evaluation.metrics": ["Metrics"],
        "gallery.compaction": ["compact_gallery"],
        "gallery.embeddings": ["open_embeddings"],
        "gallery.gallery": ["Gallery"],
        "gallery.transfer": ["export_gallery", "import_embeddings"],
        "images.walk": ["ImageError"],
        "indexing.index": ["IndexReport", "index_images"],
        "inference.config": ["EncoderConfig"],
        "inference.encoder": ["EncodeStats", "EncodedBatch", "Encoder"],
        "inference.tokenizer": ["Tokenizer"],
        "ranking.ranker": ["Ranker"],
        "search.searcher": ["Hit", "Part", "Query", "Searcher"],
        "sources.source": ["Source", "open_source"],
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":  # importlib.metadata takes longer to import than the rest of this module
        from importlib.metadata import version

        return version("clipret")
    return _face(name)
