"""Training: from a list of pictures and titles to a run folder. `fit` reads top to bottom."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from clipret.console import progress
from clipret.errors import ClipretError
from clipret.pairs import PairSet, read_pairs
from clipret.training.augment import Augmenter
from clipret.training.config import FitConfig
from clipret.training.data import Pictures, Texts, positives, split_pairs
from clipret.training.loss import contrastive_loss, retrieval_accuracy
from clipret.training.models import load_model
from clipret.training.precision import autocast, open_device
from clipret.training.run import RunFolder
from clipret.training.validation import normalise, recall

__all__ = ["FitResult", "fit"]

_MAX_LOGIT_SCALE = math.log(100)  # as in CLIP: a larger one makes training unstable
_MAX_GRADIENT = 1.0


@dataclass(frozen=True)
class FitResult:
    """`best` and `last` are lines of metrics.jsonl; `skipped` counts the pictures that could not be read."""

    run: Path
    best: dict[str, Any]
    last: dict[str, Any]
    skipped: int


def fit(config: FitConfig, out: Path, report: Callable[[dict[str, Any]], None] | None = None) -> FitResult:
    """Train as `config` says and leave a run folder at `out`; `report` is called with each epoch's metrics.

    Raises ClipretError: `out` is taken, a list or the model cannot be read, no picture can be read, or the loss
    is no longer a number.
    """
    RunFolder.refuse_taken(out)
    device = open_device(config.device)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # decides dropout; all else is drawn from the generator
    generator = torch.Generator().manual_seed(config.seed)

    train, val = _read_lists(config)
    loaded = load_model(config.model, seed=config.seed, captions=train.titles)
    train_texts, val_texts = Texts(loaded, train), Texts(loaded, val)
    limit = int(config.cache_limit * 2**30)
    train_pictures = Pictures(train.paths, loaded.image, threads=config.threads, cache_limit=limit)
    val_pictures = Pictures(val.paths, loaded.image, threads=config.threads, cache_limit=limit - train_pictures.cached)

    run = RunFolder.create(out, dataclasses.asdict(config), loaded)
    run.log(f"{len(train.paths)} pictures with {len(train.titles)} titles to train on, {len(val.paths)} held out")

    model: Any = loaded.model.to(device).to(memory_format=torch.channels_last)
    augment = Augmenter(config.augment, config.crop_size or loaded.image.size, config.crop_area, config.jitter)
    optimizer = _optimizer(model, config)
    batch_size = min(config.batch_size, len(train.paths) - len(train_pictures.skipped))
    steps_an_epoch = (len(train.paths) - len(train_pictures.skipped)) // max(batch_size, 1)
    step = 0
    best: dict[str, Any] = {}
    for epoch in range(1, config.epochs + 1):
        began = time.perf_counter()
        losses, accuracies = [], []
        model.train()
        order = torch.randperm(len(train.paths), generator=generator).tolist()
        batches = train_pictures.batches(order, batch_size)
        for chosen, pixels in progress(
            batches, total=steps_an_epoch, desc=f"epoch {epoch}/{config.epochs}", unit="step"
        ):
            if len(chosen) < batch_size:
                continue  # the rest of the epoch: too few negatives, too few pictures for a batch's statistics
            titles = train_texts.sample(chosen, config.captions, generator)  # [T]
            right = positives([train_texts.of_picture[picture] for picture in chosen], titles).to(device)  # [B,T]
            images = normalise(loaded, augment(pixels.to(device), generator))  # [B,3,S,S]
            with autocast(config.precision, device):
                image_rows = model.encode_image(images)  # [B,D]
                text_rows = model.encode_text(train_texts.ids(titles).to(device))  # [T,D]
            image_rows = F.normalize(image_rows.float(), dim=-1)
            text_rows = F.normalize(text_rows.float(), dim=-1)
            loss = contrastive_loss(image_rows, text_rows, model.logit_scale.exp(), right)

            step += 1
            losses.append(loss.item())
            accuracies.append(retrieval_accuracy(image_rows, text_rows, right).item())
            if not math.isfinite(losses[-1]):
                run.log(f"stopped: the loss is {losses[-1]} at step {step}")
                raise ClipretError(
                    f"the loss is {losses[-1]} at step {step} of epoch {epoch}: lower --lr ({config.lr})"
                )
            lr = _learning_rate(step, steps_an_epoch * config.epochs, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=_MAX_LOGIT_SCALE)

        if not losses:
            raise ClipretError(f"none of the {len(train.paths)} pictures can be read, {train_pictures.example()}")
        seconds = time.perf_counter() - began
        metrics = {
            "epoch": epoch,
            "step": step,
            "loss": sum(losses) / len(losses),
            "batch_accuracy": sum(accuracies) / len(accuracies),
            "lr": lr,
            "logit_scale": model.logit_scale.exp().item(),
            "pictures_per_second": len(losses) * batch_size / seconds,
        }
        run.save(loaded, "last")
        if epoch % config.validate_every == 0 or epoch == config.epochs:
            metrics |= recall(loaded, val, val_pictures, val_texts, device)
            if not best or _quality(metrics) > _quality(best):
                best = metrics
                run.save(loaded, "best")
        metrics["cpu_seconds"] = time.process_time()  # user and system, of all threads, since the process began
        run.write_skipped(train_pictures.skipped_paths() | val_pictures.skipped_paths())
        run.record(metrics)
        run.log(f"epoch {epoch} of {config.epochs}, loss {metrics['loss']:.4f}")
        if report is not None:
            report(metrics)
    return FitResult(out, best, metrics, len(train_pictures.skipped) + len(val_pictures.skipped))


def _read_lists(config: FitConfig) -> tuple[PairSet, PairSet]:
    """The pictures to train on and those held out; the latter are taken out of the former."""
    columns: dict[str, Any] = {"image_column": config.image_column, "title_column": config.title_column}
    data = Path(config.data)
    root = Path(config.image_root) if config.image_root is not None else None
    pairs = read_pairs(data, image_root=root, where=config.where, **columns)
    if config.val is None and config.val_where is None:
        return split_pairs(pairs, config.val_split, config.seed)
    source = Path(config.val) if config.val is not None else data
    val = read_pairs(source, image_root=root, where=config.val_where, **columns)
    held_out = set(val.paths)
    keep = [position for position, path in enumerate(pairs.paths) if path not in held_out]
    if not keep:
        raise ClipretError(f"every picture of {data} is held out for validation: change --where, --val or --val-where")
    return pairs.subset(keep), val


def _optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """AdamW without decay on what is no matrix: biases, normalisations, the logit scale."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # The fused kernel is six times faster on a CPU. Second moments as in CLIP.
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def _learning_rate(step: int, steps: int, config: FitConfig) -> float:
    """A linear rise to `lr`, times a half cosine to zero over the whole training; `step` counts from 1."""
    rise = min(1.0, step / max(1.0, config.warmup * steps))
    return config.lr * rise * (0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - 1) / steps)))


def _quality(metrics: dict[str, Any]) -> float:
    """What decides which epoch is the best."""
    quality: float = metrics["text_to_image"]["recall_at_10"]
    return quality
