"""Pipelines: a TOML file of steps, from raw files to an answer, each of them done once.

    [values]                                  # what --set may change; a list stands for several words of a command
    labels = "train_label.txt"
    fit = ["--epochs", "40"]

    [[step]]
    name = "train"
    run = ["clipret-train", "fit", "{out}/data/captions.csv", "--out", "{out}/run", "{fit}", "--resume"]
    makes = "{out}/run"                       # removed before the step is done anew
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
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from clipret.errors import ClipretError
from clipret.files import write_file

__all__ = ["Pipeline", "Step", "StepRecord", "pipeline_names", "run_pipeline"]

Value = str | tuple[str, ...]

_FOLDER = files("clipret_training") / "pipelines"
_COMMANDS = {
    "clipret-train": "clipret_training.cli",
    "clipret-export": "clipret_export.cli",
    "clipret-search": "clipret.cli",
}
_KEYS = {
    "name": str,
    "run": list,
    "makes": str,
    "into": str,
    "keeps": bool,
    "measures": bool,
    "needs": list,
    "against": str,
}


@dataclass(frozen=True)
class Step:
    """`run`: the words of a command of clipret's. `into`: a file that takes its standard output. See the head."""

    name: str
    run: tuple[str, ...]
    makes: str = ""
    into: str = ""
    keeps: bool = False
    measures: bool = False
    needs: tuple[str, ...] = ()
    against: str = ""


@dataclass(frozen=True)
class StepRecord:
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
        try:
            table = tomllib.loads(pipeline_text(recipe))
        except tomllib.TOMLDecodeError as error:
            raise ClipretError(f"pipeline {recipe} is not TOML: {error}") from None
        values = {name: _value(recipe, name, value) for name, value in table.get("values", {}).items()}
        for name, text in (given or {}).items():
            if name not in values:
                raise ClipretError(f"pipeline {recipe} has no value {name!r}: it has {', '.join(values)}")
            values[name] = _value(recipe, name, _parsed(text) if isinstance(values[name], tuple) else text)
        steps = tuple(_step(recipe, number, value) for number, value in enumerate(table.get("step", []), 1))
        if not steps:
            raise ClipretError(f"pipeline {recipe} has no [[step]]: nothing to do")
        names = [step.name for step in steps]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise ClipretError(f"pipeline {recipe} has two steps {double!r}: name one otherwise")
        made = cls(recipe, values, steps)
        for step in steps:  # whatever is misspelt is found before hours of training
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


def pipeline_names() -> dict[str, str]:
    """The pipelines that clipret has, each with its first line, which says what it is for."""
    names = sorted(file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml"))
    return {name: pipeline_text(name).splitlines()[0].lstrip("# ") for name in names}


def pipeline_text(recipe: str) -> str:
    """The text of a pipeline of clipret's, or of a TOML file. Raises ClipretError when there is neither."""
    if recipe.endswith(".toml"):
        try:
            return Path(recipe).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ClipretError(f"{recipe} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    file = _FOLDER / f"{recipe}.toml"
    if "/" in recipe or not file.is_file():
        raise ClipretError(
            f"there is no pipeline {recipe!r}: use {', '.join(pipeline_names())} or a file that ends in .toml"
        )
    return file.read_text(encoding="utf-8")


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
            continue
        if step.makes and not (step.keeps and before is not None and before.digest == own):
            _remove(Path(pipeline.filled(step.makes, out)), out)
        records[step.name] = StepRecord(own, done=False)
        _keep(out / "steps.json", records)
        report(step.name, "running")
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
            f"step {step.name!r} ended with status {ended.returncode}: {' '.join(words)}; mend it and run the "
            "pipeline again, the steps before it are kept"
        )
    if step.into:
        write_file(Path(pipeline.filled(step.into, out)), ended.stdout)
    metrics = None
    if step.measures:
        try:
            metrics = {name: float(value) for name, value in json.loads(ended.stdout).items()}
        except (ValueError, AttributeError, TypeError):
            raise ClipretError(f"step {step.name!r} measures but printed no JSON of numbers: add --json") from None
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
        return {name: StepRecord(**value) for name, value in json.loads(file.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError):
        raise ClipretError(f"{file} is damaged: remove it and run again, every step is then done anew") from None


def _keep(file: Path, records: Mapping[str, StepRecord]) -> None:
    write_file(file, json.dumps({name: asdict(one) for name, one in records.items()}, indent=2) + "\n")


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _value(recipe: str, name: str, value: Any) -> Value:
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return tuple(value)
    if not isinstance(value, str):
        raise ClipretError(f"pipeline {recipe}: the value {name} is {value!r}: write a text, or a list of texts")
    return value


def _step(recipe: str, number: int, value: Any) -> Step:
    where = f"pipeline {recipe}: step {value.get('name', number)!r}" if isinstance(value, dict) else f"step {number}"
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value.get("run"):
        raise ClipretError(f"{where} needs a name and a command to run")
    for key, held in value.items():
        if key not in _KEYS or not isinstance(held, _KEYS[key]):
            raise ClipretError(f"{where} has {key} = {held!r}: a step has {', '.join(_KEYS)}")
    if not re.fullmatch(r"[\w .+-]+", value["name"]):
        raise ClipretError(f"{where} is no name for a file: use letters, digits, blanks, dots and dashes")
    words = value["run"]
    if not all(isinstance(word, str) for word in words) or words[0] not in _COMMANDS:
        raise ClipretError(f"{where} runs {words[0]!r}: use {', '.join(_COMMANDS)}, in quotes, and a word each")
    return Step(**{**value, "run": tuple(words), "needs": tuple(value.get("needs", ()))})
