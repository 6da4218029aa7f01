"""Contrastive losses between images and texts with several positives each, in one process or many.

An image and a text are positives of each other if they share a key: the same caption, the same image or the same group.
All other pairs of the batch are negatives.

Each of W processes passes the embeddings that it computed. The processes exchange embeddings with their gradients, not
logits. If the gradients of the parameters are then averaged over the processes, as DistributedDataParallel and FSDP do,
loss and gradients equal those of one process with the whole batch. With `local_loss` (the name in open_clip) a process
compares only its own embeddings with all others: logits [B,W*T] instead of [W*B,W*T], with the same gradients.
"""

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clipret.errors import ClipretError
from clipret_training.choices import LossKind
from clipret_training.distributed.gather import exchange_shapes, gather_embeddings
from clipret_training.schema import PartialShare, Positive, Share, check_fields

__all__ = [
    "SIGLIP_BIAS",
    "LossBatch",
    "LossConfig",
    "attribute_overlap",
    "compute_loss",
    "contrastive_loss",
    "positive_mask",
    "retrieval_accuracy",
]

SIGLIP_BIAS = -10.0  # the initial logit bias of Zhai et al.: nearly all pairs of a batch are negatives


@dataclass(frozen=True)
class LossConfig:
    """The settings of a loss.

    Args:
        kind: `infonce` is CLIP's symmetric cross-entropy to all positives (van den Oord et al., 2018; Radford et al.,
            2021). `siglip` is a sigmoid for each pair (Zhai et al., Sigmoid Loss for Language Image Pre-Training,
            2023). `soft` is the Kullback-Leibler divergence from a mixture of the positives and the softmax of the
            attribute overlap (as in Gao et al., SoftCLIP, 2023, with attributes as the teacher).
        label_smoothing: Share of each target that is spread over the whole row of logits; not with `siglip`.
        drop_worst: Share of the images and of the texts with the largest losses to leave out. Noisy captions are among
            them.
        soft_weight: Weight of the attribute overlap in the targets of `soft`.
        soft_temperature: Temperature of the softmax of the attribute overlap.
        local_loss: Whether a process computes only the logits of its own embeddings.

    Raises:
        ClipretError: A value is out of range.
    """

    kind: LossKind = "infonce"
    label_smoothing: PartialShare = 0.0
    drop_worst: PartialShare = 0.0
    soft_weight: Share = 0.5
    soft_temperature: Positive = 0.1
    local_loss: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind == "siglip" and self.label_smoothing:
            raise ClipretError(
                "label_smoothing does not work with the siglip loss, which has no target distribution: use 0"
            )


@dataclass(frozen=True)
class LossBatch:
    """The part of a batch that one process has; all tensors on one device.

    Args:
        image_embeddings: float32 [B,D], unit length.
        text_embeddings: float32 [T,D], unit length.
        image_keys: int64 [B,K], numbers from 0 that say which images and texts belong together (see `positive_mask`),
            padded with -1. Every image must share a key with a text and every text with an image.
        text_keys: int64 [T,L], likewise.
        image_attributes: [B,A], 0 or 1, for `soft`.
        text_attributes: [T,A], 0 or 1, for `soft`.
        negative_embeddings: float32 [N,D], unit length, of hard negative texts.
        negative_keys: int64 [N,L]. An image that shares a key with a hard negative ignores it.
    """

    image_embeddings: Tensor
    text_embeddings: Tensor
    image_keys: Tensor
    text_keys: Tensor
    image_attributes: Tensor | None = None
    text_attributes: Tensor | None = None
    negative_embeddings: Tensor | None = None
    negative_keys: Tensor | None = None


@dataclass(frozen=True)
class _Side:
    """The logits of one direction: the rows of this process and all columns. `first` is the index of its first row."""

    logits: Tensor  # [R,C]
    positive: Tensor  # bool [R,C]
    ignored: Tensor | None  # bool [R,C], columns that are neither positives nor negatives
    overlap: Tensor | None  # [R,C]
    first: int
    counts: list[int]  # rows of each process


