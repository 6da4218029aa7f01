"""Checkpoints that survive a killed process and a full disk.

    last.safetensors    the weights after a step; its metadata has the number of the step
    state-STEP.pt       what else resuming needs: optimiser, scaler, position, metrics so far
    best.safetensors    the weights of the best epoch

Renaming last.safetensors commits a checkpoint. The state file gets its final name before this rename, and the state
file of the previous checkpoint is removed after it. So the state file of last.safetensors is always there and complete.
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
    """How far a training is. Checkpoints store it with the weights and the optimiser.

    It has no state of random generators: the seed and the step decide all random numbers of a step.
    """

    epoch: int = 1
    step: int = 0
    consumed: int = 0  # images of this epoch's order that this process has used
    left: list[int] = field(default_factory=list)  # images left from the last epoch, too few for a batch
    size: int = 0  # images of this process in a step of this epoch; 0 before its first step
    losses: list[float] = field(default_factory=list)  # of this epoch's steps
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0  # duration of this epoch's steps
    overflows: int = 0  # steps that fp16 skipped
    steps: int = 0  # of all epochs
    cpu_seconds: float = 0.0  # of earlier processes of this run
    metrics: list[dict[str, Any]] = field(default_factory=list)  # of the finished epochs
    best: dict[str, Any] = field(default_factory=dict)

    def next_epoch(self, metrics: dict[str, Any]) -> None:
        """Go on to the next epoch.

        Args:
            metrics: Those of the epoch that is finished.
        """
        self.metrics.append(metrics)
        self.epoch, self.consumed, self.size, self.seconds = self.epoch + 1, 0, 0, 0.0
        self.losses, self.accuracies = [], []


class Checkpoints:
    """The folder of a run's checkpoints.

    Args:
        folder: The folder `checkpoints` of the run folder.
        identity: `FitConfig.identity` of the run. Checkpoints with another one are refused.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.last, self.best = folder / LAST, folder / BEST

    def save_last(self, weights: Mapping[str, Tensor], state: Mapping[str, Any], step: int) -> None:
        """Write last.safetensors and its state file.

        Args:
            weights: Tensors by name.
            state: What resuming needs. The values must be tensors or plain data.
            step: The step after which the training has these weights.

        Raises:
            ClipretError: Writing failed. The previous checkpoint is unchanged.
        """
        with self._intact():
            new_weights = self._write_aside(self.last, lambda path: self._save_weights(weights, path, step))
            file = self._state_file(step)
            new_state = self._write_aside(file, lambda path: torch.save({**state, "identity": self.identity}, path))
            new_state.replace(file)
            sync_folder(self.folder)
            new_weights.replace(self.last)
            sync_folder(self.folder)
        for state_file in self.folder.glob("state-*.pt"):
            if state_file != file:
                state_file.unlink()

    def save_best(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write best.safetensors; see `save_weights`."""
        self.save_weights(self.best, weights, step)

    def save_weights(self, file: Path, weights: Mapping[str, Tensor], step: int) -> None:
        """Write weights without a state file.

        Args:
            file: The file to write or replace.
            weights: Tensors by name.
            step: The step after which the training has these weights.

        Raises:
            ClipretError: Writing failed. The previous file is unchanged.
        """
        with self._intact():
            self._write_aside(file, lambda path: self._save_weights(weights, path, step)).replace(file)
            sync_folder(self.folder)

    def load_state(self) -> dict[str, Any] | None:
        """Read the state of the last checkpoint.

        Returns:
            What `save_last` got as `state`, or None if there is no checkpoint yet.

        Raises:
            ClipretError: A file is damaged, or weights and state are not from this run.
        """
        if not self.last.is_file():
            return None
        try:
            with safetensors.safe_open(self.last, framework="pt") as file:
                metadata = file.metadata() or {}
            metadata = json.loads(metadata.get("checkpoint", "null")) or metadata  # older files have a key for each
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise ClipretError(
                f"checkpoint {self.last} cannot be read: {error}; train again in a new folder"
            ) from error
        state_file = self._state_file(metadata.get("step", "none"))
        if metadata.get("identity") != self.identity or not state_file.is_file():
            missing = f" ({state_file.name} is missing)" if metadata.get("identity") == self.identity else ""
            raise ClipretError(
                f"checkpoint {self.last} is from another run or model{missing}: restore the file that this training "
                "wrote, or train into a new folder"
            )
        state = read_state(state_file)
        if state["identity"] != self.identity:
            raise ClipretError(f"{state_file} is from another run: restore the file that this training wrote")
        return state

    def sweep(self) -> None:
        """Remove temporary files of a killed process."""
        for file in self.folder.glob(".*.tmp"):
            file.unlink()

    def _state_file(self, step: int | str) -> Path:
        return self.folder / f"state-{step}.pt"

    def _save_weights(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        # One key: safetensors writes several keys in random order.
        save_file(on_cpu, path, metadata={"checkpoint": json.dumps({"step": step, "identity": self.identity})})

    def _write_aside(self, path: Path, write: Callable[[Path], object]) -> Path:
        """Write a temporary file in the folder of `path` and sync it to disk."""
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
            previous = "the previous checkpoint is intact" if self.last.exists() else "there is no checkpoint yet"
            raise ClipretError(
                f"a checkpoint cannot be written to {self.folder}: {reason}; {previous}: free space, then run  "
                f"clipret-train fit --resume --out {self.folder.parent}"
            ) from error


def read_state(file: Path) -> dict[str, Any]:
    """Read a state file without running code from it.

    Raises:
        ClipretError: The file is damaged or has other objects than tensors and plain data.
    """
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile's, pickle's and torch's errors have no common base
        reason = one_line(error)
        raise ClipretError(f"{file} cannot be read: {reason}; train again in a new folder") from error
    return state
