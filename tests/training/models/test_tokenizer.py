import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HubTokenizer

from clipret.bundle import TextSpec
from clipret.errors import ClipretError
from clipret.inference.tokenizer import Tokenizer, clean
from clipret_training.models.tokenizer import clip_tokenizer_json, learn_tokenizer

Reference = Callable[[list[str]], np.ndarray]


@pytest.fixture(scope="module")
def clip_json() -> str:
    return clip_tokenizer_json()


@pytest.fixture(scope="module")
def clip(clip_json: str) -> Tokenizer:
    return Tokenizer(clip_json, TextSpec(context_length=77, pad_to="context"))


@pytest.fixture(scope="module")
def reference() -> Reference:
    """open_clip's own tokenizer."""
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    return lambda texts: tokenize(texts).numpy()


def test_clip_ids_of_openai(clip_json: str, real_data: Path | None) -> None:
    tokenizer = Tokenizer(clip_json, TextSpec(context_length=200))  # the vectors are not truncated
    assert tokenizer(["a photo of a cat"])[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer(["Hello world!"])[0].tolist() == [49406, 3306, 1002, 256, 49407]
    if real_data is None:
        return
    lines = (real_data / "tokenizers" / "clip_bpe_vectors.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    for vector in map(json.loads, lines):
        assert tokenizer([vector["text"]])[0].tolist() == vector["ids"], vector["text"]


def test_end_of_text_is_the_largest_clip_id(clip_json: str) -> None:
    vocabulary = HubTokenizer.from_str(clip_json).get_vocab()
    assert sorted(vocabulary.values()) == list(range(49408))
    assert Tokenizer(clip_json, TextSpec(context_length=77))(["a"]).tolist() == [[49406, 320, 49407]]


@pytest.mark.parametrize(
    "text",
    [
        "it's IT'S they've I'm we'll he'd don't you're 'S ''s 'ſ",
        "<start_of_text>",
        "a<START_OF_TEXT><end_of_text>b",
        "!<end_of_text> '<start_of_text>",
        "<ſtart_of_text> <start_of_teſt> <start_of_text",
        "<|startoftext|> <|endoftext|> t> xt> <t>",
        "Ⅷ ½ ² 2024 ٣ 1,000.5",
        "e\u0301 \u0301 a\u200bb\u200d\ufeffc \u0345 a\u0345b",
        "&lt;b&gt; &amp;lt; &#x17f; &#xfb06; &#xD800; &copy",
        "Ã©tÃ© â€™ \x1b[31mred\x1b[0m \x00 \ud83d\ude00 \ud800",
        "İstanbul ıI ΣΑΣ Kelvin ß ŐSZ",
        "一只棕色的狗 and 2 cats 在草地上 👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "a" * 500,
        "red car " * 60,
    ],
)
def test_clip_ids_of_open_clip(clip: Tokenizer, reference: Reference, text: str) -> None:
    np.testing.assert_array_equal(clip([text]), reference([text]))


def test_clip_ids_of_open_clip_over_all_of_unicode(clip: Tokenizer, reference: Reference) -> None:
    """Every 61st code point, and all of the scripts that are newer than the regex library of `tokenizers`."""
    points = {*range(1, 0x110000, 61), *range(0x10940, 0x1095A), *range(0x16EA0, 0x16ED4), *range(0x323B0, 0x32400)}
    texts = [f"a{chr(point)}b1{chr(point)}!" for point in sorted(points) if not 0xD800 <= point < 0xE000]
    np.testing.assert_array_equal(clip(texts), reference(texts))


FRAGMENTS = [
    *("<start_of_text>", "<end_of_text>", "<ſtart_of_text>", "<|endoftext|>", "t>", "<", "'", "'s", "'S", "'ſ", "'re"),
    *("&lt;", "&amp;amp;", "&#x17f;", "&nbsp;", "Ã©", "â€™", "\u200b", "\u200d", "\u0301", "\u0345", "\x1c", "\x00"),
    *("dog", "Running", "1", "23", "½", "红色", "轿车", "，", "é", "😀", "İ", "ß", "ﬆ", " ", "\u3000", "!", "_"),
]


@settings(deadline=None, database=None, max_examples=300)
@given(text=st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.characters())).map("".join)))
def test_clip_ids_of_open_clip_for_any_text(clip: Tokenizer, reference: Reference, text: str) -> None:
    if clean(text, "clip"):
        np.testing.assert_array_equal(clip([text]), reference([text]))


COLOURS = {"红色": "red", "蓝色": "blue", "白色": "white", "黑色": "black"}
KINDS = {"轿车": "sedan", "卡车": "truck", "跑车": "Roadster"}
CAPTIONS = [
    caption
    for chinese, english in COLOURS.items()
    for kind, name in KINDS.items()
    for caption in (
        f"一辆{chinese}的{kind}",
        f"{kind}是{chinese}",
        f"{chinese}，{kind}！",
        f"A {english} {name}, parked.",
    )
]


def learned(vocab_size: int = 200) -> HubTokenizer:
    return HubTokenizer.from_str(learn_tokenizer(CAPTIONS, vocab_size))


def test_learned_words() -> None:
    tokenizer = learned()
    assert tokenizer.encode("a white roadster, parked.").tokens == ["a", "white", "roadster", ",", "parked", "."]
    assert tokenizer.encode("白色轿车").tokens == list("白色轿车")
    assert tokenizer.encode("red轿车2024").tokens[:3] == ["red", "轿", "车"]


def test_learned_ids() -> None:
    vocabulary = learned().get_vocab()
    assert (vocabulary["[PAD]"], vocabulary["[UNK]"]) == (0, 1)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert set("".join(CAPTIONS).lower()) - {" ", "，", "！"} <= set(vocabulary)  # the two signs are folded to ASCII


def test_learned_vocabulary_keeps_its_size() -> None:
    assert learned(60).get_vocab_size() == 60
    assert learned(61).get_vocab_size() == 61


@settings(deadline=None, database=None)
@given(text=st.text())
def test_learned_tokenizer_takes_any_text(text: str) -> None:
    tokenizer = Tokenizer(LEARNED, TextSpec(context_length=1000, clean="lower"))
    if clean(text, "lower"):
        ids = tokenizer([text])
        assert ids.size > 0
        assert ids.min() > 0


LEARNED = learn_tokenizer(CAPTIONS, 200)


def test_learned_unknown_characters() -> None:
    tokenizer = Tokenizer(LEARNED, TextSpec(context_length=8, clean="lower"))
    assert tokenizer(["龘😀"]).tolist() == [[1, 1]]


def test_the_same_captions_give_the_same_file_in_any_order_and_process() -> None:
    assert learn_tokenizer(reversed(CAPTIONS), 200) == LEARNED
    program = (
        "import json, sys; from clipret_training.models.tokenizer import learn_tokenizer;"
        "sys.stdout.buffer.write(learn_tokenizer(json.load(sys.stdin), 200).encode())"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(CAPTIONS).encode(),
        env=environment,
        capture_output=True,
        check=True,
    )
    assert run.stdout.decode() == LEARNED


def test_no_captions_are_an_error() -> None:
    with pytest.raises(ClipretError, match="no caption"):
        learn_tokenizer([" "])


def test_a_vocabulary_smaller_than_the_alphabet_is_an_error() -> None:
    with pytest.raises(ClipretError, match="a vocabulary of 30 cannot hold"):
        learn_tokenizer(CAPTIONS, 30)
