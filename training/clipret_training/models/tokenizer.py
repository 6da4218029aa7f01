"""Tokenizer files for `clipret.inference.tokenizer.Tokenizer`: of CLIP, of Chinese-CLIP, or learned from captions."""

import gzip
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import regex
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from clipret.errors import ClipretError
from clipret.inference.tokenizer import clean

__all__ = ["clip_tokenizer_json", "learn_tokenizer", "wordpiece_tokenizer_json"]

_CLIP_MERGES = 49152 - 256 - 2  # CLIP was trained with only the first part of its vocabulary file


def clip_tokenizer_json() -> str:
    """CLIP's byte-level BPE as a Hugging Face `tokenizers` file.

    It is built from the vocabulary of open_clip. Each text is enclosed in start-of-text (49406) and end-of-text (49407,
    the largest id, where CLIP pools). The ids are those of the installed open_clip and `regex`, and do not change
    later: the file does not use the Unicode tables of another library.

    Returns:
        The content of the file, for `TextSpec(clean="clip")`.
    """
    from open_clip.tokenizer import default_bpe  # imports torch, which learning a tokenizer does not need

    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode("utf-8").split("\n")
    merges = [(left, right) for left, right in map(str.split, lines[1 : _CLIP_MERGES + 1])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(character + "</w>" for character in alphabet), *(left + right for left, right in merges)]
    start, end = len(tokens), len(tokens) + 1

    # If a caption spells out a special token, open_clip uses the special token. The pattern below keeps only `t>` or
    # `xt>` of such a literal. No other word mixes letters and signs like that, so these merges apply to nothing else.
    tokens += ["t></w>", "xt></w>"]
    merges += [("t", "></w>"), ("x", "t></w>")]

    # open_clip matches its pattern with `regex` and ignores case, which in lower-cased text matters only for ſ. The
    # character classes are spelled out, because the regex library of `tokenizers` has an older version of Unicode.
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


def wordpiece_tokenizer_json(vocabulary: Sequence[str]) -> str:
    """Chinese-CLIP's WordPiece as a Hugging Face `tokenizers` file.

    The rules are those of BERT's basic tokenizer in lower case, with Chinese-CLIP's limit of 200 characters per word.
    BertNormalizer and BertPreTokenizer of `tokenizers` differ from them: they drop unassigned and private code points,
    and their Unicode tables are older than those of Python.

    Args:
        vocabulary: The tokens by id, with [PAD], [UNK], [CLS] and [SEP].

    Returns:
        The content of the file, for `TextSpec(clean="none")`.

    Raises:
        ClipretError: One of the four special tokens is missing.
    """
    ids = {token: number for number, token in enumerate(vocabulary)}
    if missing := [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in ids]:
        raise ClipretError(f"the vocabulary has no {missing[0]}: use the vocab.txt of a BERT")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=200))
    blank = f"[\\t\\n\\r{_category('Zs')}]"
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(blank), " "),
            normalizers.Replace(Regex(f"[\\x{{fffd}}{_category('Cc', 'Cf')}]"), ""),
            normalizers.Replace(Regex(_final_sigma()), "\u03c2"),
            normalizers.Lowercase(),
            normalizers.NFD(),
            normalizers.Replace(Regex(f"[{_category('Mn')}]"), ""),
        ]
    )
    signs = f"[!-/:-@\\[-`{{-~{_category('Pc', 'Pd', 'Pe', 'Pf', 'Pi', 'Po', 'Ps')}]"
    chinese = "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in _CHINESE)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Where str.split() splits: at blanks, and at two separators that the normalizer keeps
            pre_tokenizers.Split(Regex(r"[ \x{2028}\x{2029}]+"), "removed"),
            pre_tokenizers.Split(Regex(f"[{chinese}]"), "isolated"),
            pre_tokenizers.Split(Regex(signs), "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer.to_str()


# Characters that BERT surrounds with blanks: CJK ideographs, without kana and hangul
_CHINESE = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def _category(*names: str) -> str:
    """The code points of some Unicode categories, by Python's tables, as the inside of a character class."""
    return _runs(
        code for code in range(0x110000) if unicodedata.category(chr(code)) in names and chr(code) not in "\t\n\r"
    )


def _final_sigma() -> str:
    """A pattern for capital sigmas that Python's lower() turns into a final sigma, derived from its results.

    Such a sigma follows a cased letter and does not precede one, regardless of caseless characters in between. A
    Chinese character is not a cased letter, and the vocabulary has both sigmas.
    """
    letters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    cased = {c for c in letters if f"{c}Σ".lower()[-1] == "ς"}
    between = f"[{_runs(ord(c) for c in letters if c not in cased and f'A{c}Σ'.lower()[-1] == 'ς')}]*"
    cased_class = f"[{_runs(sorted(map(ord, cased)))}]"
    return f"{cased_class}{between}\\K\\x{{3a3}}(?!{between}{cased_class})"


def _runs(inside: Iterable[int]) -> str:
    """Ascending code points as the inside of a character class."""
    runs: list[list[int]] = []
    for code in inside:
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in runs)


def _ranges(characters: str) -> str:
    """The code points that `regex` matches with `characters`, ignoring case, as the inside of a character class."""
    unicode = "".join(map(chr, range(0x110000)))
    runs = regex.findall(f"{characters}+", unicode, regex.IGNORECASE)  # neighbours are consecutive code points
    return "".join(f"\\x{{{ord(run[0]):x}}}-\\x{{{ord(run[-1]):x}}}" for run in runs)


def learn_tokenizer(captions: Iterable[str], vocab_size: int = 8000) -> str:
    """Learn a BPE tokenizer from captions, as a Hugging Face `tokenizers` file.

    The ids are [PAD] 0, [UNK] 1 for characters that no caption has, then the characters, then their merges, the most
    frequent first. There is no start or end token. Words end at blanks, at signs, and around each Chinese character.
    The order of the captions does not matter.

    BPE keeps English words whole, Unigram does not. Chinese characters stay separate as in BERT: merged across words,
    they become phrases, in which a text tower with pooling does not see the colour. On the Chinese captions of
    Flickr8k, single characters were the best of all lengths tried.

    Args:
        captions: The captions.
        vocab_size: Maximum number of tokens.

    Returns:
        The content of the file, for `TextSpec(clean="lower")`.

    Raises:
        ClipretError: There is no caption, or the characters alone exceed the vocabulary.
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
            f"use {2 * learned} or more"
        )
    return tokenizer.to_str()
