"""Runs that are killed, and checkpoints that cannot be written or are not theirs."""

import contextlib
import json
import multiprocessing
import random
import re
import resource
import runpy
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import clipret_training.fit as module
from clipret.errors import ClipretError
from clipret_training.checkpoint import Checkpoints
from clipret_training.config import FitConfig
from clipret_training.data.augment import Augmenter
from clipret_training.fit import fit
from clipret_training.models.load import load_model
from clipret_training.run import claimed
from clipret_training.seeds import seed_of
from clipret_training.step import GradientStep

STEPS = 12  # four epochs of three


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen plain images with two captions each; twelve to train on."""
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    lines = ["path,caption,part"]
    for number in range(16):
        colour = rng.integers(0, 256, 3)
        Image.fromarray(np.full((24, 24, 3), colour, np.uint8)).save(folder / f"{number}.png")
        part = "val" if number >= 12 else "train"
        lines += [f"{number}.png,{caption} {number},{part}" for caption in ("an image", "colour")]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


def config(toy: Path, **given: Any) -> FitConfig:
    values: dict[str, Any] = {"epochs": 4, "batch_size": 4, "threads": 1, "precision": "fp32", "save_every": 1}
    values |= {"val_where": "part = 'val'", "where": "part = 'train'", "validate_every": 2}
    return FitConfig.for_model(str(toy / "list.csv"), "clipret-small", **(values | given))


@pytest.fixture(scope="module")
def undisturbed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(config(toy), tmp_path_factory.mktemp("runs") / "run").run


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{name}.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("last", "best"):
        ours, theirs = weights(one, name), weights(other, name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def start(params: Path, out: Path, limit: int = 0) -> tuple[Any, Any]:
    """A training in a real process, and what it says: each step, and an error at the end. The server has imported what
    takes seconds to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clipret_training.fit"])
    ours, theirs = context.Pipe(duplex=False)
    values = {"params": str(params), "out": str(out), "limit": limit, "connection": theirs}
    worker = str(Path(__file__).with_name("resume_worker.py"))
    process = context.Process(target=runpy.run_path, args=(worker, values))
    process.start()
    theirs.close()
    return process, ours


def told(connection: Any) -> Iterator[Any]:
    with contextlib.suppress(EOFError):
        while True:
            yield connection.recv()


def test_a_run_killed_at_any_step_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    """Five kills of one run, after random steps and a random time more: in a step, in a save, between its renames."""
    rng = random.Random(0)
    run = tmp_path / "run"
    statuses = []
    for target in sorted(rng.sample(range(1, STEPS), 5)):
        process, connection = start(undisturbed / "params.toml", run)
        for step in told(connection):
            if step >= target:
                time.sleep(rng.uniform(0, 0.03))
                process.kill()
                break
        process.join()
        statuses.append(process.exitcode)
    assert statuses == [-signal.SIGKILL] * 5
    result = fit(FitConfig.read(undisturbed / "params.toml"), run, resume=True)
    assert_same_weights(run, undisturbed)
    assert [line["epoch"] for line in _lines(run)] == [1, 2, 3, 4]
    assert [line["loss"] for line in _lines(run)] == [line["loss"] for line in _lines(undisturbed)]
    assert result.last["step"] == STEPS
    assert (run / "log.txt").read_text().count("resumed after step") >= 4
    assert not list(run.rglob(".*.tmp"))


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("rename", range(8))
def test_a_kill_between_any_two_renames_leaves_a_whole_checkpoint(
    toy: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename: int
) -> None:
    done = 0
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        nonlocal done
        if "checkpoints" in str(target) and (done := done + 1) > 6 + rename:
            raise _Killed
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(_Killed):
            fit(config(toy), tmp_path / "run")
    fit(config(toy), tmp_path / "run", resume=True)
    assert_same_weights(tmp_path / "run", undisturbed)


