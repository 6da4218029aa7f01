"""Chinese-CLIP's tokenizer: its published ids, and BERT's rules over Unicode."""

import itertools
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from clipret.bundle import TextSpec
from clipret.inference.tokenizer import Tokenizer
from clipret_training.models.tokenizer import wordpiece_tokenizer_json

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"一辆红色的车", "red", "##s", "!"]


def test_token_ids_of_chinese_clip(real_data: Path | None) -> None:
    tokenizer = Tokenizer(wordpiece_tokenizer_json(WORDS), TextSpec(200, "none"))
    assert tokenizer(["一辆红色的车"])[0].tolist() == [2, 4, 5, 6, 7, 8, 9, 3]
    assert tokenizer(["Reds! 蓝色"])[0].tolist() == [2, 10, 11, 12, 1, 7, 3]
    if real_data is None:
        return
    folder = real_data / "tokenizers"
    vocabulary = (folder / "chinese_clip_vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    tokenizer = Tokenizer(wordpiece_tokenizer_json(vocabulary), TextSpec(200, "none"))
    lines = (folder / "chinese_clip_vectors.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 1000
    for vector in map(json.loads, lines):
        assert tokenizer([vector["text"]])[0].tolist() == vector["ids"], vector["text"]


def basic_tokens(text: str) -> list[str]:
    """BERT's published rules, by Python's own Unicode tables."""

    def chinese_character(c: str) -> bool:
        return any(low <= ord(c) <= high for low, high in CJK)

    kept = [c for c in text if c in "\t\n\r" or (c not in "\0\ufffd" and unicodedata.category(c) not in ("Cc", "Cf"))]
    blanks = [" " if c in "\t\n\r" or unicodedata.category(c) == "Zs" else c for c in kept]
    spaced = "".join(f" {c} " if chinese_character(c) else c for c in blanks)
    tokens: list[str] = []
    for word in spaced.split():
        plain = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn")
        tokens += re.sub(f"([{re.escape(SIGNS)}])", r" \1 ", plain).split()
    return tokens


CJK = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F)]
CJK += [(0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]
SIGNS = "".join(
    chr(c)
    for c in range(0x110000)
    if unicodedata.category(chr(c)).startswith("P") or (33 <= c < 127 and not chr(c).isalnum())
)


@pytest.fixture(scope="module")
def split() -> Callable[[str], list[str]]:
    """Splits a text into words, before they are looked up in the vocabulary."""
    tokenizer = tokenizers.Tokenizer.from_str(wordpiece_tokenizer_json(WORDS[:4]))
    normalizer, cutter = tokenizer.normalizer, tokenizer.pre_tokenizer
    return lambda text: [word for word, _ in cutter.pre_tokenize_str(normalizer.normalize_str(text))]


# Without code points that this Python's Unicode does not have: the tokenizers library may already lower-case them.
@settings(max_examples=400, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12))
def test_words_are_cut_as_bert_cuts_them(split: Callable[[str], list[str]], text: str) -> None:
    assert split(text) == basic_tokens(text)


def test_each_code_point_is_cut_as_bert_cuts_it(split: Callable[[str], list[str]]) -> None:
    for code in (*range(0x3400), *range(0xA000, 0xA800), *range(0xF900, 0x10000), *range(0x2F700, 0x2FA40), 0xE0FFF):
        if unicodedata.category(chr(code)) != "Cn" or code == 0xE0FFF:
            text = f"{chr(code)} a{chr(code)}b"
            assert split(text) == basic_tokens(text), hex(code)


def test_a_final_sigma_is_pythons(split: Callable[[str], list[str]]) -> None:
    """Both sigmas are in the vocabulary, so a wrong one is a wrong id; Chinese texts use them as signs: 求Σ."""
    for length in (1, 2, 3):
        for text in map("".join, itertools.product("ΣAa车ｱʰⅷⒶ'.1\u0301\u200d ", repeat=length)):
            assert split(text) == basic_tokens(text), text


def test_long_words_and_odd_signs() -> None:
    tokenizer = Tokenizer(wordpiece_tokenizer_json(WORDS), TextSpec(52, "none"))
    assert tokenizer(["Reds!车ABC"])[0].tolist() == [
        WORDS.index(token) for token in ("[CLS]", "red", "##s", "!", "车", "[UNK]", "[SEP]")
    ]
    assert tokenizer(["red" + "s" * 197])[0].tolist()[1:3] == [WORDS.index("red"), WORDS.index("##s")]
    assert tokenizer(["red" + "s" * 198])[0].tolist() == [2, 1, 3]  # longer than 200: unknown as a whole
    assert len(tokenizer(["车" * 80])[0]) == 52
    np.testing.assert_array_equal(tokenizer(["車", "车"])[:, 1], [1, WORDS.index("车")])
