"""Training: from a list of pictures and titles to a run folder. `fit` and `_Training` read top to bottom."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from tqdm import tqdm

from clipret.errors import ClipretError
from clipret_training.checkpoint import Checkpoints
from clipret_training.config import FitConfig
from clipret_training.data.attributes import Attributes
from clipret_training.data.augment import Augmenter
from clipret_training.data.batches import Pictures, Texts
from clipret_training.distributed.fsdp import latest_shards
from clipret_training.distributed.world import World, gather_objects, join, smallest
from clipret_training.learner import Learner
from clipret_training.listing import read_listings
from clipret_training.optim.schedule import learning_rate
from clipret_training.run import RunFolder, claimed
from clipret_training.seeds import generator, seed_of
from clipret_training.step import Batch, GradientStep, StepResult
from clipret_training.validation import normalise, quality, recall

__all__ = ["FitResult", "fit"]

_MACHINE = ("cache_limit", "device", "save_every", "tensorboard", "threads")  # may differ when a run is resumed


@dataclass(frozen=True)
class FitResult:
    """`best` and `last` are lines of metrics.jsonl; `skipped` counts the pictures that could not be read. `writes`:
    whether this is the one process of several that should print it."""

    run: Path
    best: dict[str, Any]
    last: dict[str, Any]
    skipped: int
    writes: bool = True


@dataclass
class _Position:
    """Where a training is; what a checkpoint says beside weights and optimiser. Random numbers need nothing: each
    step's are decided by the seed and the step."""

    epoch: int = 1
    step: int = 0
    consumed: int = 0  # pictures of this epoch's order, of this process
    left: list[int] = field(default_factory=list)  # of the epoch before: too few for a batch, they begin this one
    size: int = 0  # pictures of this process in a step of this epoch; 0 before it has begun
    losses: list[float] = field(default_factory=list)  # of this epoch's steps
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0  # that they took
    overflows: int = 0  # steps that fp16 skipped
    steps: int = 0  # of all epochs
    cpu_seconds: float = 0.0  # of the processes before this one
    metrics: list[dict[str, Any]] = field(default_factory=list)  # of the epochs before
    best: dict[str, Any] = field(default_factory=dict)


def fit(
    config: FitConfig, out: Path, report: Callable[[dict[str, Any]], None] | None = None, *, resume: bool = False
) -> FitResult:
    """Train as `config` says and leave a run folder at `out`; `report` is called with each epoch's metrics.

    With `resume` a run that was begun at `out` with the same configuration goes on after its last checkpoint and ends
    with the weights that it would have had without the interruption; one that is not there begins. Under torchrun
    every process calls this alike.

    Raises ClipretError: `out` is taken, holds another run or one that is being trained, a list or the model cannot be
    read, no picture can be read, the disk is full, or the loss is no longer a number.
    """
    with join(config.device) as world, claimed(out) if world.writes else contextlib.nullcontext():
        return _Training(config, out, world, report, resume=resume).run()


