"""The run folder: all files that a training writes."""

import contextlib
import json
import logging
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import tomli_w
from safetensors.torch import save
from torch import Tensor

from clipret.errors import ClipretError
from clipret.files import write_file
from clipret_training.config import FitConfig
from clipret_training.filenames import CHECKPOINTS, METRICS, PARAMS, SKIPPED
from clipret_training.models import LoadedModel, describe

__all__ = ["RunFolder", "claimed"]

_log = logging.getLogger(__name__)

_LOCK = "run.lock"
_SECONDS = 2  # how long to wait for the lock: torchrun restarts a run that it has just stopped


class RunFolder:
    """A run folder with these files:

        params.toml     the FitConfig
        model.json      the model; with tokenizer.json and, for open_clip's models, open_clip_config.json
        log.txt         events with date and time
        metrics.jsonl   a line for each epoch
        skipped.tsv     images that could not be read, with the reason
        tensorboard/    metrics of each step, if `tensorboard` is set
        checkpoints/    last.safetensors, best.safetensors and what resuming needs; see checkpoint.py
        adapter/        the adapter of the best epoch in PEFT's layout, if one is trained
        run.lock        while a process trains in this folder, see `claimed`

    All files except the log and TensorBoard's are written atomically.

    Args:
        path: The folder.
        writes: Whether this process is the one of several that writes the files.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.checkpoints = path, path / CHECKPOINTS
        self._writes = writes
        self._board: Any = None

    @classmethod
    def create(cls, path: Path, params: Mapping[str, Any], loaded: LoadedModel) -> Self:
        """Create a run folder and write the files that are known before the first step.

        Args:
            path: The folder; it must not exist or be empty.
            params: The content of params.toml.
            loaded: The model.

        Raises:
            ClipretError: The folder is not empty or cannot be written.
        """
        cls.refuse_taken(path)
        run = cls(path)
        run.begin(params, loaded)
        return run

    def begin(self, params: Mapping[str, Any], loaded: LoadedModel) -> None:
        """Write the files as `create` does, in a folder that may have files of a training without a checkpoint."""
        if not self._writes:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClipretError(f"{self.path} cannot be written: {error.strerror}; choose another folder") from error
        settings = {name: value for name, value in params.items() if value is not None}  # TOML has no null
        for name, content in describe(loaded).items():
            write_file(self.path / name, content)
        write_file(self.path / PARAMS, tomli_w.dumps(settings))

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """Check that a path is free: it does not exist, or is a folder that is empty except for a lock file.

        Raises:
            ClipretError: It is not.
        """
        if path.exists() and (not path.is_dir() or any(file.name != _LOCK for file in path.iterdir())):
            raise ClipretError(
                f"{path} exists and is not empty: choose a new folder for this run, pass --resume to continue the run "
                "in it, or remove it"
            )

    def params(self) -> FitConfig | None:
        """Read the configuration of the run, None if there is none."""
        file = self.path / PARAMS
        return FitConfig.read(file) if file.is_file() else None

    def log(self, line: str) -> None:
        """Log a line and add it to log.txt with date and time."""
        _log.info(line)
        if self._writes:
            with (self.path / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")

    def record(self, metrics: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl with a line for each epoch."""
        if self._writes:
            write_file(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in metrics))

    def open_board(self, step: int) -> None:
        """Open TensorBoard's files. Values of steps after `step`, from before a resumption, are hidden."""
        if self._writes:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(self.path / "tensorboard", purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step to TensorBoard, if it is open."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close TensorBoard's files."""
        if self._board is not None:
            self._board.close()

    def write_skipped(self, skipped: Mapping[Path, str]) -> None:
        """Write skipped.tsv: images that could not be read, with the reason."""
        if self._writes:
            lines = (f"{path}\t{reason}\n" for path, reason in skipped.items())
            write_file(self.path / SKIPPED, "path\treason\n" + "".join(lines))

    def save(self, loaded: LoadedModel, name: str) -> None:
        """Write the weights to checkpoints/NAME.safetensors, without a state file."""
        weights: dict[str, Tensor] = loaded.model.state_dict()
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
        write_file(self.checkpoints / f"{name}.safetensors", save(on_cpu))


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Lock a run folder, so that only this process trains in it inside the block.

    The folder is created if it does not exist, and then removed again if it is still empty after the block.

    Args:
        path: The run folder.

    Raises:
        ClipretError: Another process trains in the folder, it has other files than those of a run, or it cannot be
            written.
    """
    try:
        if not any((path / name).exists() for name in (_LOCK, PARAMS, CHECKPOINTS)):
            RunFolder.refuse_taken(path)  # before a lock file is written into a folder that is not a run
        created = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path / _LOCK)
    except OSError as error:
        raise ClipretError(f"{path} cannot be written: {error.strerror}; choose another folder") from error
    if lock is None:
        raise ClipretError(f"run {path} is being trained by another process: wait for it, or choose another folder")
    with contextlib.closing(lock):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows cannot remove an open file; the file does no harm
                (path / _LOCK).unlink()
                if created:
                    path.rmdir()


def _locked(file: Path) -> sqlite3.Connection | None:
    """Lock a file with SQLite's lock on an empty database, which works the same on every system.

    The lock lasts until the connection is closed or the process ends in any way. None if another process has the lock.
    """
    while True:
        file.touch()
        before = file.stat().st_ino
        lock = sqlite3.connect(file, timeout=_SECONDS)
        try:
            lock.execute("PRAGMA journal_mode = OFF")  # creates no second file
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                lock.close()
                return None
            # Some clusters have a file system without locks. Then the training goes on without one.
        # Another process may have removed the file just before it released the lock.
        if file.exists() and file.stat().st_ino == before:
            return lock
        lock.close()
