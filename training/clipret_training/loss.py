"""Losses between images and texts of which each may have several right answers, over one process or many.

A row is a positive of every row that it shares a key with: the same caption, the same image, the same group. All
else in the batch is a negative.

Several processes each pass the rows that they computed. The rows, not the logits, are exchanged, with their
gradients, and the gradients of the parameters are meant to be averaged over the processes, as DistributedDataParallel
and FSDP do: then loss and gradients are those of one process that has the whole batch. With `local_loss` (open_clip's
name) a process scores only its own rows against all: logits [B,W*T] instead of [W*B,W*T], the same gradients.
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

SIGLIP_BIAS = -10.0  # where Zhai et al. start a new logit bias: nearly all pairs of a batch are negatives


@dataclass(frozen=True)
class LossConfig:
    """`infonce`: CLIP's symmetric cross-entropy (van den Oord et al., 2018; Radford et al., 2021), to all positives.

    `siglip`: a sigmoid for each pair (Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023).
    `soft`: the Kullback-Leibler divergence from a mixture of the positives and, with the weight `soft_weight`, of the
    softmax of the attribute overlap over `soft_temperature` (as in Gao et al., SoftCLIP, 2023, with attributes for a
    teacher).

    `label_smoothing` spreads that share of each target over the whole row (not with `siglip`). `drop_worst` leaves out
    that share of the rows with the largest losses, of the images and of the texts: noisy captions are among them.
    Raises ClipretError for a value out of range.
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
                "label_smoothing has no meaning for the siglip loss, which has no rows of targets: use 0"
            )


