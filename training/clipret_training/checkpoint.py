"""Checkpoints that a kill or a full disk cannot spoil.

    last.safetensors    the weights after a step, which its metadata names
    state-STEP.pt       what else resuming needs: optimiser, scaler, position, metrics so far
    best.safetensors    the weights of the best epoch

A checkpoint is committed by one rename, that of last.safetensors: its state is under its final name before, and the
state of the checkpoint before it is removed only after. So whatever last.safetensors names is there and whole.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from clipret.errors import ClipretError, one_line
from clipret.files import sync_folder
from clipret_training.filenames import BEST, LAST

__all__ = ["Checkpoints", "Position", "read_state"]


@dataclass
class Position:
    """Where a training is; what a checkpoint stores in addition to weights and optimizer. Random numbers need nothing:
    each step's are decided by the seed and the step."""

    epoch: int = 1
    step: int = 0
    consumed: int = 0  # images of this epoch's order, of this process
    left: list[int] = field(default_factory=list)  # of the epoch before: too few for a batch, they begin this one
    size: int = 0  # images of this process in a step of this epoch; 0 before it has begun
    losses: list[float] = field(default_factory=list)  # of this epoch's steps
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0  # that they took
    overflows: int = 0  # steps that fp16 skipped
    steps: int = 0  # of all epochs
    cpu_seconds: float = 0.0  # of the processes before this one
    metrics: list[dict[str, Any]] = field(default_factory=list)  # of the epochs before
    best: dict[str, Any] = field(default_factory=dict)

    def next_epoch(self, metrics: dict[str, Any]) -> None:
        """This epoch is done and these are its metrics."""
        self.metrics.append(metrics)
        self.epoch, self.consumed, self.size, self.seconds = self.epoch + 1, 0, 0, 0.0
        self.losses, self.accuracies = [], []


class Checkpoints:
    """The folder `checkpoints` of a run. `identity` is the run's own: weights of another run are refused."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.last, self.best = folder / LAST, folder / BEST

    def save_last(self, weights: Mapping[str, Tensor], state: Mapping[str, Any], step: int) -> None:
        """Raises ClipretError when the disk refuses; the checkpoint before is then as it was."""
        with self._intact():
            new_weights = self._write_aside(self.last, lambda path: self._save_weights(weights, path, step))
            file = self._state_file(step)
            new_state = self._write_aside(file, lambda path: torch.save({**state, "identity": self.identity}, path))
            new_state.replace(file)
            sync_folder(self.folder)
            new_weights.replace(self.last)
            sync_folder(self.folder)
        for old in self.folder.glob("state-*.pt"):
            if old != file:
                old.unlink()

    def save_best(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Raises ClipretError when the disk refuses; the file before is then as it was."""
        self.save_weights(self.best, weights, step)

    def save_weights(self, file: Path, weights: Mapping[str, Tensor], step: int) -> None:
        with self._intact():
            self._write_aside(file, lambda path: self._save_weights(weights, path, step)).replace(file)
            sync_folder(self.folder)

    def load_state(self) -> dict[str, Any] | None:
        """The state of the last checkpoint, whose weights are in `last`; None when there is none yet.

        Raises ClipretError when it is broken, or when weights and state are not of one run.
        """
        if not self.last.is_file():
            return None
        try:
            with safetensors.safe_open(self.last, framework="pt") as opened:
                metadata = opened.metadata() or {}
            metadata = json.loads(metadata.get("checkpoint", "null")) or metadata  # older ones had a key for each
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise ClipretError(f"checkpoint {self.last} cannot be read: {error}; start the run again") from None
        file = self._state_file(metadata.get("step", "none"))
        if metadata.get("identity") != self.identity or not file.is_file():
            missing = f" ({file.name} is missing)" if metadata.get("identity") == self.identity else ""
            raise ClipretError(
                f"checkpoint {self.last} is of another run or model{missing}: put back the file that this training "
                "wrote, or train into a new folder"
            )
        state = read_state(file)
        if state["identity"] != self.identity:
            raise ClipretError(f"{file} is of another run: put back the file that this training wrote")
        return state

    def sweep(self) -> None:
        """Remove what a killed process left half written."""
        for file in self.folder.glob(".*.tmp"):
            file.unlink()

    def _state_file(self, step: int | str) -> Path:
        return self.folder / f"state-{step}.pt"

    def _save_weights(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        # Under one key: safetensors writes several in an order that chance decides.
        save_file(on_cpu, path, metadata={"checkpoint": json.dumps({"step": step, "identity": self.identity})})

    def _write_aside(self, path: Path, write: Callable[[Path], object]) -> Path:
        """A temporary file next to `path`, complete and on the disk."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        return temporary

    @contextlib.contextmanager
    def _intact(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch.save raises RuntimeError
            for file in self.folder.glob(".*.tmp"):
                with contextlib.suppress(OSError):
                    file.unlink()
            reason = one_line(error)
            before = "the checkpoint before is intact" if self.last.exists() else "there is no checkpoint yet"
            raise ClipretError(
                f"a checkpoint cannot be written to {self.folder}: {reason}; {before}: free space, then run  "
                f"clipret-train fit --resume --out {self.folder.parent}"
            ) from None


def read_state(file: Path) -> dict[str, Any]:
    """Raises ClipretError when a state file is broken or holds more than data."""
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile's, pickle's and torch's errors have no common base
        reason = one_line(error)
        raise ClipretError(f"{file} cannot be read: {reason}; start the run again in a new folder") from None
    return state
