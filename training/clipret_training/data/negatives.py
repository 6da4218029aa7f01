"""Hard negative captions: one attribute of a caption swapped for another that excludes it.

"A red car" becomes "a blue car": all other captions of a batch differ from an image in so much that a model need not
learn colours, sides or clothing to tell them apart (Yuksekgonul et al., When and why vision-language models behave
like bags-of-words, 2023, from whom negatives as further columns of the loss are taken, too).
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
_CACHED = 1 << 18  # captions whose attributes are remembered: some 100 MB, more than an epoch of most sets


class _Vocabulary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    groups: dict[str, list[Annotated[list[Word], Meta(min_length=1)]]] = msgspec.field(default_factory=dict)
    keep: list[Word] = msgspec.field(default_factory=list)


@dataclass(frozen=True)
class _Found:
    """An attribute in a caption: where, the place of its entry, and whether it is a plural."""

    start: int
    end: int
    group: str
    entry: int
    plural: bool


class AttributeSwap:
    """Swaps one attribute of a caption for another of its group.

    groups: by name, entries that exclude each other; an entry is a list of words for the same thing, of which the first
    is put in. keep: words in which nothing is swapped, as 斑马线, which is about no horse. Latin words match as whole
    words in any case, also in the plural; others wherever they stand, the longest first.
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
        """The built-in vocabulary, English and Chinese, and what the JSON file `more` adds to it.

        It has the form of negatives.json next to this file: {"groups": {NAME: [[WORD, SYNONYM, …], …]}, "keep": [WORD,
        …]}. An entry with a word that its group has already adds synonyms; other entries and groups are new. Raises
        ClipretError for a file that cannot be read or looks otherwise, and for a word in two groups.
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
                    raise ClipretError(f"{more}: {word!r} is in the groups {owner[word]} and {name}: leave it in one")
                owner[word] = name
        return cls(groups, keep)

    def __call__(self, caption: str, positives: Collection[str], generator: torch.Generator) -> str | None:
        """`caption` with one attribute swapped, drawn from all that could be; None where there is none.

        positives: all captions of the image. The result is none of them, in whatever case or spacing, and names
        nothing that any of them names: of an image with a dog and a cat neither is swapped for the other.
        """
        named = {(found.group, found.entry) for text in {caption, *positives} for found in self._find(text)}
        taken = {_plain(text) for text in positives} | {_plain(caption)}
        choices = [
            (found, number)
            for found in self._find(caption)
            for number in range(len(self._groups[found.group]))
            if (found.group, number) not in named
        ]
        for place in torch.randperm(len(choices), generator=generator).tolist():
            found, number = choices[place]
            swapped = _swapped(caption, found, self._groups[found.group][number][0])
            if _plain(swapped) not in taken:
                return swapped
        return None

    def attributes(self, captions: Sequence[str]) -> Tensor:
        """bool [N,A]: which of the A entries of all groups each caption names, however it calls them.

        What `soft` of clipret_training.loss wants of texts; of an image it is `.any(dim=0)` over its captions.
        """
        column = {
            (group, entry): number
            for number, (group, entry) in enumerate(
                (group, entry) for group, entries in self._groups.items() for entry in range(len(entries))
            )
        }
        table = torch.zeros(len(captions), len(column), dtype=torch.bool)
        for row, caption in enumerate(captions):
            for found in self._find(caption):
                table[row, column[found.group, found.entry]] = True
        return table

    def _find_uncached(self, caption: str) -> Sequence[_Found]:
        return tuple(
            _Found(match.start(), match.end(), *self._places[match[0].lower()])
            for match in self._pattern.finditer(caption)
            if match[0].lower() in self._places
        )


def _swapped(caption: str, found: _Found, word: str) -> str:
    """With the article, the number and the first capital that fit."""
    before, old = caption[: found.start], caption[found.start : found.end]
    if found.plural:
        word = _plural(word)
    if article := re.search(r"\b(a)n?(\s+)$", before, re.IGNORECASE):
        n = "n" if word[0] in ("AEFHILMNORSX" if word.isupper() else "aeiou") else ""
        before = f"{before[: article.start()]}{article[1]}{n}{article[2]}"
    if old[:1].isupper() and old[1:].islower():
        word = word[:1].upper() + word[1:]
    return before + word + caption[found.end :]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _is_latin(word: str) -> bool:
    return re.match(r"[A-Za-z]", word) is not None


def _as_pattern(word: str) -> str:
    """Whole words, in scripts that separate them."""
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
        same = next((mine for mine in merged if {w.lower() for w in mine} & {w.lower() for w in words}), None)
        if same is None:
            merged.append(list(words))
        else:
            same += [word for word in words if word not in same]
    return merged


def _read(file: Path) -> _Vocabulary:
    try:
        return checked(msgspec.json.decode(file.read_bytes()), _Vocabulary)
    except (OSError, ValueError) as error:
        raise ClipretError(f"vocabulary {file} cannot be read: {one_line(error)}; {_EXAMPLE}") from None