@dataclass(frozen=True)
class LossBatch:
    """What one process knows of a batch; all tensors on one device.

    image_embeddings: float32 [B,D] and text_embeddings: float32 [T,D], unit length. image_keys: int64 [B,K] and
    text_keys: int64 [T,L], any numbers from 0 that say which rows belong together (`positive_mask`), padded with -1;
    every image must share a key with a text and every text with an image. image_attributes: [B,A] and text_attributes:
    [T,A], 0 or 1, for `soft`. negative_embeddings: float32 [N,D], texts that are no positive of any image, with
    negative_keys: int64 [N,L] so that an image is not pushed from a text that happens to be one of its own.
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
    """One direction: the rows of this process against all columns. first: the place of its first row among all."""

    logits: Tensor  # [R,C]
    positive: Tensor  # bool [R,C]
    ignored: Tensor | None  # bool [R,C], columns that count neither as right nor as wrong
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
    """The loss, a scalar; under torch.distributed over the rows of all processes of `group` (default: all there are).

    logit_scale: scalar, already exponentiated. Every process must call it at the same time. With `local_loss` the value
    is this process's part, so scaled that the mean over the processes is the loss. Raises ClipretError, on all of
    them alike, when the parts of the batch do not fit each other, and when something that the loss needs is missing.
    """
    if config.kind == "siglip" and logit_bias is None:
        raise ClipretError("the siglip loss needs a logit bias and this model has none: give it one or use infonce")
    if config.kind == "soft" and (batch.image_attributes is None or batch.text_attributes is None):
        raise ClipretError("the soft loss needs the attributes of images and of texts: give both or use infonce")
    world = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    whole, counts = _gather(batch, group) if world > 1 else (batch, {})
    # Without local_loss, and in one process, every row is its own.
    mine = batch if world > 1 and config.local_loss else whole
    rank = dist.get_rank(group) if mine is not whole else 0

    def place(name: str) -> tuple[int, list[int]]:
        if mine is whole:
            return 0, [len(getattr(whole, name))]
        return sum(counts[name][:rank]), counts[name]

    images = _image_side(mine, whole, *place("image_embeddings"))
    texts = (
        _transposed(images, len(whole.text_embeddings))
        if mine is whole
        else _text_side(mine, whole, *place("text_embeddings"))
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
    """CLIP's symmetric cross-entropy in which a row may have several right answers, in one process.

    The target of an image is the uniform distribution over its captions in the batch, that of a caption the uniform
    distribution over its images (the "outside" form of Khosla et al., Supervised Contrastive Learning, 2020). With
    one caption an image and all captions different it is CLIP's loss exactly.

    image_embeddings: float32 [B,D] and text_embeddings: float32 [T,D], unit length. logit_scale: scalar, already
        exponentiated.
    positives: bool [B,T], at least one in every row and in every column. Returns a scalar.
    """
    logits = logit_scale * image_embeddings @ text_embeddings.T  # [B,T]
    return (_cross_entropy(logits, positives).mean() + _cross_entropy(logits.T, positives.T).mean()) / 2


def positive_mask(row_keys: Tensor, column_keys: Tensor) -> Tensor:
    """int64 [R,K] and int64 [C,L], -1 for no key -> bool [R,C]: whether a row and a column share a key."""
    mask = torch.zeros(len(row_keys), len(column_keys), dtype=torch.bool, device=row_keys.device)
    for keys in row_keys.unbind(1):
        known = (keys >= 0)[:, None]
        for others in column_keys.unbind(1):
            mask |= (keys[:, None] == others) & known
    return mask


def attribute_overlap(row_attributes: Tensor, column_attributes: Tensor) -> Tensor:
    """[R,A] and [C,A], 0 or 1 -> float32 [R,C]: attributes in common over those of either (Jaccard), or 0."""
    rows, columns = row_attributes.float(), column_attributes.float()
    common = rows @ columns.T
    return common / (rows.sum(dim=1)[:, None] + columns.sum(dim=1) - common).clamp(min=1)


@torch.no_grad()
def retrieval_accuracy(image_embeddings: Tensor, text_embeddings: Tensor, positives: Tensor) -> Tensor:
    """The share of captions whose nearest image of the batch is a right one; shapes as in `contrastive_loss`."""
    nearest = (text_embeddings @ image_embeddings.T).argmax(dim=1)  # [T]
    return positives[nearest, torch.arange(len(nearest), device=nearest.device)].float().mean()


def _gather(batch: LossBatch, group: dist.ProcessGroup | None) -> tuple[LossBatch, dict[str, list[int]]]:
    """The batch of all processes, and how many rows each has of each part."""
    given = {field.name: getattr(batch, field.name) for field in fields(batch)}
    shapes = exchange_shapes(given, group, like=batch.image_embeddings)
    counts = {name: [rows for rows, _ in shapes[name]] for name, value in given.items() if value is not None}
    parts = {
        # Keys may be wider on one process than on another: -1 is no key.
        name: gather_embeddings(value, shapes[name], group, fill=-1 if name.endswith("_keys") else None)
        for name, value in given.items()
        if value is not None
    }
    return LossBatch(**parts), counts


def _image_side(mine: LossBatch, whole: LossBatch, first: int, counts: list[int]) -> _Side:
    """Images against texts and, behind them, the hard negatives."""
    positive = positive_mask(mine.image_keys, whole.text_keys)  # [B,T]
    overlap = _overlap(mine.image_attributes, whole.text_attributes)
    if whole.negative_embeddings is None:
        return _Side(mine.image_embeddings @ whole.text_embeddings.T, positive, None, overlap, first, counts)
    columns = torch.cat([whole.text_embeddings, whole.negative_embeddings])
    wrong = positive.new_zeros(len(positive), len(whole.negative_embeddings))  # [B,N]
    own = positive_mask(mine.image_keys, whole.negative_keys) if whole.negative_keys is not None else wrong
    if overlap is not None:
        overlap = F.pad(overlap, (0, len(whole.negative_embeddings)))
    ignored = torch.cat([torch.zeros_like(positive), own], dim=1)
    return _Side(
        mine.image_embeddings @ columns.T, torch.cat([positive, wrong], dim=1), ignored, overlap, first, counts
    )


def _text_side(mine: LossBatch, whole: LossBatch, first: int, counts: list[int]) -> _Side:
    positive = positive_mask(mine.text_keys, whole.image_keys)  # [T,B]
    overlap = _overlap(mine.text_attributes, whole.image_attributes)
    return _Side(mine.text_embeddings @ whole.image_embeddings.T, positive, None, overlap, first, counts)


def _transposed(images: _Side, T: int) -> _Side:
    """The other direction, in which hard negatives ask nothing."""
    overlap = None if images.overlap is None else images.overlap[:, :T].T
    return _Side(images.logits[:, :T].T, images.positive[:, :T].T, None, overlap, 0, [T])


def _overlap(rows: Tensor | None, columns: Tensor | None) -> Tensor | None:
    return attribute_overlap(rows, columns) if rows is not None and columns is not None else None


def _row_losses(config: LossConfig, logits: Tensor, side: _Side) -> Tensor:
    """[R,C] -> [R]"""
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
        likeness = side.overlap.masked_fill(side.positive, 1) / config.soft_temperature
        if side.ignored is not None:
            likeness = likeness.masked_fill(side.ignored, float("-inf"))
        targets = torch.lerp(targets, likeness.softmax(dim=1), config.soft_weight)
    if config.label_smoothing:
        allowed = torch.ones_like(targets) if side.ignored is None else (~side.ignored).to(targets.dtype)
        targets = torch.lerp(targets, allowed / allowed.sum(dim=1, keepdim=True), config.label_smoothing)
    log_shares = logits.log_softmax(dim=1)
    if side.ignored is not None:
        log_shares = log_shares.masked_fill(side.ignored, 0)  # 0 * -inf is no number
    losses = -(targets * log_shares).sum(dim=1)
    # The divergence is the cross-entropy less what no model can undercut.
    return losses + torch.xlogy(targets, targets).sum(dim=1) if config.kind == "soft" else losses


def _cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    """The mean over a row's positives of -log softmax: [R,C] -> [R]. Never forms a matrix of targets."""
    right = logits.masked_fill(~positives, 0).sum(dim=1) / positives.sum(dim=1)
    return logits.logsumexp(dim=1) - right


def _mean(losses: Tensor, side: _Side, drop: float, group: dist.ProcessGroup | None) -> Tensor:
    """The mean over the kept rows of all processes; over this one's rows, times the number of processes."""
    total = sum(side.counts)
    dropped = int(drop * total + 1e-6)  # 0.29 * 100 is 28.999…
    if dropped:
        every = losses.detach()
        if len(side.counts) > 1:
            every = gather_embeddings(every[:, None], [(count, 1) for count in side.counts], group)[:, 0]
        worst = every.argsort(descending=True, stable=True)[:dropped]
        keep = torch.ones_like(every, dtype=torch.bool).index_fill(0, worst, False)
        losses = losses * keep[side.first : side.first + len(losses)]
    return losses.sum() * (len(side.counts) / (total - dropped))