def compute_loss(
    config: LossConfig,
    batch: LossBatch,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Compute the loss of a batch, under torch.distributed over the parts of all processes.

    Every process must call this function at the same time.

    Args:
        config: The kind of loss and its settings.
        batch: The part of this process.
        logit_scale: Scalar, already exponentiated.
        logit_bias: Scalar that `siglip` adds to the logits.
        group: The processes; None for all.

    Returns:
        A scalar. With `local_loss` it is the part of this process, and its mean over the processes is the loss.

    Raises:
        ClipretError: On all processes, if the parts of the batch do not match, or if the bias or the attributes that
            the loss needs are missing.
    """
    if config.kind == "siglip" and logit_bias is None:
        raise ClipretError("the siglip loss needs a logit bias and this model has none: use infonce")
    if config.kind == "soft" and (batch.image_attributes is None or batch.text_attributes is None):
        raise ClipretError("the soft loss needs the attributes of images and of texts: pass both or use infonce")
    world = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    whole, counts = _gather(batch, group) if world > 1 else (batch, {})
    # Without local_loss, every process computes all rows of the logits.
    local = batch if world > 1 and config.local_loss else whole
    rank = dist.get_rank(group) if local is not whole else 0

    def rows(name: str) -> tuple[int, list[int]]:
        """The index of the first row, and the number of rows of each process."""
        if local is whole:
            return 0, [len(getattr(whole, name))]
        return sum(counts[name][:rank]), counts[name]

    images = _image_side(local, whole, *rows("image_embeddings"))
    texts = (
        _transposed(images, len(whole.text_embeddings))
        if local is whole
        else _text_side(local, whole, *rows("text_embeddings"))
    )
    parts = []
    for side in (images, texts):
        logits = logit_scale * side.logits
        losses = _row_losses(config, logits if logit_bias is None else logits + logit_bias, side)
        parts.append(_mean(losses, side, config.drop_worst, group))
    return (parts[0] + parts[1]) / 2


def contrastive_loss(
    image_embeddings: Tensor, text_embeddings: Tensor, logit_scale: Tensor, positives: Tensor
) -> Tensor:
    """Compute CLIP's symmetric cross-entropy with several positives per image and text, in one process.

    The target of an image is the uniform distribution over its captions in the batch, the target of a caption the
    uniform distribution over its images (the "outside" form of Khosla et al., Supervised Contrastive Learning, 2020).
    If each image has one caption and all captions differ, this is exactly CLIP's loss.

    Args:
        image_embeddings: float32 [B,D], unit length.
        text_embeddings: float32 [T,D], unit length.
        logit_scale: Scalar, already exponentiated.
        positives: bool [B,T], at least one in every row and in every column.

    Returns:
        A scalar.
    """
    logits = logit_scale * image_embeddings @ text_embeddings.T  # [B,T]
    return (_cross_entropy(logits, positives).mean() + _cross_entropy(logits.T, positives.T).mean()) / 2


def positive_mask(row_keys: Tensor, column_keys: Tensor) -> Tensor:
    """Find the pairs that share a key.

    Args:
        row_keys: int64 [R,K], -1 for no key.
        column_keys: int64 [C,L], -1 for no key.

    Returns:
        bool [R,C].
    """
    mask = torch.zeros(len(row_keys), len(column_keys), dtype=torch.bool, device=row_keys.device)
    for keys in row_keys.unbind(1):
        is_key = (keys >= 0)[:, None]
        for others in column_keys.unbind(1):
            mask |= (keys[:, None] == others) & is_key
    return mask


def attribute_overlap(row_attributes: Tensor, column_attributes: Tensor) -> Tensor:
    """Compute the Jaccard similarity of attributes: those in common divided by those of either.

    Args:
        row_attributes: [R,A], 0 or 1.
        column_attributes: [C,A], 0 or 1.

    Returns:
        float32 [R,C]; 0 if neither has an attribute.
    """
    rows, columns = row_attributes.float(), column_attributes.float()
    common = rows @ columns.T
    return common / (rows.sum(dim=1)[:, None] + columns.sum(dim=1) - common).clamp(min=1)


@torch.no_grad()
def retrieval_accuracy(image_embeddings: Tensor, text_embeddings: Tensor, positives: Tensor) -> Tensor:
    """Compute the share of captions whose nearest image in the batch is a positive.

    Args:
        image_embeddings: float32 [B,D], unit length.
        text_embeddings: float32 [T,D], unit length.
        positives: bool [B,T].

    Returns:
        A scalar from 0 to 1.
    """
    nearest = (text_embeddings @ image_embeddings.T).argmax(dim=1)  # [T]
    return positives[nearest, torch.arange(len(nearest), device=nearest.device)].float().mean()


def _gather(batch: LossBatch, group: dist.ProcessGroup | None) -> tuple[LossBatch, dict[str, list[int]]]:
    """The batch of all processes, and the length of each tensor on each process."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    shapes = exchange_shapes(tensors, group, like=batch.image_embeddings)
    counts = {name: [length for length, _ in shapes[name]] for name, value in tensors.items() if value is not None}
    parts = {
        # Keys may be wider on one process than on another: -1 is no key.
        name: gather_embeddings(value, shapes[name], group, fill=-1 if name.endswith("_keys") else None)
        for name, value in tensors.items()
        if value is not None
    }
    return LossBatch(**parts), counts


def _image_side(local: LossBatch, whole: LossBatch, first: int, counts: list[int]) -> _Side:
    """Images as rows; texts and then hard negatives as columns."""
    positive = positive_mask(local.image_keys, whole.text_keys)  # [B,T]
    overlap = _overlap(local.image_attributes, whole.text_attributes)
    if whole.negative_embeddings is None:
        return _Side(local.image_embeddings @ whole.text_embeddings.T, positive, None, overlap, first, counts)
    columns = torch.cat([whole.text_embeddings, whole.negative_embeddings])
    wrong = positive.new_zeros(len(positive), len(whole.negative_embeddings))  # [B,N]
    shared = positive_mask(local.image_keys, whole.negative_keys) if whole.negative_keys is not None else wrong
    if overlap is not None:
        overlap = F.pad(overlap, (0, len(whole.negative_embeddings)))
    ignored = torch.cat([torch.zeros_like(positive), shared], dim=1)
    return _Side(
        local.image_embeddings @ columns.T, torch.cat([positive, wrong], dim=1), ignored, overlap, first, counts
    )


def _text_side(local: LossBatch, whole: LossBatch, first: int, counts: list[int]) -> _Side:
    positive = positive_mask(local.text_keys, whole.image_keys)  # [T,B]
    overlap = _overlap(local.text_attributes, whole.image_attributes)
    return _Side(local.text_embeddings @ whole.image_embeddings.T, positive, None, overlap, first, counts)


def _transposed(images: _Side, T: int) -> _Side:
    """The other direction, without the hard negatives."""
    overlap = None if images.overlap is None else images.overlap[:, :T].T
    return _Side(images.logits[:, :T].T, images.positive[:, :T].T, None, overlap, 0, [T])


def _overlap(rows: Tensor | None, columns: Tensor | None) -> Tensor | None:
    return attribute_overlap(rows, columns) if rows is not None and columns is not None else None


def _row_losses(config: LossConfig, logits: Tensor, side: _Side) -> Tensor:
    """The loss of each row: [R,C] -> [R]."""
    if config.kind == "siglip":
        pairs = -F.logsigmoid(torch.where(side.positive, logits, -logits))
        return (pairs if side.ignored is None else pairs.masked_fill(side.ignored, 0)).sum(dim=1)
    if side.ignored is not None:
        logits = logits.masked_fill(side.ignored, float("-inf"))
    if config.kind == "infonce" and not config.label_smoothing:
        return _cross_entropy(logits, side.positive)
    targets = side.positive / side.positive.sum(dim=1, keepdim=True)
    if config.kind == "soft":
        assert side.overlap is not None
        similarity = side.overlap.masked_fill(side.positive, 1) / config.soft_temperature
        if side.ignored is not None:
            similarity = similarity.masked_fill(side.ignored, float("-inf"))
        targets = torch.lerp(targets, similarity.softmax(dim=1), config.soft_weight)
    if config.label_smoothing:
        allowed = torch.ones_like(targets) if side.ignored is None else (~side.ignored).to(targets.dtype)
        targets = torch.lerp(targets, allowed / allowed.sum(dim=1, keepdim=True), config.label_smoothing)
    log_probabilities = logits.log_softmax(dim=1)
    if side.ignored is not None:
        log_probabilities = log_probabilities.masked_fill(side.ignored, 0)  # 0 * -inf is NaN
    losses = -(targets * log_probabilities).sum(dim=1)
    # The divergence is the cross-entropy minus the entropy of the targets.
    return losses + torch.xlogy(targets, targets).sum(dim=1) if config.kind == "soft" else losses


def _cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    """The mean of -log softmax over the positives of each row: [R,C] -> [R]. Needs no matrix of targets."""
    positive_logits = logits.masked_fill(~positives, 0).sum(dim=1) / positives.sum(dim=1)
    return logits.logsumexp(dim=1) - positive_logits


def _mean(losses: Tensor, side: _Side, drop: float, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of kept rows, scaled so that its mean over the processes is the mean over all kept rows."""
    total = sum(side.counts)
    dropped = int(drop * total + 1e-6)  # 0.29 * 100 is 28.999…
    if dropped:
        all_losses = losses.detach()
        if len(side.counts) > 1:
            all_losses = gather_embeddings(all_losses[:, None], [(count, 1) for count in side.counts], group)[:, 0]
        worst = all_losses.argsort(descending=True, stable=True)[:dropped]
        keep = torch.ones_like(all_losses, dtype=torch.bool).index_fill(0, worst, False)
        losses = losses * keep[side.first : side.first + len(losses)]
    return losses.sum() * (len(side.counts) / (total - dropped))
