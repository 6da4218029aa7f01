"""The run folder: everything that a training leaves behind."""

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
_SECONDS = 2  # until the lock of another process is believed: torchrun starts a run again that it has just ended


class RunFolder:
    """params.toml      the FitConfig
    model.json          what rebuilds the model, with tokenizer.json and, for open_clip's models, open_clip_config.json
    log.txt             what happened, with the time of day
    metrics.jsonl       a line for each epoch
    skipped.tsv         images that could not be read, with the reason
    tensorboard/        the course of each step, where it is asked for
    checkpoints/        last.safetensors, best.safetensors and what resuming needs; see checkpoint.py
    adapter/            the adapter of the best epoch in PEFT's layout, where one is trained
    run.lock            while a process trains here, see `claimed`

    Every file but the log and TensorBoard's is written whole or not at all. Of several processes one `writes`.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.checkpoints = path, path / CHECKPOINTS
        self._writes = writes
        self._board: Any = None

    @classmethod
    def create(cls, path: Path, params: Mapping[str, Any], loaded: LoadedModel) -> Self:
        """Make the folder and write what is known before the first step. Raises ClipretError when `path` is taken."""
        cls.refuse_taken(path)
        run = cls(path)
        run.begin(params, loaded)
        return run

    def begin(self, params: Mapping[str, Any], loaded: LoadedModel) -> None:
        """The same where the folder may hold the remains of a training that was killed before its first checkpoint."""
        if not self._writes:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClipretError(f"{self.path} cannot be written: {error.strerror}; choose another place") from None
        given = {name: value for name, value in params.items() if value is not None}  # TOML knows no null
        for name, content in describe(loaded).items():
            write_file(self.path / name, content)
        write_file(self.path / PARAMS, tomli_w.dumps(given))

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """Raise ClipretError unless `path` is free: absent, or a folder with nothing but a lock in it."""
        if path.exists() and (not path.is_dir() or any(file.name != _LOCK for file in path.iterdir())):
            raise ClipretError(
                f"{path} exists and is not empty: name a new folder for this run, pass --resume to go on with it, "
                "or remove it"
            )

    def params(self) -> FitConfig | None:
        """The configuration that the folder was begun with; None when there is none."""
        file = self.path / PARAMS
        return FitConfig.read(file) if file.is_file() else None

    def log(self, line: str) -> None:
        _log.info(line)
        if self._writes:
            with (self.path / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")

    def record(self, metrics: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl, a line for each of `metrics`."""
        if self._writes:
            write_file(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in metrics))

    def open_board(self, step: int) -> None:
        """Start TensorBoard's files; what they say of steps after `step` counts no longer."""
        if self._writes:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(self.path / "tensorboard", purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def write_skipped(self, skipped: Mapping[Path, str]) -> None:
        if self._writes:
            lines = (f"{path}\t{reason}\n" for path, reason in skipped.items())
            write_file(self.path / SKIPPED, "path\treason\n" + "".join(lines))

    def save(self, loaded: LoadedModel, name: str) -> None:
        """Write the weights to checkpoints/NAME.safetensors, without what resuming needs."""
        weights: dict[str, Tensor] = loaded.model.state_dict()
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
        write_file(self.checkpoints / f"{name}.safetensors", save(on_cpu))


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Inside the block this process alone trains in the run folder `path`, which is made where there is none.

    A folder that is still empty afterwards is removed again if it was made here. Raises ClipretError when another
    process trains in it, when it is taken by something else than a run, and when it cannot be written.
    """
    try:
        if not any((path / name).exists() for name in (_LOCK, PARAMS, CHECKPOINTS)):
            RunFolder.refuse_taken(path)  # nothing is left in a folder of somebody else's
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path / _LOCK)
    except OSError as error:
        raise ClipretError(f"{path} cannot be written: {error.strerror}; choose another place") from None
    if lock is None:
        raise ClipretError(f"run {path} is being trained by another process: wait for it, or choose another folder")
    with contextlib.closing(lock):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file: then it stays, and does no harm
                (path / _LOCK).unlink()
                if made:
                    path.rmdir()


def _locked(file: Path) -> sqlite3.Connection | None:
    """What holds the lock until it is closed or its process ends, however that ends; None where another holds it.

    It is sqlite's own lock, on a database of nothing: the same on every system. Raises OSError.
    """
    while True:
        file.touch()
        before = file.stat().st_ino
        lock = sqlite3.connect(file, timeout=_SECONDS)
        try:
            lock.execute("PRAGMA journal_mode = OFF")  # else sqlite writes a second file
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                lock.close()
                return None
            # A file system without locks, as some clusters have: nothing can be told, so nothing is refused.
        # Its holder removes the file before it lets go: what was locked may be a file that has no name any more.
        if file.exists() and file.stat().st_ino == before:
            return lock
        lock.close()
