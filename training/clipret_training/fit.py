"""Training: from images with captions to a run folder, in one function to read from top to bottom."""

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
from clipret_training.validation import DIRECTIONS, quality, recall

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """The result of a training.

    Args:
        run: The run folder.
        best: The metrics of the best epoch, as in metrics.jsonl.
        last: The metrics of the last epoch.
        skipped: How many images could not be read.
        writes: Whether this process is the one of several that should print the result.
    """

    run: Path
    best: dict[str, Any]
    last: dict[str, Any]
    skipped: int
    writes: bool = True


def fit(
    config: FitConfig, out: Path, report: Callable[[dict[str, Any]], None] | None = None, *, resume: bool = False
) -> FitResult:
    """Train a model and write a run folder.

    Under torchrun every process calls this function with the same arguments.

    Args:
        config: The settings of the training.
        out: The run folder to create.
        report: Called with the metrics after each epoch.
        resume: Continue the run in `out`, which must have the same configuration, after its last checkpoint. The final
            weights are those of an uninterrupted run. If there is no run in `out`, start one.

    Returns:
        The metrics of the best and the last epoch, and the number of skipped images.

    Raises:
        ClipretError: `out` is not empty or has another run, another process trains in it, an annotations file or the
            model cannot be read, no image can be read, the disk is full, or the loss is not finite.
    """
    with join(config.device) as world, claimed(out) if world.writes else contextlib.nullcontext():
        return _train(config, out, world, report, resume=resume)


def _train(
    config: FitConfig, out: Path, world: World, report: Callable[[dict[str, Any]], None] | None, *, resume: bool
) -> FitResult:
    # The run folder, and its last checkpoint if there is one
    if config.batch_size % (world.size * config.accumulate):
        raise ClipretError(
            f"batch_size {config.batch_size} does not split over {world.size} processes with {config.accumulate} "
            "parts each"
        )
    folder = RunFolder(out, writes=world.writes)
    checkpoints = Checkpoints(folder.checkpoints, config.identity(world.size))
    saved, shards = _last_state(config, folder, checkpoints, world) if resume else _no_state(folder, world)
    torch.set_num_threads(config.threads)

    # The annotations to train on and the held-out ones
    train_annotations, val_annotations = read_annotation_files(config)
    fingerprint = train_annotations.fingerprint()
    if saved is not None and saved["listing"] != fingerprint:
        raise ClipretError(
            f"{config.data} has changed since this run started: restore the old file, or train into a new folder"
        )

    # The model with its optimiser and loss
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

    # The position: at the start, or after the last checkpoint
    if saved is None:
        folder.begin(config.to_dict(), learner.loaded)
        position = Position(steps=data.steps())
        count, captions, held_out = (
            len(train_annotations.pairs.paths),
            len(train_annotations.pairs.captions),
            len(val_annotations.pairs.paths),
        )
        folder.log(f"clipret {version('clipret')}, torch {torch.__version__}, {world.size} processes")
        folder.log(f"{count} images with {captions} captions to train on, {held_out} held out")
    else:
        position = Position(**saved["positions"][world.rank])
        data.reader.skipped |= saved["skipped"][world.rank]
        learner.load_state(saved, shards)
        folder.record(position.metrics)
        folder.log(f"resumed after step {position.step}")

    def lr() -> float:
        return learning_rate(
            position.step, position.steps, lr=config.lr, warmup=config.warmup, schedule=config.schedule
        )

    def save() -> None:
        cpu_seconds = position.cpu_seconds + time.process_time()
        state = {
            "positions": gather_objects(dataclasses.asdict(position) | {"cpu_seconds": cpu_seconds}, world),
            "skipped": gather_objects(data.reader.skipped, world),
            "listing": fingerprint,
            "config": config.to_dict(),
        }
        learner.save_last(checkpoints, state, position.step, position.epoch)

    if config.tensorboard:
        folder.open_board(position.step)
    with _progress(position, data.batch_size() * world.size, world) as bar:
        while position.epoch <= config.epochs:
            # An epoch: every image once
            learner.train()
            step_start = time.perf_counter()
            for chosen, pixels, consumed in data.epoch(position):
                position.step += 1
                result = gradients(data.batch(chosen, pixels, position), position.step, learner.scaler.scale)
                if not math.isfinite(result.loss):
                    suspects = data.paths([chosen[index] for index in result.broken] or chosen)
                    raise _not_finite(config, result.loss, suspects, position, folder, checkpoints)
                position.overflows += not learner.step(lr())
                position.consumed = consumed
                position.losses.append(result.loss)
                position.accuracies.append(result.accuracy)
                step_end = time.perf_counter()
                position.seconds, step_start = position.seconds + step_end - step_start, step_end
                bar.update(position.size * world.size)
                if position.step % 10 == 0 or position.step == 1:
                    progress = f"loss {result.loss:.3f}, accuracy {100 * result.accuracy:.0f}%"
                    bar.set_postfix_str(f"epoch {position.epoch}, {progress}")
                scalars = {"loss": result.loss, "accuracy": result.accuracy, "learning_rate": lr()}
                folder.scalars(position.step, scalars)
                if config.save_every and position.step % config.save_every == 0:
                    save()

            # After the epoch: validate, and keep the best weights
            metrics = _epoch_metrics(config, position, lr(), learner, world)
            if position.epoch % config.validate_every == 0 or position.epoch == config.epochs:
                with learner.averaged():
                    pairs, loaded = val_annotations.pairs, learner.loaded
                    metrics |= recall(loaded, pairs, val_reader, val_texts, world.device, world)
                    recalls = {f"recall_at_10/{name}": metrics[name]["recall_at_10"] for name in DIRECTIONS}
                    folder.scalars(position.step, recalls | {"logit_scale": metrics["logit_scale"]})
                    if not position.best or quality(metrics) > quality(position.best):
                        position.best = metrics
                        learner.save_best(checkpoints, position.step)
            metrics["cpu_seconds"] = position.cpu_seconds + time.process_time()  # user and system, of all threads
            folder.log(f"epoch {position.epoch} of {config.epochs}, loss {metrics['loss']:.4f}")
            position.next_epoch(metrics)
            save()

            # Record the metrics and the skipped images, and report
            folder.record(position.metrics)
            skipped = gather_objects(data.reader.skipped_paths() | val_reader.skipped_paths(), world)
            folder.write_skipped({path: reason for share in skipped for path, reason in share.items()})
            if report is not None and world.writes:
                report(metrics)

    # After the last epoch
    folder.close()
    learner.consolidate(checkpoints, position.step)
    skipped_counts = gather_objects(len(data.reader.skipped) + len(val_reader.skipped), world)
    return FitResult(folder.path, position.best, position.metrics[-1], sum(skipped_counts), world.writes)


