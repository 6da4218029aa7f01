"""Tokenizers of open_clip, its own and those of the Hugging Face hub, as a file for clipret's `Tokenizer`."""

import json
from typing import Any

import tokenizers
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer, get_clean_fn

from clipret.bundle import TextSpec
from clipret.inference.tokenizer import CleanName, Tokenizer
from clipret_training.models.tokenizer import clip_tokenizer_json

__all__ = ["PROBES", "tokenizer_file"]

# Texts that check every conversion: case, punctuation, digits, scripts, entities, a text longer than any context.
PROBES = (
    "a red car",
    "Two Dogs, one CAT & 3 birds; isn't it? (1,234.56)",
    "  tab\tand\nnew line  ",
    "rock &amp;amp; roll &lt;3",
    "café naïve Straße İstanbul",
    "一辆红色的车停在路边",
    "красная машина на дороге",
    "赤い車 ＦＵＬＬ １２",
    "\U0001f697 a car emoji, 👩‍👩‍👧 and a family",
    "snake_case e-mail@example.org #tag http://example.org/a?b=c",
    "a photo of a very long street " * 40,
)


def tokenizer_file(tokenizer: Any) -> tuple[str, TextSpec]:
    """Convert a tokenizer of open_clip.

    Args:
        tokenizer: The tokenizer that open_clip.get_tokenizer returned.

    Returns:
        The content of a `tokenizers` file, and a TextSpec that pads to the context length. Together they give the same
        ids.

    Raises:
        ValueError: The tokenizer is not supported, or the converted one gives other ids.
    """
    if isinstance(tokenizer, SimpleTokenizer):
        converted, pad_id = _simple(tokenizer), 0
    elif isinstance(tokenizer, HFTokenizer | SigLipTokenizer):
        converted, pad_id = _hub(tokenizer)
    else:
        raise ValueError(f"it is a {type(tokenizer).__name__}, which is not supported")
    if tokenizer.context_length is None:
        raise ValueError("it has no context length")
    spec = TextSpec(tokenizer.context_length, _clean_name(tokenizer), "context", pad_id)
    ours = Tokenizer(converted, spec)
    for text in PROBES:
        if ours([text]).tolist() != tokenizer([text]).tolist():
            raise ValueError(f"its conversion gives other ids than open_clip for {text[:40]!r}")
    return converted, spec


def _clean_name(tokenizer: Any) -> CleanName:
    if isinstance(tokenizer, SigLipTokenizer):
        return "canonicalize"
    names: dict[str, CleanName] = {"lower": "clip", "whitespace": "whitespace", "canonicalize": "canonicalize"}
    return next(ours for theirs, ours in names.items() if tokenizer.clean_fn is get_clean_fn(theirs))


def _simple(tokenizer: SimpleTokenizer) -> str:
    if tokenizer.reduction_fn is not None:
        raise ValueError("it drops words at random (reduction_mask), which only training may do")
    if len(tokenizer.all_special_ids) > 2:
        raise ValueError("it has additional special tokens, which are not supported")
    if tokenizer.clean_fn is get_clean_fn("whitespace"):
        raise ValueError("it is CLIP's tokenizer without lower-casing, which is not supported")
    return clip_tokenizer_json()


def _hub(tokenizer: HFTokenizer | SigLipTokenizer) -> tuple[str, int]:
    """The file and the padding id of a tokenizer of transformers."""
    inner = tokenizer.tokenizer
    if mode := getattr(tokenizer, "tokenizer_mode", ""):
        raise ValueError(f"it has the mode {mode!r}, which is not supported")
    if not inner.is_fast:
        raise ValueError(f"it is a {type(inner).__name__}, which has no tokenizer.json: choose a fast tokenizer")
    sides = (inner.padding_side, inner.truncation_side)
    if sides != ("right", "right"):
        raise ValueError(f"it pads and truncates on the {' and '.join(sides)}: only the right is supported")
    if inner.pad_token_id is None:
        raise ValueError("it has no pad token: name one in its tokenizer_config.json")
    if getattr(inner, "split_special_tokens", False):
        raise ValueError("it splits special tokens, which is not supported")
    plain = tokenizers.Tokenizer.from_str(inner.backend_tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()
    if not getattr(tokenizer, "strip_sep_token", False):
        return plain.to_str(), inner.pad_token_id
    pad_id = 0 if inner.pad_token_id == inner.sep_token_id else inner.pad_token_id
    return _renumber(plain.to_str(), inner.sep_token_id, 0), pad_id


def _renumber(tokenizer_json: str, old: int, new: int) -> str:
    """The same tokenizer with the id `new` instead of `old`; another token may have the id `new` as well.

    CLIPA was trained with zeros in place of [SEP] (strip_sep_token in open_clip), even where a text spells it out.
    """
    value = json.loads(tokenizer_json)
    vocabulary = value["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        raise ValueError("it strips separators from a Unigram vocabulary, which is not supported")
    value["model"]["vocab"] = {token: new if number == old else number for token, number in vocabulary.items()}
    for token in value["added_tokens"]:
        token["id"] = new if token["id"] == old else token["id"]
    value["post_processor"] = _replaced(value["post_processor"], old, new)
    return json.dumps(value, ensure_ascii=False)


def _replaced(value: Any, old: int, new: int) -> Any:
    """JSON with one integer replaced. In a post-processor, all integers are token ids, except for unused type ids."""
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return new if value == old and isinstance(value, int) and not isinstance(value, bool) else value
