"""The contrastive loss with many-to-many positives."""

import torch
from torch import Tensor

__all__ = ["contrastive_loss", "retrieval_accuracy"]


def contrastive_loss(image_rows: Tensor, text_rows: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy in which a row may have several right answers.

    The target of a picture is the uniform distribution over its captions in the batch, that of a caption the uniform
    distribution over its pictures (the "outside" form of Khosla et al., Supervised Contrastive Learning, 2020). With
    one caption a picture and all captions different it is CLIP's loss exactly.

    image_rows: float32 [B,D] and text_rows: float32 [T,D], unit rows. logit_scale: scalar, already exponentiated.
    positives: bool [B,T], at least one in every row and in every column. Returns a scalar.
    """
    logits = logit_scale * image_rows @ text_rows.T  # [B,T]
    return (_cross_entropy(logits, positives) + _cross_entropy(logits.T, positives.T)) / 2


def _cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    targets = positives / positives.sum(dim=1, keepdim=True)
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


@torch.no_grad()
def retrieval_accuracy(image_rows: Tensor, text_rows: Tensor, positives: Tensor) -> Tensor:
    """The share of captions whose nearest picture of the batch is a right one; shapes as in `contrastive_loss`."""
    nearest = (text_rows @ image_rows.T).argmax(dim=1)  # [T]
    return positives[nearest, torch.arange(len(nearest), device=nearest.device)].float().mean()
