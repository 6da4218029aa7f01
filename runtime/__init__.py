"""clipret: exact text-to-image search on the bundles that `clipret-export` writes; never imports torch."""

import os

# Before anything imports onnxruntime, which otherwise writes a device id into the home folder and reports to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from clipret.bundle import Bundle, ImageSpec, Manifest, TextSpec
from clipret.compaction import compact_gallery
from clipret.embeddings import open_embeddings
from clipret.encoder import EncodedBatch, Encoder, EncodeStats
from clipret.errors import ClipretError
from clipret.gallery import Gallery
from clipret.images import PictureError
from clipret.indexing import IndexReport, index_pictures
from clipret.metrics import Metrics
from clipret.ranker import Ranker
from clipret.search import Hit, Part, Query, Searcher
from clipret.sources import Source, open_source
from clipret.text import Tokenizer
from clipret.transfer import export_gallery, import_embeddings

__all__ = [
    "Bundle",
    "ClipretError",
    "EncodeStats",
    "EncodedBatch",
    "Encoder",
    "Gallery",
    "Hit",
    "ImageSpec",
    "IndexReport",
    "Manifest",
    "Metrics",
    "Part",
    "PictureError",
    "Query",
    "Ranker",
    "Searcher",
    "Source",
    "TextSpec",
    "Tokenizer",
    "compact_gallery",
    "export_gallery",
    "import_embeddings",
    "index_pictures",
    "open_embeddings",
    "open_source",
]