def test_one_process_trains_a_run_at_a_time(toy: Path, tmp_path: Path) -> None:
    """Neither next to one that has written nothing yet, nor next to one with a checkpoint; a kill ends the lock."""
    run = tmp_path / "run"
    (tmp_path / "params.toml").write_text(tomli_w.dumps(config(toy, epochs=40).to_dict()))
    message = f"run {run} is being trained by another process: wait for it, or choose another folder"
    with claimed(run):
        for resume in (False, True):
            with pytest.raises(ClipretError, match=re.escape(message)):
                fit(config(toy), run, resume=resume)
    assert not run.exists()
    process, connection = start(tmp_path / "params.toml", run)
    assert next(told(connection)) == 1
    for resume in (False, True):
        with pytest.raises(ClipretError, match=re.escape(message)):
            fit(config(toy, epochs=40), run, resume=resume)
    process.kill()
    process.join()
    with pytest.raises(ClipretError, match="pass --resume to continue"):
        fit(config(toy, epochs=40), run)
    with claimed(run):
        pass
    assert "run.lock" not in [file.name for file in run.iterdir()]


def test_a_training_that_never_began_leaves_the_folder_free(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.lock").touch()  # of a process that was killed before it wrote anything
    with pytest.raises(ClipretError, match="cannot be read"):
        fit(config(toy, val=str(toy / "gone.csv")), run)
    assert list(run.iterdir()) == []  # the folder itself was there before
    fit(config(toy, epochs=1, validate_every=1), run)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "letter.txt").write_text("not ours")
    with pytest.raises(ClipretError, match="exists and is not empty"):
        fit(config(toy), tmp_path / "others", resume=True)
    assert [file.name for file in (tmp_path / "others").iterdir()] == ["letter.txt"]


