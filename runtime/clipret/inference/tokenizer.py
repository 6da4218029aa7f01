"""Captions and queries to token ids, as the bundle's `TextSpec` and `tokenizer.json` say."""

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
    """`text` as a tokenizer wants it, with single blanks and none at its ends except for `none`.

    - `clip`: broken encodings repaired with ftfy, HTML entities resolved twice, lower case, as the SimpleTokenizer of
      OpenAI's CLIP and of open_clip does;
    - `whitespace`: the same with the case kept, open_clip's default for tokenizers of the Hugging Face hub;
    - `canonicalize`: the same in lower case without ASCII punctuation, as SigLIP's texts (big_vision);
    - `lower`: lower case only;
    - `none`: as it is.

    The last two replace lone surrogates, which no tokenizer takes, by `?`; ftfy makes them U+FFFD.
    """
    if how in ("lower", "none"):
        text = text.encode("utf-8", "replace").decode("utf-8")
    # Neither ftfy nor unescape changes printable ASCII without an ampersand, and the import of ftfy outlasts a query.
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
    """Texts to ids. `tokenizer_json` is the content of a Hugging Face `tokenizers` file, which decides everything after
    the cleaning, start and end tokens included; padding and truncation come from `spec`, whatever the file says.

    Raises ClipretError when `tokenizer_json` cannot be used.
    """

    def __init__(self, tokenizer_json: str, spec: TextSpec) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises plain Exception
            raise ClipretError(f"the tokenizer file cannot be used: {error}; export the model again") from None
        added = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if spec.context_length <= added:
            raise ClipretError(
                f"a context length of {spec.context_length} leaves no room for words beside the {added} start and end "
                "tokens: export the model again with a longer one"
            )
        self._tokenizer.no_padding()
        # Words are cut, start and end tokens are not: the last id of a truncated text is still end-of-text.
        self._tokenizer.enable_truncation(spec.context_length)
        self._spec = spec

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Self:
        """The tokenizer of a bundle. Raises ClipretError when its file is missing, changed or unusable."""
        return cls(bundle.file("tokenizer.json").read_text(encoding="utf-8"), bundle.manifest.text)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [B,L] for B texts, L <= context length, each row filled up with `spec.pad_id` at its end.

        Raises ClipretError that names the position of a text that is blank after cleaning.
        """
        cleaned = [clean(text, self._spec.clean) for text in texts]
        for position, text in enumerate(cleaned):
            if not text or text.isspace():
                raise ClipretError(
                    f"texts[{position}] is blank once cleaned ({texts[position]!r}): give it at least one word"
                )
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(cleaned)]
        longest = self._spec.pad_to == "longest"
        length = max(map(len, rows), default=0) if longest else self._spec.context_length
        ids = np.full((len(rows), length), self._spec.pad_id, np.int64)  # [B,L]
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        return ids
