"""The gradients of one step: towers, loss and backward pass, at once or in parts with the same gradients."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipret_training.choices import Precision, Tower
from clipret_training.data import Batch
from clipret_training.loss import LossBatch, LossConfig, compute_loss, positive_mask, retrieval_accuracy
from clipret_training.seeds import seed_of
from clipret_training.tuning import autocast, float32_attention

__all__ = ["GradientStep", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    Args:
        loss: Its value; NaN or infinite if something went wrong.
        accuracy: Share of captions whose nearest image, among those of this process, is a positive.
        broken: Positions in the batch of images whose embedding, or a caption's embedding, is not finite.
    """

    loss: float
    accuracy: float
    broken: tuple[int, ...]


class GradientStep:
    """Adds the gradients of a batch to the parameters of a model.

    With several parts, the towers first compute the embeddings of each part without gradients. The loss of the whole
    batch gives the gradient of each embedding, and a second forward pass of each part propagates it. Loss and gradients
    are those of the whole batch (Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup,
    2021; `--accum-freq` in open_clip). Only batch normalisation differs: its statistics are those of a part.

    Args:
        model: A model with `encode_image`, `encode_text` and `logit_scale`.
        loss: The settings of the loss.
        precision: The precision of the towers.
        device: The device of the model.
        parts: How many parts a batch is computed in.
        compiled: Whether to compile the towers with torch.compile.
        seed: The parts of the seed of dropout.
    """

    def __init__(
        self,
        model: Any,
        loss: LossConfig,
        *,
        precision: Precision,
        device: torch.device,
        parts: int = 1,
        compiled: bool = False,
        seed: tuple[int | str, ...] = (0,),
    ) -> None:
        self._model, self._loss, self._seed = model, loss, seed
        self._precision: Precision = precision
        self._device, self._parts = device, parts
        self._encode_image: Callable[[Tensor], Tensor] = model.encode_image
        self._encode_text: Callable[[Tensor], Tensor] = model.encode_text
        if compiled:
            self._encode_image = torch.compile(model.encode_image)
            self._encode_text = torch.compile(model.encode_text, dynamic=True)  # the length of texts varies

    def __call__(self, batch: Batch, step: int, scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> StepResult:
        """Compute the loss of a batch and add its gradients. Every process must call this method at the same time.

        Args:
            batch: The images and texts of this process.
            step: The number of the step; dropout depends on it.
            scale: Scales the loss before the backward pass, for half precision.

        Returns:
            Loss and accuracy. If the loss is not finite, there are no gradients.
        """
        images, texts = batch.images.tensor_split(self._parts), list(batch.texts.groups)
        if batch.negatives is not None and len(batch.negatives):
            texts += batch.negatives.tensor_split(min(self._parts, len(batch.negatives)))
        encoders = [self._part(self._encode_image, part, step, "image", n) for n, part in enumerate(images)]
        encoders += [
            self._part(self._encode_text, part.to(self._device), step, "text", n) for n, part in enumerate(texts)
        ]
        if self._parts == 1:
            embeddings = [encode() for encode in encoders]
        else:
            with torch.no_grad(), _frozen_statistics(self._model):
                embeddings = [encode() for encode in encoders]
            embeddings = [part.requires_grad_() for part in embeddings]
        first, behind = len(images), len(images) + len(batch.texts.groups)
        image_embeddings, text_embeddings = torch.cat(embeddings[:first]), batch.texts.ordered(embeddings[first:behind])
        negative_embeddings = torch.cat(embeddings[behind:]) if len(embeddings) > behind else text_embeddings[:0]
        loss = self.compute_loss(batch, image_embeddings, text_embeddings, negative_embeddings)
        result = self._result(batch, loss, image_embeddings, text_embeddings)
        if not result.broken and torch.isfinite(loss):
            self._backward(scale(loss), None)
            if self._parts > 1:
                for encode, part in zip(encoders, embeddings, strict=True):
                    self._backward(encode(), part.grad)
        return result

    def _backward(self, outputs: Tensor, gradients: Tensor | None) -> None:
        with float32_attention(self._precision, self._device):
            torch.autograd.backward(outputs, gradients)

    def _part(
        self, encode: Callable[[Tensor], Tensor], inputs: Tensor, step: int, tower: Tower, number: int
    ) -> Callable[[], Tensor]:
        """A function that returns float32 embeddings of unit length, the same at each call: dropout is seeded."""
        seed = seed_of(*self._seed, step, tower, number)

        def run() -> Tensor:
            torch.manual_seed(seed)
            with autocast(self._precision, self._device):
                embeddings = encode(inputs)
            return F.normalize(embeddings.float(), dim=-1)

        return run

    def compute_loss(
        self, batch: Batch, image_embeddings: Tensor, text_embeddings: Tensor, negative_embeddings: Tensor
    ) -> Tensor:
        """Compute the loss from embeddings.

        Args:
            batch: Its keys and attributes are used.
            image_embeddings: float32 [B,D], unit length.
            text_embeddings: float32 [T,D], unit length.
            negative_embeddings: float32 [N,D], unit length.

        Returns:
            A scalar.
        """
        names = ("image_keys", "text_keys", "image_attributes", "text_attributes", "negative_keys")
        rest = {name: value.to(self._device) for name in names if (value := getattr(batch, name)) is not None}
        negatives = negative_embeddings if batch.negatives is not None else None
        loss_batch = LossBatch(image_embeddings, text_embeddings, negative_embeddings=negatives, **rest)
        return compute_loss(self._loss, loss_batch, self._model.logit_scale.exp(), self._bias())

    def _bias(self) -> Tensor | None:
        return getattr(self._model, "logit_bias", None) if self._loss.kind == "siglip" else None

    def _result(self, batch: Batch, loss: Tensor, image_embeddings: Tensor, text_embeddings: Tensor) -> StepResult:
        positives = positive_mask(batch.image_keys, batch.text_keys).to(self._device)  # [B,T]
        accuracy = retrieval_accuracy(image_embeddings, text_embeddings, positives)
        loss_value, accuracy_value = torch.stack([loss.detach(), accuracy]).tolist()  # one synchronisation
        if torch.isfinite(loss):
            return StepResult(loss_value, accuracy_value, ())
        broken = ~image_embeddings.isfinite().all(dim=1)
        broken |= (positives & ~text_embeddings.isfinite().all(dim=1)).any(dim=1)
        return StepResult(loss_value, accuracy_value, tuple(broken.nonzero()[:, 0].tolist()))


@contextlib.contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch normalisation: the second forward pass has the same images."""
    layers: Sequence[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    saved = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, (momentum, count) in zip(layers, saved, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(count)
