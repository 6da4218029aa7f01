"""The run folder: everything that a training leaves behind."""

import json
import time
from pathlib import Path
from typing import Any, Self

import tomli_w
from safetensors.torch import save

from clipret.errors import ClipretError
from clipret.files import write_file
from clipret.training.loaded import LoadedModel
from clipret.training.models import describe

__all__ = ["RunFolder"]


class RunFolder:
    """params.toml      the FitConfig
    model.json          what rebuilds the model, with tokenizer.json and, for open_clip's models, open_clip_config.json
    log.txt             what happened, with the time of day
    metrics.jsonl       a line for each epoch
    skipped.tsv         pictures that could not be read, with the reason
    checkpoints/        last.safetensors, best.safetensors

    Every file but the log is written whole or not at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: list[str] = []

    @classmethod
    def create(cls, path: Path, params: dict[str, Any], loaded: LoadedModel) -> Self:
        """Make the folder and write what is known before the first step. Raises ClipretError when `path` is taken."""
        cls.refuse_taken(path)
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClipretError(f"{path} cannot be written: {error.strerror}; choose another place") from None
        given = {name: value for name, value in params.items() if value is not None}  # TOML knows no null
        write_file(path / "params.toml", tomli_w.dumps(given))
        for name, content in describe(loaded).items():
            write_file(path / name, content)
        return cls(path)

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """Raise ClipretError unless `path` is free: absent or an empty folder."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ClipretError(f"{path} exists and is not empty: name a new folder for this run, or remove it")

    def log(self, line: str) -> None:
        with (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")

    def record(self, metrics: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        self._metrics.append(json.dumps(metrics) + "\n")
        write_file(self.path / "metrics.jsonl", "".join(self._metrics))

    def write_skipped(self, skipped: dict[Path, str]) -> None:
        lines = (f"{path}\t{reason}\n" for path, reason in skipped.items())
        write_file(self.path / "skipped.tsv", "path\treason\n" + "".join(lines))

    def save(self, loaded: LoadedModel, name: str) -> None:
        """Write the weights to checkpoints/NAME.safetensors."""
        weights = {key: tensor.detach().cpu().contiguous() for key, tensor in loaded.model.state_dict().items()}
        write_file(self.path / "checkpoints" / f"{name}.safetensors", save(weights))
