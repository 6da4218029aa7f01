import html
import string
import sys
from pathlib import Path

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import models, pre_tokenizers, processors

from clipret.bundle import FORMAT, Bundle, ImageSpec, Manifest, TextSpec, file_entry
from clipret.errors import ClipretError
from clipret.inference.tokenizer import CleanName, Tokenizer, clean

PAD, UNK, START, END, RED, CAR = range(6)


def tokenizer_json(template: bool = True, padding: bool = False) -> str:
    """Two words, with or without start and end tokens."""
    vocabulary = {"[PAD]": PAD, "[UNK]": UNK, "<s>": START, "</s>": END, "red": RED, "car": CAR}
    tokenizer = HubTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
        )
    if padding:
        tokenizer.enable_padding(length=40, pad_id=UNK, direction="left")
        tokenizer.enable_truncation(3)
    return tokenizer.to_str()


SPEC = TextSpec(context_length=6)


@pytest.mark.parametrize(
    ("text", "clip", "lower"),
    [
        ("  A\tRed\n\n CAR ", "a red car", "a red car"),
        ("red&amp;amp;blue", "red&blue", "red&amp;amp;blue"),
        ("&nbsp;", "", "&nbsp;"),
        ("cafÃ©", "café", "cafã©"),
        ("It’s", "it's", "it’s"),
        ("ＲＥＤ", "red", "ｒｅｄ"),
        ("\u3000红色\u3000轿车 SUV", "红色 轿车 suv", "红色 轿车 suv"),
        ("red\x00\x1ccar", "redcar", "red\x00 car"),
        ("red\ud800", "red\ufffd", "red?"),
        (" \t\n", "", ""),
    ],
)
def test_clean(text: str, clip: str, lower: str) -> None:
    assert clean(text, "clip") == clip
    assert clean(text, "lower") == lower


@pytest.mark.parametrize(
    ("text", "whitespace", "canonicalize", "none"),
    [
        ("  A\tRed\n CAR ", "A Red CAR", "a red car", "  A\tRed\n CAR "),
        ("Isn't it? (a_b-c)", "Isn't it? (a_b-c)", "isnt it a bc", "Isn't it? (a_b-c)"),
        ("red&amp;amp;Blue", "red&Blue", "redblue", "red&amp;amp;Blue"),
        ("cafÃ© — ＲＥＤ。", "café — RED。", "café — red。", "cafÃ© — ＲＥＤ。"),
        ("red\ud800", "red\ufffd", "red\ufffd", "red?"),
        (" \t\n", "", "", " \t\n"),
    ],
)
def test_clean_for_other_tokenizers(text: str, whitespace: str, canonicalize: str, none: str) -> None:
    assert clean(text, "whitespace") == whitespace
    assert clean(text, "canonicalize") == canonicalize
    assert clean(text, "none") == none


@settings(deadline=None, database=None)
@given(st.text("".join(sorted(set(string.printable) - set(string.whitespace) - {"&"})) + " "))
def test_ftfy_does_not_change_the_texts_that_skip_it(text: str) -> None:
    assert html.unescape(ftfy.fix_text(text)) == text


def test_ftfy_is_imported_only_when_a_text_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean("A red <car>, isn't it?", "clip") == "a red <car>, isn't it?"
    assert clean("A red_<car>, isn't it?", "whitespace") == "A red_<car>, isn't it?"
    assert clean("A red_<car>, isn't it?", "canonicalize") == "a red car isnt it"
    assert clean("café &amp;", "lower") == clean("café &amp;", "none") == "café &amp;"
    for text in ("café", "a &amp; b", "a\tb"):
        with pytest.raises(ImportError):
            clean(text, "clip")


def test_pads_to_the_longest_of_the_batch() -> None:
    ids = Tokenizer(tokenizer_json(), SPEC)(["Red CAR", "car", "green red car"])
    assert ids.dtype == np.int64
    assert ids.tolist() == [
        [START, RED, CAR, END, PAD],
        [START, CAR, END, PAD, PAD],
        [START, UNK, RED, CAR, END],
    ]


