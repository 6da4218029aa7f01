"""Hard negative captions: one attribute of a caption is swapped for another that excludes it.

"A red car" becomes "a blue car". The other captions of a batch differ from an image in so many ways that a model does
not have to learn colours, sides or clothing. The idea, and negatives as further columns of the loss, are from
Yuksekgonul et al., When and why vision-language models behave like bags-of-words, 2023.
"""

import functools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Self

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from clipret.errors import ClipretError, one_line
from clipret.schema import checked

__all__ = ["AttributeSwap"]

Word = Annotated[str, Meta(min_length=1)]

_VOCABULARY = "negatives.json"
_EXAMPLE = 'write as {"groups": {"colour": [["maroon", "wine red"]]}, "keep": ["red wine"]}'
_CACHED = 1 << 18  # captions whose attributes are cached: about 100 MB, more than an epoch of most data sets


class _Vocabulary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    groups: dict[str, list[Annotated[list[Word], Meta(min_length=1)]]] = msgspec.field(default_factory=dict)
    keep: list[Word] = msgspec.field(default_factory=list)


@dataclass(frozen=True)
class _Match:
    """An attribute in a caption: where it is, its group and entry, and whether it is a plural."""

    start: int
    end: int
    group: str
    entry: int
    plural: bool


class AttributeSwap:
    """Swaps one attribute of a caption for another of its group.

    Latin words match as whole words in any case, also in the plural. Other words match anywhere, the longest first.

    Args:
        groups: By name, entries that exclude each other. An entry is a list of synonyms; the first is inserted.
        keep: Words in which nothing is swapped, such as 斑马线 (zebra crossing), which is not about a horse.

    Examples:
        >>> swap = AttributeSwap({"colour": [["red"], ["blue", "navy"]]})
        >>> swap("A red car", positives=[], generator=torch.Generator())
        'A blue car'
    """

    def __init__(self, groups: dict[str, list[list[str]]], keep: Collection[str] = ()) -> None:
        self._groups = groups
        # By the word in lower case: its group, the number of its entry, and whether it is a plural
        self._places: dict[str, tuple[str, int, bool]] = {}
        for group, entries in groups.items():
            for number, words in enumerate(entries):
                for word in words:
                    self._places[word.lower()] = (group, number, False)
                    if _is_latin(word):
                        self._places.setdefault(_plural(word).lower(), (group, number, True))
        kept = {form.lower() for word in keep for form in ([word, _plural(word)] if _is_latin(word) else [word])}
        for word in kept:
            self._places.pop(word, None)
        words = sorted({*self._places, *kept}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(_as_pattern, words)), re.IGNORECASE)
        self._find = functools.lru_cache(_CACHED)(self._find_uncached)

    @classmethod
    def read(cls, more: Path | None = None) -> Self:
        """Read the built-in English and Chinese vocabulary, and extend it.

        Args:
            more: A JSON file {"groups": {NAME: [[WORD, SYNONYM, …], …]}, "keep": [WORD, …]}, in the format of
                negatives.json in this package. An entry with a word of an existing entry of its group adds synonyms.
                Other entries and groups are new.

        Raises:
            ClipretError: The file cannot be read or has another format, or a word is in two groups.
        """
        text = (resources.files("clipret_training.data") / _VOCABULARY).read_bytes()
        built_in = msgspec.json.decode(text, type=_Vocabulary)
        groups, keep = built_in.groups, built_in.keep
        if more is not None:
            added = _read(more)
            for name, entries in added.groups.items():
                groups[name] = _merged(groups.get(name, []), entries)
            keep += added.keep
        owner: dict[str, str] = {}
        for name, entries in groups.items():
            for word in {word.lower() for words in entries for word in words}:
                if word in owner:
                    raise ClipretError(f"{more}: {word!r} is in the groups {owner[word]} and {name}: keep it in one")
                owner[word] = name
        return cls(groups, keep)

    def __call__(self, caption: str, positives: Collection[str], generator: torch.Generator) -> str | None:
        """Swap one attribute of a caption, drawn from all possible swaps.

        The new attribute is in none of the positives: for an image with a dog and a cat, neither replaces the other.

        Args:
            caption: A caption of an image.
            positives: All captions of the image.
            generator: A CPU generator.

        Returns:
            A text that is none of the positives, whatever their case and spacing. None if no swap is possible.
        """
        in_positives = {(match.group, match.entry) for text in {caption, *positives} for match in self._find(text)}
        positive_texts = {_plain(text) for text in positives} | {_plain(caption)}
        choices = [
            (match, number)
            for match in self._find(caption)
            for number in range(len(self._groups[match.group]))
            if (match.group, number) not in in_positives
        ]
        for choice in torch.randperm(len(choices), generator=generator).tolist():
            match, number = choices[choice]
            swapped = _swapped(caption, match, self._groups[match.group][number][0])
            if _plain(swapped) not in positive_texts:
                return swapped
        return None

    def attributes(self, captions: Sequence[str]) -> Tensor:
        """Return which attributes captions name, by any of their synonyms.

        These are the `text_attributes` of the `soft` loss. The attributes of an image are `.any(dim=0)` over its
        captions.

        Args:
            captions: N captions.

        Returns:
            bool [N,A], a column for each entry of all groups.
        """
        column = {
            (group, entry): number
            for number, (group, entry) in enumerate(
                (group, entry) for group, entries in self._groups.items() for entry in range(len(entries))
            )
        }
        table = torch.zeros(len(captions), len(column), dtype=torch.bool)
        for row, caption in enumerate(captions):
            for match in self._find(caption):
                table[row, column[match.group, match.entry]] = True
        return table

    def _find_uncached(self, caption: str) -> Sequence[_Match]:
        return tuple(
            _Match(match.start(), match.end(), *self._places[match[0].lower()])
            for match in self._pattern.finditer(caption)
            if match[0].lower() in self._places
        )


