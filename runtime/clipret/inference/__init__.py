"""From a bundle to embeddings: tokenizer, towers, decode threads."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.inference.config import EncoderConfig
    from clipret.inference.encoder import Encoder
    from clipret.inference.tokenizer import Tokenizer

__all__ = ["Encoder", "EncoderConfig", "Tokenizer"]

__getattr__ = lazy_face(__name__, {"config": ["EncoderConfig"], "encoder": ["Encoder"], "tokenizer": ["Tokenizer"]})
