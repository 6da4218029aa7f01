"""Prompt rules: what a query text becomes before it is embedded, by what it speaks of.

A TOML file (or a JSON file of the same shape) lists rules; the first that fits a text applies to it, and a
text that none fits stays as it is:

    [[rule]]
    name = "vehicle"
    words = ["bus", "sedan", "SUV", "truck"]    # fits a text with any of these words
    strip = ["a", "an", "the", "."]             # taken out wherever they stand as words
    templates = ["an image taken by traffic surveillance cameras of {}", "{}"]

    [[rule]]
    name = "person"                             # neither words nor match: fits every text
    templates = ["a pedestrian: {}"]

`match` in place of `words` is a regular expression that is looked for in the text; neither minds capital letters. The
embeddings of several templates are averaged as unit rows (see clipret.search.searcher.Searcher).
"""

import difflib
import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from clipret.errors import ClipretError

__all__ = ["PromptRule", "Prompts"]

_KEYS = ("name", "words", "match", "strip", "templates")


@dataclass(frozen=True)
class PromptRule:
    """One rule; see the head of this file. `fits` is None for a rule that fits every text."""

    name: str
    fits: re.Pattern[str] | None = None
    strip: re.Pattern[str] | None = None
    templates: tuple[str, ...] = ("{}",)

    def forms(self, text: str) -> list[str]:
        """The texts that are embedded in place of `text`; a text of nothing but words to strip keeps them."""
        bare = " ".join(self.strip.sub(" ", text).split()) if self.strip is not None else text
        return [template.replace("{}", bare or text) for template in self.templates]


@dataclass(frozen=True)
class Prompts:
    """The rules of a file, in their order."""

    rules: tuple[PromptRule, ...] = field(default=())

    @classmethod
    def of_templates(cls, templates: Sequence[str]) -> Self:
        """Every text in all of these templates, each with a {}. Raises ClipretError for one without."""
        for template in templates:
            if "{}" not in template:
                raise ClipretError(f"template {template!r} has no {{}}: put one where the text belongs")
        return cls((PromptRule("all", templates=tuple(templates)),))

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Raises ClipretError for a file that cannot be read and for what is wrong in it, with the rule's name."""
        path = Path(path)
        try:
            text = path.read_bytes().decode("utf-8")
            value = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
        except OSError as error:
            raise ClipretError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # of decoding, JSON and TOML alike
            raise ClipretError(f"{path} is no prompt file: {error}") from None
        rules = value.get("rule") if isinstance(value, dict) else None
        if not isinstance(rules, list) or not rules or set(value) != {"rule"}:
            raise ClipretError(f"{path} is no prompt file: it needs one or more [[rule]] and nothing beside them")
        made = tuple(_rule(path, number, rule) for number, rule in enumerate(rules, 1))
        for before, after in itertools.pairwise(made):
            if before.fits is None:
                raise ClipretError(
                    f"{path}: rule {after.name!r} never applies, since {before.name!r} before it fits every text: "
                    "put it last, or give it words"
                )
        names = [rule.name for rule in made]
        if len(set(names)) < len(names):
            raise ClipretError(f"{path} names two rules alike: its rules are {', '.join(names)}")
        return cls(made)

    def rule(self, text: str) -> PromptRule | None:
        """The rule that applies to a text, or None."""
        return next((rule for rule in self.rules if rule.fits is None or rule.fits.search(text)), None)

    def forms(self, text: str) -> list[str]:
        """The texts that are embedded in place of `text`, one or more."""
        rule = self.rule(text)
        return [text] if rule is None else rule.forms(text)


def _rule(path: Path, number: int, value: Any) -> PromptRule:
    if not isinstance(value, dict):
        raise ClipretError(f"{path}: rule {number} is no table: write [[rule]] before it")
    name = value.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ClipretError(f"{path}: rule {number} has no name: give it one")
    where = f"{path}: rule {name!r}"
    for key in value:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"a rule has {', '.join(_KEYS)}"
            raise ClipretError(f"{where} has a key {key!r}: {hint}")
    if "words" in value and "match" in value:
        raise ClipretError(f"{where} has words and match: keep one of them")
    fits = None
    if "words" in value:
        fits = _any_word(_texts(where, value, "words"))
    elif "match" in value:
        try:
            fits = re.compile(value["match"], re.IGNORECASE)
        except (re.error, TypeError) as error:
            raise ClipretError(f"{where}: match is no regular expression ({error}): mend it") from None
    templates = _texts(where, value, "templates") if "templates" in value else ["{}"]
    for template in templates:
        if "{}" not in template:
            raise ClipretError(f"{where}: template {template!r} has no {{}}: put one where the text belongs")
    strip = _any_word(_texts(where, value, "strip")) if "strip" in value else None
    return PromptRule(name, fits, strip, tuple(templates))


def _texts(where: str, value: Mapping[str, Any], key: str) -> list[str]:
    texts = value[key]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ClipretError(f"{where}: {key} is {texts!r}: make it a list of texts, none of them blank")
    return texts


def _any_word(words: Sequence[str]) -> re.Pattern[str]:
    """Any of the words or phrases, as whole words; Chinese, which puts nothing between words, anywhere."""

    def bounded(word: str) -> str:
        before = r"(?<![A-Za-z0-9_])" if re.match("[A-Za-z0-9_]", word) else ""
        after = r"(?![A-Za-z0-9_])" if re.match("[A-Za-z0-9_]", word[-1]) else ""
        return before + re.escape(word) + after

    # The longest first: of "a" and "a photo of", the second is meant where it stands.
    ordered = sorted((word.strip() for word in words), key=len, reverse=True)
    return re.compile("|".join(map(bounded, ordered)), re.IGNORECASE)
