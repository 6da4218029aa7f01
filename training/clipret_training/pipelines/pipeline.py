"""Pipelines: a TOML file of steps, from raw files to an answer. Each step runs once.

    [values]                                  # --set changes them; a list becomes several arguments of a command
    labels = "train_label.txt"
    fit = ["--epochs", "40"]

    [[step]]
    name = "train"
    run = ["clipret-train", "fit", "{out}/data/captions.csv", "--out", "{out}/run", "{fit}", "--resume"]
    makes = "{out}/run"                       # the output, removed before the step runs again
    keeps = true                              # but not removed if the step was interrupted and can resume

    [[step]]
    name = "baseline"
    run = ["clipret-search", "eval", "{out}/gallery", "{queries}", "--json"]
    measures = true                           # its JSON output is a line of the table of metrics,
    against = "…"                             # compared with this step; default: the previous measurement
    needs = ["queries"]                       # the step runs only if these values are not empty

A step runs again if its command, a file in its command, or an earlier step with an output has changed. OUT/steps.json
records finished steps, their duration and metrics. OUT/logs has the output of each step.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from clipret.errors import ClipretError
from clipret.files import write_file
from clipret.schema import checked
from clipret_training.recipe import read_recipe
from clipret_training.schema import check

__all__ = ["Pipeline", "Step", "StepRecord", "run_pipeline"]

_log = logging.getLogger(__name__)

Value = str | tuple[str, ...]

_COMMANDS = {
    "clipret-train": "clipret_training.cli",
    "clipret-export": "clipret_export.cli",
    "clipret-search": "clipret.cli",
}
_USAGE = f"{', '.join(_COMMANDS)}, each argument in quotes"


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step of a pipeline; see the description of the module.

    Args:
        name: Its name, also of its file in OUT/logs.
        run: A command of clipret and its arguments.
        makes: The file or folder that the command creates.
        into: A file for the standard output of the command.
        keeps: Whether the command can resume, so that `makes` is kept after an interruption.
        measures: Whether the command prints a JSON object of metrics.
        needs: Names of values; the step runs only if all are not empty.
        against: The name of the step to compare the metrics with.
    """

    name: Annotated[str, Meta(pattern=r"^[\w .+-]+$")]
    run: Annotated[tuple[str, ...], Meta(min_length=1)]
    makes: str = ""
    into: str = ""
    keeps: bool = False
    measures: bool = False
    needs: tuple[str, ...] = ()
    against: str = ""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    step: Annotated[tuple[Step, ...], Meta(min_length=1)]
    values: dict[str, Value] = msgspec.field(default_factory=dict)


class StepRecord(msgspec.Struct, frozen=True):
    """The record of a step in steps.json.

    Args:
        digest: A hash of the command and its inputs.
        done: Whether the step is finished.
        against: The name of the step to compare the metrics with.
        seconds: Its duration.
        cpu_seconds: Its CPU time, user and system.
        metrics: What it measured, by name.
    """

    digest: str
    done: bool
    against: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class Pipeline:
    """A pipeline.

    Args:
        name: Its name or the path of its file.
        values: Strings and lists by name, which commands refer to as {name}.
        steps: The steps in their order.
    """

    name: str
    values: dict[str, Value]
    steps: tuple[Step, ...]

    @classmethod
    def read(cls, recipe: str, overrides: Mapping[str, str] | None = None) -> Self:
        """Read and check a pipeline.

        Args:
            recipe: The name of a built-in pipeline, or the path of a TOML file.
            overrides: New values by name; lists are written in TOML.

        Raises:
            ClipretError: The file has an error, or the pipeline does not have one of the values.
        """
        advice = (
            f"a pipeline has [values] and [[step]], a step has {', '.join(Step.__struct_fields__)}; its name consists "
            "of letters, digits, blanks, dots and dashes"
        )
        try:
            file = checked(read_recipe(recipe, "pipeline"), _File)
        except ValueError as error:
            raise ClipretError(f"pipeline {recipe}: {error}; {advice}") from error
        values, steps = file.values, file.step
        for name, text in (overrides or {}).items():
            if name not in values:
                raise ClipretError(f"pipeline {recipe} has no value {name!r}: it has {', '.join(values)}")
            value = _parsed(text) if isinstance(values[name], tuple) else text
            check(f"the value {name} of pipeline {recipe}", value, Value)
            values[name] = tuple(value) if isinstance(value, list) else value
        names = [step.name for step in steps]
        duplicate = next((name for name in names if names.count(name) > 1), None)
        if duplicate is not None:
            raise ClipretError(f"pipeline {recipe} has two steps {duplicate!r}: rename one")
        pipeline = cls(recipe, values, steps)
        for step in steps:  # finds mistakes before hours of training
            if step.run[0] not in _COMMANDS:
                raise ClipretError(f"pipeline {recipe}: step {step.name!r} runs {step.run[0]!r}: use {_USAGE}")
            pipeline.words(step, Path("out"))
            if step.against and step.against not in names:
                raise ClipretError(
                    f"pipeline {recipe}: step {step.name!r} is against {step.against!r}, which is no step: use "
                    f"{', '.join(names)}"
                )
            missing = [name for name in step.needs if name not in values]
            if missing:
                raise ClipretError(
                    f"pipeline {recipe}: step {step.name!r} needs {missing[0]!r}, which is no value: add it to [values]"
                )
        return pipeline

    def words(self, step: Step, out: Path) -> list[str]:
        """Return the command of a step with all values filled in.

        Args:
            step: A step of this pipeline.
            out: The value of {out}.

        Raises:
            ClipretError: The pipeline does not have a value.
        """
        words: list[str] = []
        for word in step.run:
            name = word[1:-1]
            value = self.values.get(name) if word == f"{{{name}}}" else None
            words.extend(self.filled(part, out) for part in (value if isinstance(value, tuple) else (word,)))
        return words

    def filled(self, text: str, out: Path) -> str:
        """Replace {out} and the names of values in a text. Values may refer to other values.

        Raises:
            ClipretError: The pipeline does not have a value, or the value is a list.
        """

        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name == "out":
                return str(out)
            if name not in self.values:
                raise ClipretError(f"pipeline {self.name} has no value {name!r}: it has {', '.join(self.values)}")
            filling = self.values[name]
            if isinstance(filling, tuple):
                raise ClipretError(
                    f"pipeline {self.name}: {name} is a list and cannot be part of {text!r}: write it as an argument "
                    "of its own"
                )
            return self.filled(filling, out)

        # Doubled braces are for slots of captions: {{color}} becomes {color}.
        parts = re.split(r"(\{\{\w+\}\})", text)
        return "".join(p[1:-1] if p.startswith("{{") else re.sub(r"\{(\w+)\}", value, p) for p in parts)


