"""Tokenizer files for `clipret.text.Tokenizer`: CLIP's own, and one learned from the user's captions."""

import gzip
from collections.abc import Iterable
from pathlib import Path

import regex
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from clipret.errors import ClipretError
from clipret.text import clean

__all__ = ["clip_tokenizer_json", "learn_tokenizer"]

_CLIP_MERGES = 49152 - 256 - 2  # CLIP was trained with the first part of its vocabulary file


def clip_tokenizer_json() -> str:
    """CLIP's byte-level BPE as a Hugging Face `tokenizers` file, for `TextSpec(clean="clip")`.

    Built from the vocabulary that open_clip ships, with start-of-text (49406) and end-of-text (49407, the largest
    id, at which CLIP pools) around each text. Its ids equal those of the open_clip and the `regex` installed here,
    and stay so: the file leans on no other library's Unicode tables.
    """
    from open_clip.tokenizer import default_bpe  # imports torch, which learning a tokenizer can do without

    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode("utf-8").split("\n")
    merges = [(left, right) for left, right in map(str.split, lines[1 : _CLIP_MERGES + 1])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(character + "</w>" for character in alphabet), *(left + right for left, right in merges)]
    start, end = len(tokens), len(tokens) + 1

    # A caption may spell a special token out, and open_clip then takes it for one. Of such a literal the pattern below
    # keeps `t>` or `xt>` only; no other word mixes letters and signs like that, so these merges apply to nothing else.
    tokens += ["t></w>", "xt></w>"]
    merges += [("t", "></w>"), ("x", "t></w>")]

    # open_clip's pattern is matched by `regex` without regard to case, which in lower-cased text matters for ſ alone.
    # Its classes are spelled out because the regex engine of `tokenizers` lags behind in Unicode.
    letters, numbers, others = map(_ranges, [r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]"])
    words = (
        r"<start_of_tex\Kt>|<end_of_te\Kxt>|<ſtart_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d"
        f"|[{letters}]+|[{numbers}]|[{others}]+"
    )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start_of_text> $A <end_of_text>",
        special_tokens=[("<start_of_text>", start), ("<end_of_text>", end)],
    )
    return tokenizer.to_str()


def _ranges(characters: str) -> str:
    """What `regex` matches with `characters`, case ignored, as the inside of a character class."""
    every = "".join(map(chr, range(0x110000)))
    runs = regex.findall(f"{characters}+", every, regex.IGNORECASE)  # neighbours in `every` are consecutive code points
    return "".join(f"\\x{{{ord(run[0]):x}}}-\\x{{{ord(run[-1]):x}}}" for run in runs)


def learn_tokenizer(captions: Iterable[str], vocab_size: int = 8000) -> str:
    """BPE of at most `vocab_size` tokens as a Hugging Face `tokenizers` file, for `TextSpec(clean="lower")`.

    Ids: [PAD] 0, [UNK] 1 (any character that no caption has), then the characters, then what they merge to, most
    frequent first; no start or end token. Words end at blanks, at signs, and around each Chinese character. The same
    captions in any order give the same file.

    BPE rather than Unigram: it keeps English words whole. Chinese stays in single characters as in BERT: merged
    across words, they turn into phrases that hide the colour in them from a pooled text tower (on the
    Chinese captions of Flickr8k single characters were the best of all lengths tried).

    Raises ClipretError when there is no caption, or when the characters alone fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFKC()  # full-width letters and signs are those of ASCII
    words = r"\p{Han}|[[\p{L}\p{M}\p{N}]&&[^\p{Han}]]+|[^\s\p{L}\p{M}\p{N}]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), "removed", invert=True)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator((clean(caption, "lower") for caption in captions), trainer)
    learned = tokenizer.get_vocab_size()
    if learned == len(trainer.special_tokens):
        raise ClipretError("there is no caption to learn a tokenizer from: give captions with at least one word")
    if learned > vocab_size:
        raise ClipretError(
            f"a vocabulary of {vocab_size} cannot hold the {learned - 2} different characters of the captions: "
            f"ask for {2 * learned} or more"
        )
    return tokenizer.to_str()
