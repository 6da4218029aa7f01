"""Captions and queries to token ids, according to the bundle's `TextSpec` and `tokenizer.json`."""

import html
import string
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import tokenizers

from clipret.bundle import Bundle, TextSpec
from clipret.errors import ClipretError

__all__ = ["CleanName", "Tokenizer", "clean"]

CleanName = Literal["clip", "whitespace", "canonicalize", "lower", "none"]

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def clean(text: str, how: CleanName) -> str:
    """Clean a text for a tokenizer. All ways except `none` also strip it and collapse its white space.

    - `clip`: repair broken encodings with ftfy, unescape HTML entities twice, lower case, as the SimpleTokenizer of
      OpenAI's CLIP and of open_clip does;
    - `whitespace`: the same without lower case, open_clip's default for tokenizers of the Hugging Face hub;
    - `canonicalize`: as `clip`, without ASCII punctuation, as for SigLIP (big_vision);
    - `lower`: lower case only;
    - `none`: unchanged.

    The last two replace lone surrogates, which no tokenizer accepts, with `?`; ftfy replaces them with U+FFFD.

    Examples:
        >>> clean("A  red car &amp; a blue BIKE", "clip")
        'a red car & a blue bike'
    """
    if how in ("lower", "none"):
        text = text.encode("utf-8", "replace").decode("utf-8")
    # ftfy and unescape do not change printable ASCII without an ampersand, and importing ftfy is slower than a query.
    elif not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if how == "none":
        return text
    if how == "canonicalize":
        text = text.translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


class Tokenizer:
    """Converts texts to token ids.

    Args:
        tokenizer_json: Content of a Hugging Face `tokenizers` file, which decides everything after the cleaning,
            including start and end tokens.
        spec: Cleaning, padding and truncation; these settings of the file are ignored.

    Raises:
        ClipretError: `tokenizer_json` cannot be used, or the context length has no room for words.

    Examples:
        >>> tokenizer = Tokenizer.from_bundle(Bundle.open("bundle/"))  # doctest: +SKIP
        >>> tokenizer(["a red car"]).shape  # doctest: +SKIP
        (1, 5)
    """

    def __init__(self, tokenizer_json: str, spec: TextSpec) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises plain Exception
            raise ClipretError(f"the tokenizer file cannot be used: {error}; export the model again") from error
        added = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if spec.context_length <= added:
            raise ClipretError(
                f"a context length of {spec.context_length} has no room for words in addition to the {added} start and "
                "end tokens: export the model again with a longer one"
            )
        self._tokenizer.no_padding()
        # Truncation keeps the start and end tokens: the last id of a truncated text is still end-of-text.
        self._tokenizer.enable_truncation(spec.context_length)
        self._spec = spec

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Self:
        """Open the tokenizer of a bundle. Raises ClipretError if its file is missing, changed or unusable."""
        return cls(bundle.file("tokenizer.json").read_text(encoding="utf-8"), bundle.manifest.text)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Tokenize texts.

        Args:
            texts: B texts.

        Returns:
            int64 [B,L], L <= context length, each row padded at its end with `spec.pad_id`.

        Raises:
            ClipretError: A text is blank after cleaning; the message has its position.
        """
        cleaned = [clean(text, self._spec.clean) for text in texts]
        for position, text in enumerate(cleaned):
            if not text or text.isspace():
                raise ClipretError(
                    f"texts[{position}] is blank after cleaning ({texts[position]!r}): give it at least one word"
                )
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(cleaned)]
        longest = self._spec.pad_to == "longest"
        length = max(map(len, rows), default=0) if longest else self._spec.context_length
        ids = np.full((len(rows), length), self._spec.pad_id, np.int64)  # [B,L]
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        return ids
