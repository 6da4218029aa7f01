"""Prompt rules: which applies, what it makes of a text, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from clipret import Bundle, ClipretError, Encoder, EncoderConfig, Gallery, Searcher, index_images
from clipret.search.prompts import Prompts
from clipret.sources.source import open_source

RULES = """
[[rule]]
name = "vehicle"
words = ["bus", "SUV", "轿车"]
strip = ["a", "an", "a photo of", "."]
templates = ["image taken by traffic surveillance cameras, {}", "{}"]
[[rule]]
name = "person"
match = '\\b(wo)?man\\b'
templates = ["pedestrian: {}"]
"""


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    (tmp_path / "prompts.toml").write_text(RULES, encoding="utf-8")
    return Prompts.read(tmp_path / "prompts.toml")


def test_the_first_rule_that_fits_applies(prompts: Prompts) -> None:
    assert prompts.forms("A photo of an orange suv.") == [
        "image taken by traffic surveillance cameras, orange suv",
        "orange suv",
    ]
    assert prompts.forms("a woman next to a suvenir") == ["pedestrian: a woman next to a suvenir"]
    assert prompts.forms("一辆红色轿车")[1] == "一辆红色轿车"
    assert prompts.forms("a business") == ["a business"]  # "bus" is no word of it
    assert prompts.rule("the human") is None


def test_words_to_strip_are_whole_words(prompts: Prompts) -> None:
    assert prompts.forms("a banana, an SUV")[1] == "banana, SUV"
    rule = prompts.rule("a bus")
    assert rule is not None
    assert rule.forms("a")[1] == "a"  # a text never becomes empty


def test_json_says_the_same(tmp_path: Path) -> None:
    rule = {"name": "all", "templates": ["{} at night"]}
    (tmp_path / "prompts.json").write_text(json.dumps({"rule": [rule]}))
    assert Prompts.read(tmp_path / "prompts.json").forms("bus") == ["bus at night"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs one or more"),
        ("rules = 1", "needs one or more"),
        ("[[rule]", "is no prompt file"),
        ("[[rule]]\nwords = ['a']", r"rule\[0\]: missing required field name"),
        ("[[rule]]\nname = 'v'\ntemplate = ['{}']", r"rule\[0\]: contains unknown field template;"),
        ("[[rule]]\nname = 'v'\ntemplates = ['a car']", "has no {}"),
        ("[[rule]]\nname = 'v'\nwords = 'bus'", r"rule\[0\]\.words is 'bus': expected array"),
        ("[[rule]]\nname = 'v'\nstrip = []", r"rule\[0\]\.strip is \[\]: expected array of length >= 1"),
        ("[[rule]]\nname = 'v'\nmatch = '('", "no regular expression"),
        ("[[rule]]\nname = 'v'\nmatch = 'a'\nwords = ['a']", "keep one"),
        ("[[rule]]\nname = 'v'\n[[rule]]\nname = 'w'", "'w' never applies"),
        ("[[rule]]\nname = 'v'\nmatch='a'\n[[rule]]\nname = 'v'", "names two rules alike"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text(text)
    with pytest.raises(ClipretError, match=message):
        Prompts.read(file)
    with pytest.raises(ClipretError, match="cannot be read"):
        Prompts.read(tmp_path / "none.toml")


def test_a_searcher_averages_the_forms_as_unit_rows(
    prompts: Prompts, tiny_bundle: Path, colour_folder: Path, tmp_path: Path
) -> None:
    encoder = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu"))
    source = open_source(colour_folder)
    with Gallery.create(tmp_path / "gallery", encoder.bundle, source.root) as gallery:
        index_images(gallery, encoder, source)
        rows = Searcher(gallery, encoder, templates=prompts.forms).embed(["a red bus", "red"])
    forms = encoder.encode_texts(prompts.forms("a red bus")).astype(np.float64)
    mean = forms.mean(axis=0)
    np.testing.assert_array_equal(rows[0], mean / np.linalg.norm(mean))
    np.testing.assert_array_equal(rows[1], encoder.encode_texts(["red"])[0])