def run_pipeline(
    pipeline: Pipeline, out: Path, report: Callable[[str, str], None] = lambda *_: None
) -> dict[str, StepRecord]:
    """Run all steps that are not done, in their order.

    Args:
        pipeline: The pipeline.
        out: The folder of all outputs; it is created if necessary.
        report: Called with the name of a step and "kept", "running" or "done".

    Returns:
        The records of all steps whose values are set, by name.

    Raises:
        ClipretError: A step failed. The steps before it are kept, and another call continues with the failed step.
    """
    out = out.absolute()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    records = _records(out / "steps.json")
    names = []
    previous_digest = ""
    for step in pipeline.steps:
        if not all(pipeline.values[name] for name in step.needs):
            continue
        names.append(step.name)
        words = pipeline.words(step, out)
        digest = _digest(previous_digest, words, out)
        if not step.measures:  # a measurement does not change the input of later steps
            previous_digest = digest
        record = records.get(step.name)
        if record is not None and record.done and record.digest == digest:
            report(step.name, "kept")
            _log.info("step %s is done already", step.name)
            continue
        if step.makes and not (step.keeps and record is not None and record.digest == digest):
            _remove(Path(pipeline.filled(step.makes, out)), out)
        records[step.name] = StepRecord(digest, done=False)
        _write_records(out / "steps.json", records)
        report(step.name, "running")
        _log.info("step %s: %s", step.name, " ".join(step.run))
        records[step.name] = _run_step(pipeline, step, words, digest, out)
        _write_records(out / "steps.json", records)
        report(step.name, "done")
    return {name: records[name] for name in names}


def _run_step(pipeline: Pipeline, step: Step, words: Sequence[str], digest: str, out: Path) -> StepRecord:
    module = _COMMANDS[words[0]]
    code = f"import sys; sys.argv[0] = {words[0]!r}; from {module} import main; main()"
    start, times_before = time.perf_counter(), os.times()
    process = subprocess.run([sys.executable, "-c", code, *words[1:]], stdout=subprocess.PIPE, check=False)
    times = os.times()
    cpu = times.children_user + times.children_system - times_before.children_user - times_before.children_system
    (out / "logs" / f"{step.name}.txt").write_bytes(process.stdout)
    if process.returncode:
        raise ClipretError(
            f"step {step.name!r} ended with status {process.returncode}: {' '.join(words)}; fix the cause and run the "
            "pipeline again, the steps before it are kept"
        )
    if step.into:
        write_file(Path(pipeline.filled(step.into, out)), process.stdout)
    metrics = None
    if step.measures:
        try:
            metrics = msgspec.json.decode(process.stdout, type=dict[str, float])
        except ValueError:
            raise ClipretError(
                f"step {step.name!r} measures but did not print a JSON object of numbers: add --json"
            ) from None
    return StepRecord(digest, True, step.against, round(time.perf_counter() - start, 1), round(cpu, 1), metrics)


def _digest(previous: str, words: Sequence[str], out: Path) -> str:
    """A hash of the previous digest, the command, and the size and time of each of its files outside `out`."""
    stamps = []
    for word in words:
        file = Path(word)
        if not word.startswith("-") and not file.absolute().is_relative_to(out) and file.is_file():
            stamps.append([file.stat().st_size, file.stat().st_mtime_ns])
    text = json.dumps([previous, list(words), stamps])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _remove(output: Path, out: Path) -> None:
    if not output.absolute().is_relative_to(out):
        raise ClipretError(f"a step makes {output}, which is outside {out}: write {{out}}/… in the pipeline")
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


def _records(file: Path) -> dict[str, StepRecord]:
    if not file.exists():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, StepRecord])
    except ValueError:  # the base class of msgspec's errors
        raise ClipretError(f"{file} is damaged: remove it and run the pipeline again from its first step") from None


def _write_records(file: Path, records: Mapping[str, StepRecord]) -> None:
    write_file(file, json.dumps(msgspec.to_builtins(records), indent=2) + "\n")


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
