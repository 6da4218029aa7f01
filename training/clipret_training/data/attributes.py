"""What the attributes that captions name do in a step: swapped they make hard negatives, shared they make soft
labels."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipret.inference.tokenizer import Tokenizer
from clipret_training.annotations import Annotations
from clipret_training.data.negatives import AttributeSwap
from clipret_training.models import LoadedModel

__all__ = ["Attributes"]


class Attributes:
    """The captions of a Listing by the words of `AttributeSwap`'s vocabulary and of the JSON file `more`."""

    def __init__(self, loaded: LoadedModel, annotations: Annotations, more: Path | None) -> None:
        self._swap = AttributeSwap.read(more)
        self._tokenizer = Tokenizer(loaded.tokenizer_json, loaded.text)
        self._captions, self._of_image = annotations.pairs.captions, annotations.pairs.of_image
        self._numbers = {caption: number for number, caption in enumerate(self._captions)}
        self._named: Tensor | None = None

    def negatives(
        self, images: Sequence[int], captions: Tensor, owners: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Each caption with one attribute swapped, where it has one: token ids int64 [N,L]. And their keys, int64
        [N,1]: the number of the caption that such a text happens to be, or -1. `captions` and `owners` as
        `Texts.sample` has them.
        """
        made: dict[str, None] = {}
        for caption, owner in zip(captions.tolist(), owners.tolist(), strict=True):
            right = [self._captions[one] for one in self._of_image[images[owner]]]
            if (swapped := self._swap(self._captions[caption], right, generator)) is not None:
                made[swapped] = None
        if not made:
            return torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1, dtype=torch.int64)
        keys = torch.tensor([[self._numbers.get(text, -1)] for text in made])
        return torch.from_numpy(self._tokenizer(list(made))), keys

    def named(self, images: Sequence[int], captions: Tensor) -> tuple[Tensor, Tensor]:
        """bool [B,A] and [T,A]: which attributes an image's captions name, and each caption."""
        if self._named is None:
            self._named = self._swap.attributes(self._captions)  # [N,A]
        named = self._named
        of_images = [named[list(self._of_image[image])].any(dim=0) for image in images]
        return torch.stack(of_images), named[captions]
