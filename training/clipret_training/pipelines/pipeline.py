"""Pipelines: a TOML file of steps, from raw files to an answer, each of them done once.

    [values]                                  # what --set may change; a list stands for several words of a command
    labels = "train_label.txt"
    fit = ["--epochs", "40"]

    [[step]]
    name = "train"
    run = ["clipret-train", "fit", "{out}/data/captions.csv", "--out", "{out}/run", "{fit}", "--resume"]
    makes = "{out}/run"                       # removed before the step is done again
    keeps = true                              # but left as it is where the step was interrupted: it goes on by itself

    [[step]]
    name = "baseline"
    run = ["clipret-search", "eval", "{out}/gallery", "{queries}", "--json"]
    measures = true                           # its JSON is a line of the table,
    against = "…"                             # compared with this step's, by default with the measurement before it
    needs = ["queries"]                       # only where these values are given

A step is done again when its command, a file that the command names, or a step before it that makes something has
changed. What was done, how long it took and what was measured lies in OUT/steps.json; OUT/logs has what each step
printed.
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
_KNOWN = f"{', '.join(_COMMANDS)}, in quotes, and a word each"


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`run`: the words of a command of clipret's. `into`: a file that takes its standard output. See the head."""

    name: Annotated[str, Meta(pattern=r"^[\w .+-]+$")]  # of its file in OUT/logs
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
    """What is kept of a step: the digest of all that decides it, whether it is done, its time, what it measured."""

    digest: str
    done: bool
    against: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class Pipeline:
    name: str
    values: dict[str, Value]
    steps: tuple[Step, ...]

    @classmethod
    def read(cls, recipe: str, given: Mapping[str, str] | None = None) -> Self:
        """A pipeline of clipret's by its name, or a file's; with values that are `given`, lists as TOML.

        Raises ClipretError for what is wrong in it and for a value that it does not have.
        """
        advice = (
            f"a pipeline has [values] and [[step]], a step has {', '.join(Step.__struct_fields__)}; in its name are "
            "letters, digits, blanks, dots and dashes"
        )
        try:
            file = checked(read_recipe(recipe, "pipeline"), _File)
        except ValueError as error:
            raise ClipretError(f"pipeline {recipe}: {error}; {advice}") from error
        values, steps = file.values, file.step
        for name, text in (given or {}).items():
            if name not in values:
                raise ClipretError(f"pipeline {recipe} has no value {name!r}: it has {', '.join(values)}")
            value = _parsed(text) if isinstance(values[name], tuple) else text
            check(f"the value {name} of pipeline {recipe}", value, Value)
            values[name] = tuple(value) if isinstance(value, list) else value
        names = [step.name for step in steps]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise ClipretError(f"pipeline {recipe} has two steps {double!r}: name one otherwise")
        made = cls(recipe, values, steps)
        for step in steps:  # whatever is misspelt is found before hours of training
            if step.run[0] not in _COMMANDS:
                raise ClipretError(f"pipeline {recipe}: step {step.name!r} runs {step.run[0]!r}: use {_KNOWN}")
            made.words(step, Path("out"))
            if step.against and step.against not in names:
                raise ClipretError(
                    f"pipeline {recipe}: step {step.name!r} is against {step.against!r}, which is no step"
                )
            strange = [name for name in step.needs if name not in values]
            if strange:
                raise ClipretError(f"pipeline {recipe}: step {step.name!r} needs {strange[0]!r}, which is no value")
        return made

    def words(self, step: Step, out: Path) -> list[str]:
        """The command of a step. Raises ClipretError for a value that is not there."""
        words: list[str] = []
        for word in step.run:
            name = word[1:-1]
            value = self.values.get(name) if word == f"{{{name}}}" else None
            words.extend(self.filled(part, out) for part in (value if isinstance(value, tuple) else (word,)))
        return words

    def filled(self, text: str, out: Path) -> str:
        """A text with {out} and the values in it filled in; a value may name others."""

        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name == "out":
                return str(out)
            if name not in self.values:
                raise ClipretError(f"pipeline {self.name} has no value {name!r}: it has {', '.join(self.values)}")
            found = self.values[name]
            if isinstance(found, tuple):
                raise ClipretError(
                    f"pipeline {self.name}: {name} is a list and stands in {text!r}: give it a word alone"
                )
            return self.filled(found, out)

        # Slots of captions, such as {color}, are written {{color}}.
        parts = re.split(r"(\{\{\w+\}\})", text)
        return "".join(p[1:-1] if p.startswith("{{") else re.sub(r"\{(\w+)\}", value, p) for p in parts)