def _swapped(caption: str, match: _Match, word: str) -> str:
    """The caption with the new word in the right number and case, and with the right article."""
    before, old = caption[: match.start], caption[match.start : match.end]
    if match.plural:
        word = _plural(word)
    if article := re.search(r"\b(a)n?(\s+)$", before, re.IGNORECASE):
        n = "n" if word[0] in ("AEFHILMNORSX" if word.isupper() else "aeiou") else ""
        before = f"{before[: article.start()]}{article[1]}{n}{article[2]}"
    if old[:1].isupper() and old[1:].islower():
        word = word[:1].upper() + word[1:]
    return before + word + caption[match.end :]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _is_latin(word: str) -> bool:
    return re.match(r"[A-Za-z]", word) is not None


def _as_pattern(word: str) -> str:
    """Matches whole words, in scripts that separate words."""
    return rf"(?<![A-Za-z]){re.escape(word)}(?![A-Za-z])" if _is_latin(word) else re.escape(word)


def _plural(word: str) -> str:
    if word.endswith("man"):
        return f"{word[:-3]}men"
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}es" if re.search(r"(s|x|z|ch|sh)$", word) else f"{word}s"


def _merged(entries: list[list[str]], added: list[list[str]]) -> list[list[str]]:
    merged = [list(words) for words in entries]
    for words in added:
        lower = {word.lower() for word in words}
        synonyms = next((entry for entry in merged if lower & {word.lower() for word in entry}), None)
        if synonyms is None:
            merged.append(list(words))
        else:
            synonyms += [word for word in words if word not in synonyms]
    return merged


def _read(file: Path) -> _Vocabulary:
    try:
        return checked(msgspec.json.decode(file.read_bytes()), _Vocabulary)
    except (OSError, ValueError) as error:
        raise ClipretError(f"vocabulary {file} cannot be read: {one_line(error)}; {_EXAMPLE}") from error
