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
embeddings of several templates are averaged as unit embeddings (see clipret.search.searcher.Searcher).
"""

import itertools
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

import msgspec

from clipret.errors import ClipretError
from clipret.schema import Filled, checked

__all__ = ["PromptRule", "Prompts"]

Texts = Annotated[list[Filled], msgspec.Meta(min_length=1)]


class _Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule as it is written."""

    name: Filled
    words: Texts | None = None
    match: str | None = None
    strip: Texts | None = None
    templates: Texts = msgspec.field(default_factory=lambda: ["{}"])


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rule: Annotated[list[_Rule], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class PromptRule:
    """One rule, see above. `fits` is None for a rule that fits every text."""

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
    """The rules of a file, in order."""

    rules: tuple[PromptRule, ...] = field(default=())

    @classmethod
    def of_templates(cls, templates: Sequence[str]) -> Self:
        """Rules that put every text into all of these templates. Raises ClipretError for one without {}."""
        for template in templates:
            if "{}" not in template:
                raise ClipretError(f"template {template!r} has no {{}}: put one where the text belongs")
        return cls((PromptRule("all", templates=tuple(templates)),))

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a file of rules. Raises ClipretError for a file that cannot be read, and for a mistake in it, with the
        rule's name.
        """
        path = Path(path)
        try:
            text = path.read_bytes().decode("utf-8")
            value = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
        except OSError as error:
            raise ClipretError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # of decoding, JSON and TOML alike
            raise ClipretError(f"{path} is no prompt file: {error}") from error
        try:
            made = tuple(_compiled(path, rule) for rule in checked(value, _File).rule)
        except ValueError as error:
            raise ClipretError(f"{path} is no prompt file: {error}; it needs one or more [[rule]]") from error
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
        """The texts that are encoded in place of `text`, one or more."""
        rule = self.rule(text)
        return [text] if rule is None else rule.forms(text)


def _compiled(path: Path, rule: _Rule) -> PromptRule:
    where = f"{path}: rule {rule.name!r}"
    fits = None
    if rule.words is not None and rule.match is not None:
        raise ClipretError(f"{where} has words and match: keep one of them")
    if rule.words is not None:
        fits = _any_word(rule.words)
    elif rule.match is not None:
        try:
            fits = re.compile(rule.match, re.IGNORECASE)
        except re.error as error:
            raise ClipretError(f"{where}: match is no regular expression ({error}): correct it") from error
    for template in rule.templates:
        if "{}" not in template:
            raise ClipretError(f"{where}: template {template!r} has no {{}}: put one where the text belongs")
    strip = None if rule.strip is None else _any_word(rule.strip)
    return PromptRule(rule.name, fits, strip, tuple(rule.templates))


def _any_word(words: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the words or phrases, as whole words; Chinese, which has no spaces, anywhere."""

    def bounded(word: str) -> str:
        before = r"(?<![A-Za-z0-9_])" if re.match("[A-Za-z0-9_]", word) else ""
        after = r"(?![A-Za-z0-9_])" if re.match("[A-Za-z0-9_]", word[-1]) else ""
        return before + re.escape(word) + after

    # The longest first: of "a" and "a photo of", the second is meant where it stands.
    ordered = sorted((word.strip() for word in words), key=len, reverse=True)
    return re.compile("|".join(map(bounded, ordered)), re.IGNORECASE)