def test_streamed_images_resume_too(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an epoch, with an image that is found to be unreadable on the way."""
    data = tmp_path / "toy"
    shutil.copytree(toy, data)
    (data / "3.png").write_bytes(b"no more")
    given: dict[str, Any] = {"cache_limit": 0.0, "batch_size": 3, "captions": 1, "save_every": 2}
    whole = fit(config(data, **given), tmp_path / "whole").run
    _stop_at(monkeypatch, 6)
    with pytest.raises(_Killed):
        fit(config(data, **given), tmp_path / "run")
    monkeypatch.undo()
    result = fit(config(data, **given), tmp_path / "run", resume=True)
    assert_same_weights(whole, tmp_path / "run")
    assert result.skipped == 1
    assert (result.run / "skipped.tsv").read_text() == (whole / "skipped.tsv").read_text()


def test_a_kill_between_the_last_step_of_an_epoch_and_its_end(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed, a batch as large as the list, of which a quarter is found to be unreadable on the way."""
    data = tmp_path / "toy"
    shutil.copytree(toy, data)
    for name in ("3.png", "7.png", "8.png"):
        (data / name).write_bytes(b"no more")
    wanted = config(data, cache_limit=0.0, batch_size=64)
    whole = fit(wanted, tmp_path / "whole")
    assert (whole.last["step"], whole.skipped) == (4, 3)
    for epoch in (1, 3):
        original = module._epoch_metrics

        def stop(config: Any, at: Any, *more: Any, epoch: int = epoch, original: Any = original) -> Any:
            if at.epoch == epoch:
                raise _Killed
            return original(config, at, *more)

        with monkeypatch.context() as patch:
            patch.setattr(module, "_epoch_metrics", stop)
            with pytest.raises(_Killed):
                fit(wanted, tmp_path / "run", resume=True)
    fit(wanted, tmp_path / "run", resume=True)
    assert_same_weights(whole.run, tmp_path / "run")
    assert [line["lr"] for line in _lines(tmp_path / "run")] == [line["lr"] for line in _lines(whole.run)]
    assert all(0 < line["images_per_second"] < 1e5 for line in _lines(tmp_path / "run"))


def _stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = GradientStep.__call__

    def stop(self: GradientStep, batch: Any, number: int, *scale: Any) -> Any:
        if number == step:
            raise _Killed
        return original(self, batch, number, *scale)

    monkeypatch.setattr(GradientStep, "__call__", stop)


@pytest.mark.parametrize(
    "given",
    [
        {"adapter": "lora", "adapter_targets": ["projection"], "adapter_dropout": 0.2, "ema": 0.9},
        {"precision": "fp16", "epochs": 2},
        {"optimizer": "muon"},
    ],
    ids=["adapter", "fp16", "muon"],
)
def test_what_else_a_training_keeps_is_resumed(
    toy: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    given |= {"model": str(undisturbed), "lr": 1e-3}
    settings = {**config(toy).to_dict(), **given}
    wanted = FitConfig(**settings)
    whole = fit(wanted, tmp_path / "whole").run
    _stop_at(monkeypatch, 5)
    with pytest.raises(_Killed):
        fit(wanted, tmp_path / "run")
    monkeypatch.undo()
    fit(wanted, tmp_path / "run", resume=True)
    assert_same_weights(whole, tmp_path / "run")


def test_a_batch_without_a_number_is_named(
    toy: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the step before is whole: the run can go on from it."""
    original = Augmenter.__call__
    seen = 0

    def spoil(self: Augmenter, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        nonlocal seen
        seen += 1
        images = original(self, pixels, generator)
        if seen == 6:
            images[2] = float("nan")
        return images

    with monkeypatch.context() as patch:
        patch.setattr(Augmenter, "__call__", spoil)
        with pytest.raises(ClipretError, match=r"the loss is nan at step 6 of epoch 2 with .*\.png") as caught:
            fit(config(toy), tmp_path / "run")
    # Batch normalisation spreads it over the batch, but not over the other eight images.
    assert f"the last checkpoint is intact: {tmp_path / 'run' / 'checkpoints' / 'last.safetensors'}" in str(
        caught.value
    )
    named = (tmp_path / "run" / "log.txt").read_text().partition("its images: ")[2].splitlines()[0].split(", ")
    assert 1 <= len(named) <= 4
    assert all(Path(name).parent == toy for name in named)
    fit(config(toy), tmp_path / "run", resume=True)
    assert_same_weights(tmp_path / "run", undisturbed)


def test_a_run_that_is_done_stays_as_it_is(toy: Path, undisturbed: Path) -> None:
    before = {file: file.read_bytes() for file in (undisturbed / "checkpoints").iterdir()}
    result = fit(config(toy), undisturbed, resume=True)
    assert {file: file.read_bytes() for file in (undisturbed / "checkpoints").iterdir()} == before
    assert result.last == _lines(undisturbed)[-1]


def test_a_run_is_repeated_from_its_folder_to_the_byte(undisturbed: Path, tmp_path: Path) -> None:
    again = FitConfig.for_model(None, None, recipe=str(undisturbed / "params.toml"))
    assert again == FitConfig.read(undisturbed / "params.toml")
    fit(again, tmp_path / "run")
    assert_same_weights(tmp_path / "run", undisturbed)
    for name in ("last", "best"):
        files = [run / "checkpoints" / f"{name}.safetensors" for run in (tmp_path / "run", undisturbed)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_weights_of_one_step_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "me")
    seen = set()
    for _ in range(20):
        checkpoints.save_best({"w": torch.ones(2)}, 3)
        seen.add(checkpoints.best.read_bytes())
    assert len(seen) == 1


def test_checkpoints_with_a_key_for_each_are_still_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "me")
    checkpoints.save_last({"w": torch.ones(2)}, {"epoch": 1}, 7)
    save_file({"w": torch.ones(2)}, checkpoints.last, metadata={"step": "7", "identity": "me"})
    state = checkpoints.load_state()
    assert state is not None
    assert state["epoch"] == 1


def test_a_run_from_before_an_option_existed_is_resumed(toy: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"epochs": 1, "validate_every": 1}
    wanted = config(toy, optimizer="adamw", **given)
    before = wanted.to_dict()
    del before["optimizer"]
    decisive = {name: value for name, value in wanted.decisive().items() if name != "optimizer"}
    assert wanted.identity(1) == f"{seed_of(json.dumps(decisive), 1):016x}"
    run = fit(wanted, tmp_path / "run").run
    (run / "params.toml").write_text(tomli_w.dumps(before))
    fit(FitConfig.read(run / "params.toml"), run, resume=True)
    with pytest.raises(ClipretError, match=r"started with another optimizer \(optimizer: 'adamw', now 'muon'\)"):
        fit(config(toy, optimizer="muon", **given), run, resume=True)


def test_resume_refuses_another_configuration(toy: Path, undisturbed: Path) -> None:
    with pytest.raises(ClipretError, match=r"started with another lr, weight_decay \(lr: 0.002, now 0.5\)"):
        fit(config(toy, lr=0.5, weight_decay=0.3), undisturbed, resume=True)
    fit(config(toy, save_every=7, tensorboard=False), undisturbed, resume=True)  # decides nothing


def test_resume_refuses_a_list_that_has_changed(toy: Path, tmp_path: Path) -> None:
    data = tmp_path / "toy"
    shutil.copytree(toy, data)
    fit(config(data, epochs=1, validate_every=1), tmp_path / "run")
    rows = (data / "list.csv").read_text().splitlines()
    (data / "list.csv").write_text("\n".join(rows[:-9] + rows[-8:]) + "\n")
    with pytest.raises(ClipretError, match="has changed since this run started"):
        fit(config(data, epochs=1, validate_every=1), tmp_path / "run", resume=True)


def test_resume_refuses_a_checkpoint_of_another_model(toy: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    last = run / "checkpoints" / "last.safetensors"
    save_file({"weight": torch.zeros(3)}, last)
    with pytest.raises(ClipretError, match=r"last\.safetensors is from another run or model: restore"):
        fit(config(toy), run, resume=True)
    other = fit(config(toy, seed=1, epochs=1, validate_every=1), tmp_path / "other").run
    shutil.copy(other / "checkpoints" / "last.safetensors", last)
    with pytest.raises(ClipretError, match="another run or model"):
        fit(config(toy), run, resume=True)
    last.write_bytes(b"short")
    with pytest.raises(ClipretError, match="cannot be read"):
        fit(config(toy), run, resume=True)


@pytest.mark.parametrize("lost", ["weights", "state"])
def test_a_full_disk_leaves_the_checkpoint_before(undisturbed: Path, tmp_path: Path, lost: str) -> None:
    """No file may be as large as the weights; or as the state, which is larger."""
    run, (state,) = tmp_path / "run", (undisturbed / "checkpoints").glob("state-*.pt")
    small, large = (file.stat().st_size for file in (undisturbed / "checkpoints" / "last.safetensors", state))
    assert large > small
    limit = small // 2 if lost == "weights" else (small + large) // 2
    process, connection = start(undisturbed / "params.toml", run, limit)
    *steps, message = told(connection)
    process.join()
    assert steps == [1, 2, 3, 4, 5]
    assert "a checkpoint cannot be written" in message
    assert "the previous checkpoint is intact" in message
    assert f"clipret-train fit --resume --out {run}" in message
    assert "\n" not in message
    assert not list(run.rglob(".*.tmp"))
    assert load_model(str(run / "checkpoints" / "last.safetensors"))
    fit(FitConfig.read(undisturbed / "params.toml"), run, resume=True)
    assert_same_weights(run, undisturbed)


def test_state_files_hold_data_only(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "me")
    checkpoints.save_last({"w": torch.ones(2)}, {"step": 1}, 1)
    torch.save({"code": Path("x"), "identity": "me"}, tmp_path / "state-1.pt")
    with pytest.raises(ClipretError, match=r"state-1\.pt cannot be read"):
        checkpoints.load_state()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # the tests before left none
