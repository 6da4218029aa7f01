"""Training: from a list of images and captions to a run folder, read from top to bottom."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from clipret.errors import ClipretError
from clipret_training.annotations import read_annotation_files
from clipret_training.checkpoint import Checkpoints, Position
from clipret_training.config import FitConfig
from clipret_training.data import TrainingData, open_held_out
from clipret_training.distributed import World, gather_objects, join, smallest
from clipret_training.distributed.fsdp import latest_shards
from clipret_training.learner import Learner
from clipret_training.optim import learning_rate
from clipret_training.run import RunFolder, claimed
from clipret_training.step import GradientStep
from clipret_training.validation import WAYS, quality, recall

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """`best` and `last` are lines of metrics.jsonl; `skipped` counts the images that could not be read. `writes`:
    whether this is the one process of several that should print it."""

    run: Path
    best: dict[str, Any]
    last: dict[str, Any]
    skipped: int
    writes: bool = True


def fit(
    config: FitConfig, out: Path, report: Callable[[dict[str, Any]], None] | None = None, *, resume: bool = False
) -> FitResult:
    """Train as `config` says and leave a run folder at `out`; `report` is called with each epoch's metrics.

    With `resume` a run that was begun at `out` with the same configuration goes on after its last checkpoint and ends
    with the weights that it would have had without the interruption; one that is not there begins. Under torchrun
    every process calls this alike.

    Raises ClipretError: `out` is taken, holds another run or one that is being trained, a list or the model cannot be
    read, no image can be read, the disk is full, or the loss is no longer a number.
    """
    with join(config.device) as world, claimed(out) if world.writes else contextlib.nullcontext():
        return _train(config, out, world, report, resume=resume)


def _train(
    config: FitConfig, out: Path, world: World, report: Callable[[dict[str, Any]], None] | None, *, resume: bool
) -> FitResult:
    # The run: a folder, and where it has been begun, the last checkpoint
    if config.batch_size % (world.size * config.accumulate):
        raise ClipretError(
            f"batch_size {config.batch_size} does not split over {world.size} processes with {config.accumulate} "
            "parts each"
        )
    folder = RunFolder(out, writes=world.writes)
    checkpoints = Checkpoints(folder.checkpoints, config.identity(world.size))
    saved, shards = _last_state(config, folder, checkpoints, world) if resume else _no_state(folder, world)
    torch.set_num_threads(config.threads)

    # The lists: what is learned from, and what is held out
    train_annotations, val_annotations = read_annotation_files(config)
    fingerprint = train_annotations.fingerprint()
    if saved is not None and saved["listing"] != fingerprint:
        raise ClipretError(f"{config.data} is not what it was when this run began: put the old list back")

    # The model, with its optimiser and its loss
    learner = Learner(config, train_annotations.pairs.captions, world, checkpoints.last if saved else None)
    gradients = GradientStep(
        learner.model,
        config.loss_config,
        precision=config.precision,
        device=world.device,
        parts=config.accumulate,
        compiled=config.compile,
        seed=(config.seed, "dropout", world.rank),
    )

    # The images and captions, prepared for this model
    data = TrainingData(config, train_annotations, learner.loaded, world)
    val_reader, val_texts = open_held_out(config, val_annotations, learner.loaded, world, cached=data.reader.cached)

    # Where the training is: at its beginning, or behind the last checkpoint
    if saved is None:
        folder.begin(config.to_dict(), learner.loaded)
        at = Position(steps=data.steps())
        count, captions, held_out = (
            len(train_annotations.pairs.paths),
            len(train_annotations.pairs.captions),
            len(val_annotations.pairs.paths),
        )
        folder.log(f"clipret {version('clipret')}, torch {torch.__version__}, {world.size} processes")
        folder.log(f"{count} images with {captions} captions to train on, {held_out} held out")
    else:
        at = Position(**saved["positions"][world.rank])
        data.reader.skipped |= saved["skipped"][world.rank]
        learner.load_state(saved, shards)
        folder.record(at.metrics)
        folder.log(f"goes on after step {at.step}")

    def lr() -> float:
        return learning_rate(at.step, at.steps, lr=config.lr, warmup=config.warmup, schedule=config.schedule)

    def save() -> None:
        position = dataclasses.replace(at, cpu_seconds=at.cpu_seconds + time.process_time())
        state = {
            "positions": gather_objects(dataclasses.asdict(position), world),
            "skipped": gather_objects(data.reader.skipped, world),
            "listing": fingerprint,
            "config": config.to_dict(),
        }
        learner.save_last(checkpoints, state, at.step, at.epoch)

    if config.tensorboard:
        folder.open_board(at.step)
    with _progress(at, data.batch_size() * world.size, world) as bar:
        while at.epoch <= config.epochs:
            # An epoch: every image once
            learner.train()
            before = time.perf_counter()
            for chosen, pixels, consumed in data.epoch(at):
                at.step += 1
                result = gradients(data.batch(chosen, pixels, at), at.step, learner.scaler.scale)
                if not math.isfinite(result.loss):
                    guilty = data.paths([chosen[place] for place in result.broken] or chosen)
                    raise _no_number(config, result.loss, guilty, at, folder, checkpoints)
                at.overflows += not learner.step(lr())
                at.consumed = consumed
                at.losses.append(result.loss)
                at.accuracies.append(result.accuracy)
                at.seconds, before = at.seconds + time.perf_counter() - before, time.perf_counter()
                bar.update(at.size * world.size)
                if at.step % 10 == 0 or at.step == 1:
                    shares = f"loss {result.loss:.3f}, accuracy {100 * result.accuracy:.0f}%"
                    bar.set_postfix_str(f"epoch {at.epoch}, {shares}")
                scalars = {"loss": result.loss, "accuracy": result.accuracy, "learning_rate": lr()}
                folder.scalars(at.step, scalars)
                if config.save_every and at.step % config.save_every == 0:
                    save()

            # Its end: measure, and keep the best
            metrics = _epoch_metrics(config, at, lr(), learner, world)
            if at.epoch % config.validate_every == 0 or at.epoch == config.epochs:
                with learner.averaged():
                    pairs, loaded = val_annotations.pairs, learner.loaded
                    metrics |= recall(loaded, pairs, val_reader, val_texts, world.device, world)
                    folder.scalars(at.step, {f"recall_at_10/{way}": metrics[way]["recall_at_10"] for way in WAYS})
                    folder.scalars(at.step, {"logit_scale": metrics["logit_scale"]})
                    if not at.best or quality(metrics) > quality(at.best):
                        at.best = metrics
                        learner.save_best(checkpoints, at.step)
            metrics["cpu_seconds"] = at.cpu_seconds + time.process_time()  # user and system, of all threads
            folder.log(f"epoch {at.epoch} of {config.epochs}, loss {metrics['loss']:.4f}")
            at.next_epoch(metrics)
            save()

            # What the folder and the caller are told
            folder.record(at.metrics)
            skipped = gather_objects(data.reader.skipped_paths() | val_reader.skipped_paths(), world)
            folder.write_skipped({path: reason for share in skipped for path, reason in share.items()})
            if report is not None and world.writes:
                report(metrics)

    # The end
    folder.close()
    learner.consolidate(checkpoints, at.step)
    skipped_counts = gather_objects(len(data.reader.skipped) + len(val_reader.skipped), world)
    return FitResult(folder.path, at.best, at.metrics[-1], sum(skipped_counts), world.writes)


def _no_state(folder: RunFolder, world: World) -> tuple[None, None]:
    """Of a run that begins: its place must be free."""
    if world.writes:
        folder.refuse_taken(folder.path)
    smallest(0, world)  # nobody writes before that is known
    return None, None


def _last_state(
    config: FitConfig, folder: RunFolder, checkpoints: Checkpoints, world: World
) -> tuple[dict[str, Any] | None, Path | None]:
    """The state of the checkpoint to go on from, and with fsdp the folder of its shards; None where the run begins."""
    before = folder.params()
    if before is None:
        if not folder.checkpoints.is_dir():
            folder.refuse_taken(folder.path)
        return None, None
    old, new = before.decisive(), config.decisive()
    if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        name = changed[0]
        raise ClipretError(
            f"{folder.path} was begun with another {', '.join(changed)} ({name}: {old.get(name)!r}, now "
            f"{new.get(name)!r}): continue with  clipret-train fit --resume --out {folder.path}  or choose a new folder"
        )
    if world.writes:
        checkpoints.sweep()
    if not config.fsdp:
        return checkpoints.load_state(), None
    shards, state = latest_shards(checkpoints.folder, checkpoints.identity) or (None, None)
    return state, shards


def _progress(at: Position, batch: int, world: World) -> "tqdm[Any]":
    hidden = None if world.writes else True  # None: where stderr is no terminal
    total, done = at.steps * batch, at.step * batch
    return tqdm(total=total, initial=done, unit="image", disable=hidden, dynamic_ncols=True, leave=False)


def _epoch_metrics(config: FitConfig, at: Position, lr: float, learner: Learner, world: World) -> dict[str, Any]:
    """What an epoch's steps say of it."""
    metrics: dict[str, Any] = {
        "epoch": at.epoch,
        "step": at.step,
        "loss": sum(at.losses) / len(at.losses),
        "batch_accuracy": sum(at.accuracies) / len(at.accuracies),
        "lr": lr,
        "logit_scale": learner.logit_scale(),
        "images_per_second": len(at.losses) * at.size * world.size / max(at.seconds, 1e-9),
    }
    return metrics | ({"overflows": at.overflows} if config.precision == "fp16" else {})


def _no_number(
    config: FitConfig, loss: float, guilty: list[Path], at: Position, folder: RunFolder, checkpoints: Checkpoints
) -> ClipretError:
    """Which images made the loss no number; weights and checkpoints are as they were before the step."""
    what, names = f"the loss is {loss} at step {at.step} of epoch {at.epoch}", [str(path) for path in guilty]
    folder.log(f"stopped: {what}; its images: {', '.join(names)}")
    named = ", ".join(names[:3]) + (f" and {len(names) - 3} more, see log.txt" if len(names) > 3 else "")
    last = f"; the last checkpoint is intact: {checkpoints.last}" if checkpoints.last.exists() else ""
    return ClipretError(f"{what} with {named}: look at them, or lower --lr ({config.lr}){last}")