def test_pads_to_the_context_with_the_pad_id_of_the_spec() -> None:
    ids = Tokenizer(tokenizer_json(), replace(SPEC, pad_to="context", pad_id=9))(["red"])
    assert ids.tolist() == [[START, RED, END, 9, 9, 9]]


@pytest.mark.parametrize("pad_to", ["longest", "context"])
def test_truncates_words_and_keeps_the_end_token(pad_to: str) -> None:
    spec = replace(SPEC, pad_to=pad_to)
    text = "red car car red car car"
    assert Tokenizer(tokenizer_json(), spec)([text]).tolist() == [[START, RED, CAR, CAR, RED, END]]
    assert Tokenizer(tokenizer_json(template=False), spec)([text + " red"]).tolist() == [[RED, CAR, CAR, RED, CAR, CAR]]


def test_the_spec_overrides_padding_and_truncation_of_the_file() -> None:
    assert Tokenizer(tokenizer_json(padding=True), SPEC)(["red car"]).tolist() == [[START, RED, CAR, END]]


def test_no_texts() -> None:
    assert Tokenizer(tokenizer_json(), SPEC)([]).shape == (0, 0)
    assert Tokenizer(tokenizer_json(), replace(SPEC, pad_to="context"))([]).shape == (0, 6)


@pytest.mark.parametrize("blank", ["", " \t", "&nbsp;"])
def test_a_blank_text_is_named(blank: str) -> None:
    with pytest.raises(ClipretError, match=r"texts\[1\] is blank"):
        Tokenizer(tokenizer_json(), SPEC)(["red", blank])


@pytest.mark.parametrize(("how", "blank"), [("canonicalize", "?!"), ("none", " \n"), ("whitespace", "&nbsp;")])
def test_a_text_that_cleaning_leaves_blank_is_quoted_unchanged(how: CleanName, blank: str) -> None:
    with pytest.raises(ClipretError, match=r"texts\[1\] is blank after cleaning") as caught:
        Tokenizer(tokenizer_json(), replace(SPEC, clean=how))(["red", blank])
    assert repr(blank) in str(caught.value)


def test_a_lone_surrogate_does_not_crash() -> None:
    ids = Tokenizer(tokenizer_json(), replace(SPEC, clean="lower"))(["red \udcff"])
    assert ids.tolist() == [[START, RED, UNK, END]]


@pytest.mark.parametrize("text", ["", "{}", "red car"])
def test_an_unusable_file_is_an_error(text: str) -> None:
    with pytest.raises(ClipretError, match="tokenizer file cannot be used"):
        Tokenizer(text, SPEC)


def test_a_context_without_room_for_words_is_an_error() -> None:
    with pytest.raises(ClipretError, match="context length of 2"):
        Tokenizer(tokenizer_json(), TextSpec(context_length=2))
    assert Tokenizer(tokenizer_json(), TextSpec(context_length=3))(["red car"]).tolist() == [[START, RED, END]]


def test_from_bundle(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer_json(), encoding="utf-8")
    manifest = Manifest(
        format=FORMAT,
        model="tiny",
        source="tiny.pt",
        source_sha256="",
        precision="fp32",
        embedding_dim=4,
        logit_scale=1.0,
        image=ImageSpec(size=8),
        text=SPEC,
        files={"tokenizer.json": file_entry(file)},
    )
    (tmp_path / "bundle.json").write_text(manifest.to_json(), encoding="utf-8")
    assert Tokenizer.from_bundle(Bundle.open(tmp_path))(["red"]).tolist() == [[START, RED, END]]

    file.write_text(tokenizer_json(template=False), encoding="utf-8")
    with pytest.raises(ClipretError, match=r"tokenizer\.json"):
        Tokenizer.from_bundle(Bundle.open(tmp_path))
