"""What the attributes that titles name do in a step: swapped they make hard negatives, shared they make soft labels."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipret.inference.tokenizer import Tokenizer
from clipret_training.data.negatives import AttributeSwap
from clipret_training.listing import Listing
from clipret_training.models import LoadedModel

__all__ = ["Attributes"]


class Attributes:
    """The titles of a Listing by the words of `AttributeSwap`'s vocabulary and of the JSON file `more`."""

    def __init__(self, loaded: LoadedModel, listing: Listing, more: Path | None) -> None:
        self._swap = AttributeSwap.read(more)
        self._tokenizer = Tokenizer(loaded.tokenizer_json, loaded.text)
        self._titles, self._of_picture = listing.pairs.titles, listing.pairs.of_picture
        self._numbers = {title: number for number, title in enumerate(self._titles)}
        self._named: Tensor | None = None

    def negatives(
        self, pictures: Sequence[int], titles: Tensor, owners: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Each title with one attribute swapped, where it has one: token ids int64 [N,L]. And their keys, int64 [N,1]:
        the number of the title that such a text happens to be, or -1. `titles` and `owners` as `Texts.sample` has them.
        """
        made: dict[str, None] = {}
        for title, owner in zip(titles.tolist(), owners.tolist(), strict=True):
            right = [self._titles[one] for one in self._of_picture[pictures[owner]]]
            if (swapped := self._swap(self._titles[title], right, generator)) is not None:
                made[swapped] = None
        if not made:
            return torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1, dtype=torch.int64)
        keys = torch.tensor([[self._numbers.get(text, -1)] for text in made])
        return torch.from_numpy(self._tokenizer(list(made))), keys

    def named(self, pictures: Sequence[int], titles: Tensor) -> tuple[Tensor, Tensor]:
        """bool [B,A] and [T,A]: which attributes a picture's titles name, and each title."""
        if self._named is None:
            self._named = self._swap.attributes(self._titles)  # [N,A]
        named = self._named
        of_pictures = [named[list(self._of_picture[picture])].any(dim=0) for picture in pictures]
        return torch.stack(of_pictures), named[titles]
