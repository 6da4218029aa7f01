"""Two processes that torchrun starts, with gloo: the gradients of one process, whole runs, sharded weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tomli_w
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipret_export.pipeline import export_bundle
from clipret_training.config import FitConfig
from clipret_training.distributed.world import World
from clipret_training.fit import fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-clip, an open_clip model of two layers a tower; batch.pt; toy/, 24 images with a caption each."""
    folder = tmp_path_factory.mktemp("distributed")
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "tiny-clip").mkdir()
    config = {"model_cfg": model_cfg, "preprocess_cfg": {}}
    (folder / "tiny-clip" / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**model_cfg).state_dict(), folder / "tiny-clip" / "open_clip_model.safetensors")
    ids = torch.randint(1, 49406, (12, 7))
    ids[:, -1] = 49407
    torch.save({"images": torch.randn(12, 3, 32, 32), "ids": ids}, folder / "batch.pt")
    rng = np.random.default_rng(0)
    (folder / "toy").mkdir()
    lines = ["path,caption"]
    for number in range(24):
        pixels = np.full((40, 40, 3), rng.integers(0, 256, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "toy" / f"{number}.png")
        lines.append(f"{number}.png,image {number}")
    (folder / "toy" / "broken.png").write_bytes(b"none")
    lines.append("broken.png,a broken image")
    (folder / "toy" / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def torchrun(*command: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *map(str, command)]
    return subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=400
    )


def test_two_processes_have_the_gradients_of_one(folder: Path) -> None:
    worker = Path(__file__).with_name("distributed_worker.py")
    done = torchrun(worker, folder)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("distributed_worker", worker)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = module.gradients(folder, World(0, 1, torch.device("cpu")), local_loss=False, parts=1)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    for rank in (0, 1):
        for gradients in torch.load(folder / f"gradients-{rank}.pt", weights_only=True):
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def settings(folder: Path, **options: Any) -> FitConfig:
    values: dict[str, Any] = {"epochs": 2, "batch_size": 8, "threads": 1, "precision": "fp32", "augment": "none"}
    values |= {"lr": 1e-3, "val_split": 0.2, "val": str(folder / "toy" / "captions.csv"), "where": "path <> '7.png'"}
    values |= {"val_where": "path like '%1.png'", "cache_limit": 0.0, "local_loss": True}
    values |= {"model": str(folder / "tiny-clip"), "data": str(folder / "toy" / "captions.csv"), **options}
    return FitConfig.for_model(**values)


def run_two(config: FitConfig, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    params = out.with_suffix(".toml")
    params.write_text(tomli_w.dumps(config.to_dict()))
    return torchrun("-m", "clipret_training", "fit", "--recipe", params, "--out", out, *more)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Two processes that stream their images, each scoring only its own embeddings."""
    done = run_two(settings(folder), folder / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("text to image") == 2  # the table of one process
    return folder / "run"


def test_a_run_of_two_processes(folder: Path, run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["text_to_image"]["queries"] == 3
    assert "broken.png" in (run / "skipped.tsv").read_text()
    # A single process measures the same recall with the weights that two have trained.
    last = run / "checkpoints" / "last.safetensors"
    again = fit(settings(folder, model=str(last), epochs=1, lr=0.0), tmp_path / "again")
    assert again.best["text_to_image"] == lines[-1]["text_to_image"]


def interrupted(config: FitConfig, run: Path) -> Path:
    """The checkpoints of a run that was killed in the second epoch and resumed from its sharded checkpoint."""
    params = run.with_suffix(".toml")
    params.write_text(tomli_w.dumps(config.to_dict()))
    killed = torchrun(Path(__file__).with_name("distributed_worker.py"), params, run, 3)
    assert killed.returncode != 0
    checkpoints = run / "checkpoints"
    assert len(list(checkpoints.glob("shards-*/*.distcp"))) == 2
    assert not (checkpoints / "last.safetensors").exists()
    done = run_two(config, run, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed after step 2" in (run / "log.txt").read_text()
    return checkpoints


def test_sharded_weights_train_as_whole_ones_and_export(folder: Path, run: Path, tmp_path: Path) -> None:
    done = run_two(settings(folder, fsdp=True), tmp_path / "sharded")
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(path / "checkpoints" / "last.safetensors") for path in (tmp_path / "sharded", run))
    start = load_file(folder / "tiny-clip" / "open_clip_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert (ours["visual.proj"] - start["visual.proj"]).abs().max() > 1e-3
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=2e-4)
    bundle = export_bundle(str(tmp_path / "sharded"), tmp_path / "bundle")
    assert bundle.manifest.image.size == 32


def test_sharded_weights_resume_exactly(folder: Path, tmp_path: Path) -> None:
    """With the states of both optimizers: Muon updates the weights of layers, AdamW all others."""
    config = settings(folder, fsdp=True, save_every=2, optimizer="muon")
    done = run_two(config, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    expected = load_file(tmp_path / "whole" / "checkpoints" / "last.safetensors")
    resumed = load_file(interrupted(config, tmp_path / "sharded") / "last.safetensors")
    assert resumed.keys() == expected.keys()
    for name, weight in resumed.items():
        assert torch.equal(weight, expected[name]), name
