"""Every question of this folder in one run: a result file, a page with plots, a Markdown of the same tables.

    python benchmarks/suite.py WORK [--quick] [--only NAME ...] [--skip NAME ...] [--data ../shared/data] [--out FOLDER]
    python benchmarks/suite.py WORK --list

Each question is a script of its own, run as a process; what it says on the way is in WORK/logs. A question that was
measured in WORK is not measured again, so that a run that was cut off goes on; one that failed is tried again, and the
others go on without it. Images and captions are drawn by the project; --data names a folder with real ones, as
flickr8k/ and vehicles/. --quick asks everything in a reduced form, in a few minutes, and its figures are rough.

Results are written to FOLDER (benchmarks/results; with --quick WORK) as <machine>-<date>.json, .html and .md. Compare
two of them with benchmarks/compare.py.
"""

import argparse
import csv
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import report
from questions import QUESTIONS, Question, Run

HERE = Path(__file__).parent
PEERS = {  # by the names that reports use: what is not installed is not measured
    "sentence-transformers": "sentence_transformers",
    "rclip": "rclip",
    "faiss": "faiss",
    "OpenVINO": "openvino",
    "OpenCV": "cv2",
    "torchvision": "torchvision",
    "open_clip's trainer (needs webdataset, braceexpand, pandas)": "webdataset",
}


def drawn(folder: Path, count: int) -> Path:
    """Images with captions as the benchmarks read them, drawn by the project: captions.tsv and images/."""
    if not (folder / "captions.tsv").exists():
        command = [sys.executable, "-m", "clipret_training", "data", "scenes", folder, "--count", count, "--seed", 5]
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
        with (folder / "captions.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        title = next(name for name in rows[0] if name in ("title", "caption", "text"))
        path = next(name for name in rows[0] if name in ("path", "image", "image"))
        val = {row[path] for row in rows if int(re.sub(r"\D", "", row[path]) or 0) % 6 == 0}
        lines = ["path\tsplit\tlang\ttitle"]
        for row in rows:
            name = row[path].removeprefix("images/")
            lines.append(f"{name}\t{'val' if row[path] in val else 'train'}\t{row.get('lang', 'en')}\t{row[title]}")
        (folder / "captions.tsv.new").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "captions.tsv.new").replace(folder / "captions.tsv")
    return folder


def missing_modules(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def command_of(question: Question, run: Run) -> str:
    """As a report tells it: no folder of this machine in it."""
    script, *words = [str(word) for word in question.command(run)]
    places = [(str(place), word) for place, word in ((run.work, "WORK"), (run.real, "DATA")) if place is not None]
    for place, told in places:
        words = [word.replace(place, told) for word in words]
    return shlex.join(["python", f"benchmarks/{script}", *words])


def ask(question: Question, run: Run) -> dict[str, Any]:
    """The record of a question: its command and either its results or why it failed; kept in the run's folder."""
    kept = run.work / "done" / f"{question.name}.json"
    if kept.exists():
        record: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if "failed" not in record:
            print(f"{question.name}: measured already", file=sys.stderr)
            return record
    script, *words = [str(word) for word in question.command(run)]
    command, told = [sys.executable, str(HERE / script), *words], command_of(question, run)
    record = {"title": question.title, "about": question.about, "command": told}
    print(f"{question.name}: {told}", file=sys.stderr)
    log = run.work / "logs" / f"{question.name}.log"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"CLIPRET_RESULTS": str(run.work / "results"), "PATH": path}
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment)
    record["seconds"] = round(time.monotonic() - began, 1)
    results = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            result = json.loads(line)
            results[result["benchmark"]] = result
    if results:
        record["results"] = results
    if done.returncode or not results:
        ended = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        record["failed"] = f"exit status {done.returncode}: {ended[-1] if ended else 'it said nothing'}"
        print(f"{question.name}: {record['failed']} ({log})", file=sys.stderr)
    kept.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    return record


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def reason_against(question: Question, run: Run) -> str:
    """Why a run cannot ask it now, or nothing."""
    if lacks := question.lacks(run):
        return lacks
    modules = missing_modules(question.needs)
    return f"not installed: {', '.join(modules)}" if modules else ""


def not_measured(run: Run, chosen: Sequence[Question]) -> dict[str, str]:
    """What has no result, as far as it is known before all is done, and why."""
    missing = {question.name: "left out of this run" for question in QUESTIONS if question not in chosen}
    missing |= {question.name: reason_against(question, run) or "not yet" for question in chosen}
    for name, module in PEERS.items():
        if importlib.util.find_spec(module) is None:
            missing[f"peer {name}"] = "not installed"
    return missing | without_gpu()


def without_gpu() -> dict[str, str]:
    """What waits for a card."""
    missing = {}
    if not Path("/dev/nvidia0").exists():
        missing["GPU: CUDA, TensorRT, decoding and ranking on a card"] = "no NVIDIA GPU here: make bench-gpu on one"
        missing["TensorRT for RTX"] = (
            "its plans are built and parsed on this machine by the tests, but need a GPU to run"
        )
        missing["peer Chinese-CLIP's TensorRT engines of batch 1, faiss on the GPU"] = (
            "need a GPU; its ONNX of batch 1 is among the towers"
        )
    return missing


def collect(work: Path, out: Path, missing: dict[str, str], quick: bool) -> Path:
    """The result file, page and Markdown of what a run has measured so far; returns the result file."""
    order = [question.name for question in QUESTIONS]
    done = sorted((work / "done").glob("*.json"), key=lambda path: order.index(path.stem) if path.stem in order else 99)
    questions = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in done}
    facts = machine.describe()
    note = "quick form: figures are rough" if quick else ""
    left = {name: reason for name, reason in missing.items() if name not in questions}
    content = {**facts, "commit": commit(), "note": note, "questions": questions, "missing": left}
    out.mkdir(parents=True, exist_ok=True)
    word = re.sub(r"[^a-z0-9]+", "-", facts["machine"].lower()).strip("-")
    path = out / f"{word}-{facts['date']}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    report.write(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [question.name for question in QUESTIONS]
    parser.add_argument("work", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--skip", nargs="+", choices=names, default=[])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--list", action="store_true", help="the questions, and how long each takes")
    arguments = parser.parse_args()
    chosen = [question for question in QUESTIONS if question.name in arguments.only]
    chosen = [question for question in chosen if question.name not in arguments.skip]
    if arguments.list:
        for question in chosen:
            print(f"{question.name:14}{question.minutes:4g} min  {question.title}")
        print(f"{'together':14}{sum(question.minutes for question in chosen):4g} min")
        return
    work = arguments.work.absolute()
    for folder in ("done", "logs", "results"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    real_data = arguments.data.absolute() if arguments.data is not None else None
    photographs = real_data / "flickr8k" if real_data is not None and (real_data / "flickr8k").is_dir() else None
    run = Run(work, arguments.quick, photographs or work / "drawn", real_data)
    out = arguments.out or (work if arguments.quick else HERE / "results")
    asked = [question for question in chosen if not reason_against(question, run)]
    if photographs is None and any(str(run.data) in map(str, question.command(run)) for question in asked):
        drawn(run.data, 960)
    path = collect(work, out, not_measured(run, chosen), arguments.quick)
    for question in chosen:
        if not reason_against(question, run):  # which one before may have answered
            ask(question, run)
            path = collect(work, out, not_measured(run, chosen), arguments.quick)  # a run cut off leaves its report
    print(path)


if __name__ == "__main__":
    main()
