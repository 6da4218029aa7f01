"""clipret: exact text-to-image search on the bundles that `clipret-export` writes; never imports torch."""

from clipret.bundle import Bundle, ImageSpec, Manifest, TextSpec
from clipret.encoder import EncodedBatch, Encoder
from clipret.errors import ClipretError
from clipret.gallery import Gallery
from clipret.images import PictureError
from clipret.indexing import IndexReport, index_pictures
from clipret.metrics import Metrics
from clipret.ranker import Ranker
from clipret.search import Hit, Searcher
from clipret.text import Tokenizer

__all__ = [
    "Bundle",
    "ClipretError",
    "EncodedBatch",
    "Encoder",
    "Gallery",
    "Hit",
    "ImageSpec",
    "IndexReport",
    "Manifest",
    "Metrics",
    "PictureError",
    "Ranker",
    "Searcher",
    "TextSpec",
    "Tokenizer",
    "index_pictures",
]