def run_pipeline(
    pipeline: Pipeline, out: Path, report: Callable[[str, str], None] = lambda *_: None
) -> dict[str, StepRecord]:
    """Do every step that is not done, in order; the records of all steps that apply.

    `report(step, state)` is called with "kept", "running" and "done". Raises ClipretError when a step fails;
    the steps before it are kept and another call goes on there.
    """
    out = out.absolute()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    records = _records(out / "steps.json")
    applied = []
    digest = ""
    for step in pipeline.steps:
        if not all(pipeline.values[name] for name in step.needs):
            continue
        applied.append(step.name)
        words = pipeline.words(step, out)
        own = _digest(digest, words, out)
        if not step.measures:  # which changes nothing that others read
            digest = own
        before = records.get(step.name)
        if before is not None and before.done and before.digest == own:
            report(step.name, "kept")
            _log.info("step %s is done already", step.name)
            continue
        if step.makes and not (step.keeps and before is not None and before.digest == own):
            _remove(Path(pipeline.filled(step.makes, out)), out)
        records[step.name] = StepRecord(own, done=False)
        _keep(out / "steps.json", records)
        report(step.name, "running")
        _log.info("step %s: %s", step.name, " ".join(step.run))
        records[step.name] = _done(pipeline, step, words, own, out)
        _keep(out / "steps.json", records)
        report(step.name, "done")
    return {name: records[name] for name in applied}


def _done(pipeline: Pipeline, step: Step, words: Sequence[str], digest: str, out: Path) -> StepRecord:
    module = _COMMANDS[words[0]]
    code = f"import sys; sys.argv[0] = {words[0]!r}; from {module} import main; main()"
    began, before = time.perf_counter(), os.times()
    ended = subprocess.run([sys.executable, "-c", code, *words[1:]], stdout=subprocess.PIPE, check=False)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    (out / "logs" / f"{step.name}.txt").write_bytes(ended.stdout)
    if ended.returncode:
        raise ClipretError(
            f"step {step.name!r} ended with status {ended.returncode}: {' '.join(words)}; correct it and run the "
            "pipeline again, the steps before it are kept"
        )
    if step.into:
        write_file(Path(pipeline.filled(step.into, out)), ended.stdout)
    metrics = None
    if step.measures:
        try:
            metrics = msgspec.json.decode(ended.stdout, type=dict[str, float])
        except ValueError as error:
            raise ClipretError(f"step {step.name!r} measures but printed no JSON of numbers: add --json") from error
    return StepRecord(digest, True, step.against, round(time.perf_counter() - began, 1), round(cpu, 1), metrics)


def _digest(before: str, words: Sequence[str], out: Path) -> str:
    """Of the step before, the command, and the size and time of each file that it names outside `out`."""
    stamps = []
    for word in words:
        file = Path(word)
        if not word.startswith("-") and not file.absolute().is_relative_to(out) and file.is_file():
            stamps.append([file.stat().st_size, file.stat().st_mtime_ns])
    text = json.dumps([before, list(words), stamps])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _remove(made: Path, out: Path) -> None:
    if not made.absolute().is_relative_to(out):
        raise ClipretError(f"a step makes {made}, which is outside {out}: write {{out}}/… in the pipeline")
    if made.is_dir():
        shutil.rmtree(made)
    else:
        made.unlink(missing_ok=True)


def _records(file: Path) -> dict[str, StepRecord]:
    if not file.exists():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, StepRecord])
    except ValueError as error:  # msgspec's errors are
        raise ClipretError(f"{file} is damaged: remove it and run again, every step is then done again") from error


def _keep(file: Path, records: Mapping[str, StepRecord]) -> None:
    write_file(file, json.dumps(msgspec.to_builtins(records), indent=2) + "\n")


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