def _no_state(folder: RunFolder, world: World) -> tuple[None, None]:
    """Check that a new run can have its folder."""
    if world.writes:
        folder.refuse_taken(folder.path)
    smallest(0, world)  # a barrier: no process writes before the check
    return None, None


def _last_state(
    config: FitConfig, folder: RunFolder, checkpoints: Checkpoints, world: World
) -> tuple[dict[str, Any] | None, Path | None]:
    """The state of the last checkpoint, and with fsdp the folder of its shards; None if there is no checkpoint."""
    old_config = folder.params()
    if old_config is None:
        if not folder.checkpoints.is_dir():
            folder.refuse_taken(folder.path)
        return None, None
    old, new = old_config.decisive(), config.decisive()
    if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        name = changed[0]
        raise ClipretError(
            f"the run in {folder.path} was started with another {', '.join(changed)} ({name}: {old.get(name)!r}, now "
            f"{new.get(name)!r}): continue with  clipret-train fit --resume --out {folder.path}  or choose a new folder"
        )
    if world.writes:
        checkpoints.sweep()
    if not config.fsdp:
        return checkpoints.load_state(), None
    shards, state = latest_shards(checkpoints.folder, checkpoints.identity) or (None, None)
    return state, shards


def _progress(position: Position, batch: int, world: World) -> "tqdm[Any]":
    hidden = None if world.writes else True  # None: hidden if stderr is not a terminal
    total, done = position.steps * batch, position.step * batch
    return tqdm(total=total, initial=done, unit="image", disable=hidden, dynamic_ncols=True, leave=False)


def _epoch_metrics(config: FitConfig, position: Position, lr: float, learner: Learner, world: World) -> dict[str, Any]:
    """The metrics of an epoch's training steps."""
    images = len(position.losses) * position.size * world.size
    metrics: dict[str, Any] = {
        "epoch": position.epoch,
        "step": position.step,
        "loss": sum(position.losses) / len(position.losses),
        "batch_accuracy": sum(position.accuracies) / len(position.accuracies),
        "lr": lr,
        "logit_scale": learner.logit_scale(),
        "images_per_second": images / max(position.seconds, 1e-9),
    }
    return metrics | ({"overflows": position.overflows} if config.precision == "fp16" else {})


def _not_finite(
    config: FitConfig,
    loss: float,
    suspects: list[Path],
    position: Position,
    folder: RunFolder,
    checkpoints: Checkpoints,
) -> ClipretError:
    """The error for a loss that is not finite, with the images that caused it. The weights did not change."""
    problem = f"the loss is {loss} at step {position.step} of epoch {position.epoch}"
    paths = [str(path) for path in suspects]
    folder.log(f"stopped: {problem}; its images: {', '.join(paths)}")
    listed = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more, see log.txt" if len(paths) > 3 else "")
    last = f"; the last checkpoint is intact: {checkpoints.last}" if checkpoints.last.exists() else ""
    return ClipretError(f"{problem} with {listed}: check these images, or lower --lr ({config.lr}){last}")
