"""The attributes that captions name: swapped they become hard negatives, shared they become soft labels."""

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
    """The attributes in the captions of a training.

    Args:
        loaded: The model, whose tokenizer is used.
        annotations: The images and captions.
        more: A JSON file that extends the vocabulary of `AttributeSwap`, None for the built-in one.

    Raises:
        ClipretError: The file cannot be read.
    """

    def __init__(self, loaded: LoadedModel, annotations: Annotations, more: Path | None) -> None:
        self._swap = AttributeSwap.read(more)
        self._tokenizer = Tokenizer(loaded.tokenizer_json, loaded.text)
        self._captions, self._of_image = annotations.pairs.captions, annotations.pairs.of_image
        self._numbers = {caption: number for number, caption in enumerate(self._captions)}
        self._of_captions: Tensor | None = None

    def negatives(
        self, images: Sequence[int], captions: Tensor, owners: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Swap one attribute in each caption that has one.

        Args:
            images: Positions of B images.
            captions: Positions of T captions, int64 [T], as from `Texts.sample`.
            owners: For each caption the index of its image in `images`, int64 [T].
            generator: A CPU generator that draws the attributes.

        Returns:
            Token ids, int64 [N,L], and keys, int64 [N,1]: the position of the caption with the same text, or -1.
        """
        texts: dict[str, None] = {}
        for caption, owner in zip(captions.tolist(), owners.tolist(), strict=True):
            positives = [self._captions[number] for number in self._of_image[images[owner]]]
            if (swapped := self._swap(self._captions[caption], positives, generator)) is not None:
                texts[swapped] = None
        if not texts:
            return torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1, dtype=torch.int64)
        keys = torch.tensor([[self._numbers.get(text, -1)] for text in texts])
        return torch.from_numpy(self._tokenizer(list(texts))), keys

    def of(self, images: Sequence[int], captions: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of A attributes images and captions have.

        Args:
            images: Positions of B images.
            captions: Positions of T captions, int64 [T].

        Returns:
            bool [B,A], the attributes that any caption of an image names, and bool [T,A], those of each caption.
        """
        if self._of_captions is None:
            self._of_captions = self._swap.attributes(self._captions)  # [N,A]
        of_captions = self._of_captions
        of_images = [of_captions[list(self._of_image[image])].any(dim=0) for image in images]
        return torch.stack(of_images), of_captions[captions]