class _Training:
    def __init__(
        self,
        config: FitConfig,
        out: Path,
        world: World,
        report: Callable[[dict[str, Any]], None] | None,
        *,
        resume: bool,
    ) -> None:
        self.config, self.world, self.device, self.report = config, world, world.device, report
        self.folder = RunFolder(out, writes=world.writes)
        self.checkpoints = Checkpoints(self.folder.checkpoints, _identity(config, world.size))
        if config.batch_size % (world.size * config.accumulate):
            raise ClipretError(
                f"batch_size {config.batch_size} does not split over {world.size} processes with {config.accumulate} "
                "parts each"
            )
        self.shards: Path | None = None
        saved = self._claim(resume)
        torch.set_num_threads(config.threads)

        self.train_list, self.val_list = read_listings(config)
        self.fingerprint = self.train_list.fingerprint()
        if saved is not None and saved["listing"] != self.fingerprint:
            raise ClipretError(f"{config.data} is not what it was when this run began: put the old list back")
        self.learner = Learner(config, self.train_list.pairs.titles, world, self.checkpoints.last if saved else None)
        self.loaded = self.learner.loaded
        self.texts = Texts(self.loaded, self.train_list, config.seed)
        self.val_texts = Texts(self.loaded, self.val_list)
        more = Path(config.attributes) if config.attributes is not None else None
        wanted = config.negatives or config.loss == "soft"
        self.attributes = Attributes(self.loaded, self.train_list, more) if wanted else None
        self.mine = range(world.rank, len(self.train_list.pairs.paths), world.size)  # the share of this process
        self.pictures, self.val_pictures = self._open_pictures()
        image = self.loaded.image
        self.augment = Augmenter(
            config.augment,
            config.crop_size or image.size,
            config.crop_area,
            config.jitter,
            flip=config.flip,
            rotation=config.rotation,
            random_ops=config.random_ops,
            magnitude=config.magnitude,
            fill=image.fill if config.repad and image.resize == "longest" else None,
        )
        self.gradients = GradientStep(
            self.learner.model,
            config.loss_config,
            precision=config.precision,
            device=self.device,
            parts=config.accumulate,
            compiled=config.compile,
            seed=(config.seed, "dropout", world.rank),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.at = _Position()
        if saved is None:
            self._begin()
        else:
            self._go_on(saved)

    def run(self) -> FitResult:
        config, at = self.config, self.at
        if config.tensorboard:
            self.folder.open_board(at.step)
        batch = self.local_batch * self.world.size
        hidden = None if self.world.writes else True  # None: where stderr is no terminal
        with tqdm(
            total=at.steps * batch,
            initial=at.step * batch,
            unit="picture",
            disable=hidden,
            dynamic_ncols=True,
            leave=False,
        ) as bar:
            while at.epoch <= config.epochs:
                self._train_epoch(bar)
                self._finish_epoch()
        self.folder.close()
        self.learner.consolidate(self.checkpoints, at.step)
        skipped = gather_objects(len(self.pictures.skipped) + len(self.val_pictures.skipped), self.world)
        return FitResult(self.folder.path, at.best, at.metrics[-1], sum(skipped), self.world.writes)

    def _claim(self, resume: bool) -> dict[str, Any] | None:
        """The state of the checkpoint to go on from; None where the run begins."""
        folder = self.folder
        if not resume:
            if self.world.writes:
                folder.refuse_taken(folder.path)
            smallest(0, self.world)  # nobody writes before that is known
            return None
        before = folder.params()
        if before is None:
            if not folder.checkpoints.is_dir():
                folder.refuse_taken(folder.path)
            return None
        old, new = _decisive(before), _decisive(self.config)
        if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            name = changed[0]
            raise ClipretError(
                f"{folder.path} was begun with another {', '.join(changed)} ({name}: {old.get(name)!r}, now "
                f"{new.get(name)!r}): go on with  clipret-train resume {folder.path}  or train into a new folder"
            )
        if self.world.writes:
            self.checkpoints.sweep()
        if not self.config.fsdp:
            return self.checkpoints.load_state()
        if (found := latest_shards(self.checkpoints.folder, self.checkpoints.identity)) is None:
            return None
        self.shards, state = found
        return state

    def _open_pictures(self) -> tuple[Pictures, Pictures]:
        """Those of this process, to train on and held out."""
        config, world, spec = self.config, self.world, self.loaded.image
        limit = int(config.cache_limit * 2**30) // world.size
        larger = msgspec.structs.replace(spec, size=round(spec.size * config.decode_scale))
        train = Pictures(
            self.train_list.subset(self.mine), larger, threads=config.threads, cache_limit=limit, fast=True
        )
        # Asked here: what nobody can read is said before anything is written.
        if bad := [reason for reason in gather_objects(train.unreadable(), world) if reason is not None]:
            raise ClipretError(f"none of the {len(self.mine)} pictures can be read{bad[0]}; check --image-root")
        held_out = range(world.rank, len(self.val_list.pairs.paths), world.size)
        left = max(limit - train.cached, 0)
        val = Pictures(self.val_list.subset(held_out), spec, threads=config.threads, cache_limit=left)
        bad = [reason for reason in gather_objects(val.unreadable(), world) if reason is not None]
        if len(bad) == world.size:  # one process alone may have none
            raise ClipretError(
                f"none of the {len(self.val_list.pairs.paths)} pictures held out for validation can be read{bad[0]}: "
                "hold out others with --val, --val-where, --val-split or --seed"
            )
        return train, val

    def _begin(self) -> None:
        self.folder.begin(self.config.to_dict(), self.loaded)
        readable = smallest(len(self.mine) - len(self.pictures.skipped), self.world)
        self.at.steps = max(self.config.epochs * readable // self.local_batch, self.config.epochs)
        count, titles = len(self.train_list.pairs.paths), len(self.train_list.pairs.titles)
        held_out = len(self.val_list.pairs.paths)
        self.folder.log(f"clipret {version('clipret')}, torch {torch.__version__}, {self.world.size} processes")
        self.folder.log(f"{count} pictures with {titles} titles to train on, {held_out} held out")

    def _go_on(self, saved: dict[str, Any]) -> None:
        positions: list[dict[str, Any]] = saved["positions"]
        self.at = _Position(**positions[self.world.rank])
        self.pictures.skipped |= saved["skipped"][self.world.rank]
        self.learner.load_state(saved["learner"], self.shards)
        self.scaler.load_state_dict(saved["scaler"])
        self.folder.record(self.at.metrics)
        self.folder.log(f"goes on after step {self.at.step}")

    @property
    def local_batch(self) -> int:
        """Pictures of this process in a step."""
        readable = max(len(self.mine) - len(self.pictures.skipped), 1)
        return min(self.config.batch_size // self.world.size, smallest(readable, self.world))

    def _train_epoch(self, bar: Any) -> None:
        at, world = self.at, self.world
        self.learner.train()
        draw = generator(self.config.seed, "order", at.epoch, world.rank)
        order: list[int] = at.left + torch.randperm(len(self.mine), generator=draw).tolist()
        at.size = at.size or self.local_batch
        self._steps(order, bar)
        # Of streamed pictures only now is known which can be read: they may be too few for the batch that was tried.
        while not at.losses and (size := self.local_batch) < at.size:
            at.size = size
            self._steps(order, bar)
        if not at.losses:
            raise ClipretError(f"none of the {len(self.mine)} pictures can be read any more{self.pictures.example()}")
        at.left = [picture for picture in order[at.consumed :] if picture not in self.pictures.skipped]

    def _steps(self, order: list[int], bar: Any) -> None:
        """Those of an epoch that are still to be done, as long as `order` has whole batches."""
        config, at, world = self.config, self.at, self.world
        before = time.perf_counter()
        for chosen, pixels in self._whole_batches(order[at.consumed :], at.size):
            at.step += 1
            lr = self._learning_rate()
            result = self._step(chosen, pixels, lr)
            at.losses.append(result.loss)
            at.accuracies.append(result.accuracy)
            for picture in chosen:  # the unreadable ones between them are behind us, too
                at.consumed = order.index(picture, at.consumed) + 1
            at.seconds, before = at.seconds + time.perf_counter() - before, time.perf_counter()
            bar.update(at.size * world.size)
            if at.step % 10 == 0 or at.step == 1:
                bar.set_postfix_str(f"epoch {at.epoch}, loss {result.loss:.3f}, accuracy {100 * result.accuracy:.0f}%")
            self.folder.scalars(at.step, {"loss": result.loss, "accuracy": result.accuracy, "learning_rate": lr})
            if config.save_every and at.step % config.save_every == 0:
                self._save()

    def _learning_rate(self) -> float:
        """That of the step which the training is at."""
        config, at = self.config, self.at
        return learning_rate(at.step, at.steps, lr=config.lr, warmup=config.warmup, schedule=config.schedule)

    def _whole_batches(self, order: list[int], size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Batches as long as every process has a whole one: a smaller one would have too few negatives. What is left
        over begins the next epoch."""
        batches = self.pictures.batches(order, size)
        while True:
            chosen, pixels = next(batches, ([], torch.empty(0)))
            if not smallest(len(chosen) == size, self.world):
                return
            yield chosen, pixels

    def _step(self, chosen: list[int], pixels: Tensor, lr: float) -> StepResult:
        """One step of the optimiser on these pictures, positions among this process's."""
        config, at, learner = self.config, self.at, self.learner
        draw = generator(config.seed, "step", at.step, self.world.rank)
        pictures = [self.mine[position] for position in chosen]  # as the texts number them
        titles, owners = self.texts.sample(pictures, config.captions, at.epoch)  # [T]
        images = normalise(self.loaded, self.augment(pixels.to(self.device), draw))  # [B,3,S,S]
        texts = self.texts.batch(titles, config.accumulate)
        extra: dict[str, Tensor] = {}
        if config.negatives and self.attributes is not None:
            swapped = self.attributes.negatives(pictures, titles, owners, draw)
            extra |= dict(zip(("negatives", "negative_keys"), swapped, strict=True))
        if config.loss == "soft" and self.attributes is not None:
            named = self.attributes.named(pictures, titles)
            extra |= dict(zip(("image_attributes", "text_attributes"), named, strict=True))
        batch = Batch(images, texts, *self.texts.keys(pictures, titles, owners), **extra)
        learner.optimizer.zero_grad(set_to_none=True)
        result = self.gradients(batch, at.step, self.scaler.scale)
        if not math.isfinite(result.loss):
            self._stop(result, pictures)
        learner.average_gradients()
        learner.set_lr(lr)
        self.scaler.unscale_(learner.optimizer)
        learner.clip(config.clip)
        before = self.scaler.get_scale()
        self.scaler.step(learner.optimizer)
        self.scaler.update()
        overflow = self.scaler.get_scale() < before
        at.overflows += overflow
        learner.after_step(changed=not overflow)
        return result

    def _stop(self, result: StepResult, pictures: list[int]) -> None:
        """Say which pictures made the loss no number; weights and checkpoints are as they were before the step."""
        at, paths = self.at, self.train_list.pairs.paths
        guilty = [str(paths[pictures[place]]) for place in result.broken or range(len(pictures))]
        what = f"the loss is {result.loss} at step {at.step} of epoch {at.epoch}"
        self.folder.log(f"stopped: {what}; its pictures: {', '.join(guilty)}")
        named = ", ".join(guilty[:3]) + (f" and {len(guilty) - 3} more, see log.txt" if len(guilty) > 3 else "")
        last = f"; the last checkpoint is intact: {self.checkpoints.last}" if self.checkpoints.last.exists() else ""
        raise ClipretError(f"{what} with {named}: look at them, or lower --lr ({self.config.lr}){last}")

    def _finish_epoch(self) -> None:
        """Measure, note, save."""
        config, at = self.config, self.at
        metrics: dict[str, Any] = {
            "epoch": at.epoch,
            "step": at.step,
            "loss": sum(at.losses) / len(at.losses),
            "batch_accuracy": sum(at.accuracies) / len(at.accuracies),
            "lr": self._learning_rate(),
            "logit_scale": self.learner.logit_scale(),
            "pictures_per_second": len(at.losses) * at.size * self.world.size / max(at.seconds, 1e-9),
        }
        if config.precision == "fp16":
            metrics["overflows"] = at.overflows
        if at.epoch % config.validate_every == 0 or at.epoch == config.epochs:
            pairs = self.val_list.pairs
            with self.learner.averaged():
                metrics |= recall(self.loaded, pairs, self.val_pictures, self.val_texts, self.device, self.world)
                self.folder.scalars(at.step, {f"recall_at_10/{way}": metrics[way]["recall_at_10"] for way in _WAYS})
                self.folder.scalars(at.step, {"logit_scale": metrics["logit_scale"]})
                if not at.best or quality(metrics) > quality(at.best):
                    at.best = metrics
                    self.learner.save_best(self.checkpoints, at.step)
        metrics["cpu_seconds"] = at.cpu_seconds + time.process_time()  # user and system, of all threads
        at.metrics.append(metrics)
        self.folder.log(f"epoch {at.epoch} of {config.epochs}, loss {metrics['loss']:.4f}")
        at.epoch, at.consumed, at.size, at.seconds, at.losses, at.accuracies = at.epoch + 1, 0, 0, 0.0, [], []
        self._save()
        self.folder.record(at.metrics)
        skipped = gather_objects(self.pictures.skipped_paths() | self.val_pictures.skipped_paths(), self.world)
        self.folder.write_skipped({path: reason for share in skipped for path, reason in share.items()})
        if self.report is not None and self.world.writes:
            self.report(metrics)

    def _save(self) -> None:
        position = dataclasses.replace(self.at, cpu_seconds=self.at.cpu_seconds + time.process_time())
        state = {
            "positions": gather_objects(dataclasses.asdict(position), self.world),
            "skipped": gather_objects(self.pictures.skipped, self.world),
            "listing": self.fingerprint,
            "scaler": self.scaler.state_dict(),
            "config": self.config.to_dict(),
        }
        self.learner.save_last(self.checkpoints, state, self.at.step, self.at.epoch)


_WAYS = ("text_to_image", "image_to_text")


def _identity(config: FitConfig, size: int) -> str:
    """What a checkpoint says of the run that it is of, `size` processes. Options that are newer than the first runs do
    not count where they are left out, so that an older run is still its own."""
    values = {name: value for name, value in _decisive(config).items() if (name, value) not in _LATER}
    return f"{seed_of(json.dumps(values), size):016x}"


_LATER = {("optimizer", "adamw")}


def _decisive(config: FitConfig) -> dict[str, Any]:
    """What decides the weights that a training ends with."""
    return {name: value for name, value in config.to_dict().items() if name not in _MACHINE}
