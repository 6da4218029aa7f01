"""The gradients of a step: in parts as at once, with early pooling as without, in three precisions."""

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip_train.scheduler import cosine_lr
from safetensors.torch import save_file
from torch import nn

from clipret.errors import ClipretError
from clipret_training.data.batches import Batch, TextBatch
from clipret_training.loss import LossConfig
from clipret_training.models.chinese_clip_model import ChineseClip
from clipret_training.models.early_pooling import pool_early
from clipret_training.models.load import load_model
from clipret_training.optim.schedule import learning_rate
from clipret_training.seeds import seed_of
from clipret_training.step import GradientStep, StepResult
from clipret_training.tuning.techniques import checkpoint_gradients, drop_patches

CPU = torch.device("cpu")
B, SIZE = 12, 32


@pytest.fixture
def clip(tmp_path: Path) -> Any:
    """An open_clip model of two layers a tower."""
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**model_cfg).state_dict(), tmp_path / "open_clip_model.safetensors")
    return load_model(str(tmp_path)).model.train()


def chinese() -> Any:
    vision = {"image_size": SIZE, "patch_size": 8, "width": 64, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
    text = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    return ChineseClip({"vision": vision, "text": text, "embed_dim": 16}).train()


def batch(*, groups: int = 1, vocabulary: int = 49406) -> Batch:
    """Images with two captions each, in groups by length; end-of-text has the largest id."""
    draw = torch.Generator().manual_seed(0)
    T = 2 * B
    lengths = torch.randint(3, 12, (T,), generator=draw).sort().values
    ids = torch.randint(1, vocabulary - 1, (T, 12), generator=draw)
    ids[torch.arange(12) >= lengths[:, None]] = 0
    ids[torch.arange(T), lengths - 1] = vocabulary - 1
    parts = [
        part[:, : int(lengths[rows].max())]
        for part, rows in zip(ids.tensor_split(groups), torch.arange(T).tensor_split(groups), strict=True)
    ]
    places = torch.randperm(T, generator=draw)
    captions = torch.arange(T)
    owners = torch.arange(T) // 2
    images = torch.randn(B, 3, SIZE, SIZE, generator=draw)
    return Batch(images, TextBatch(captions, tuple(parts), places), torch.arange(B)[:, None], owners[:, None])


def gradients(model: Any, work: Batch, **given: Any) -> tuple[StepResult, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    step = GradientStep(
        model, given.pop("loss", LossConfig()), precision=given.pop("precision", "fp32"), device=CPU, **given
    )
    result = step(work, 1)
    return result, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    assert max(float(gradient.abs().max()) for gradient in theirs.values()) > 1e-3
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], rtol=1e-4, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(label_smoothing=0.1, drop_worst=0.25)])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(clip: Any, parts: int, loss: LossConfig) -> None:
    whole, expected = gradients(clip, batch(), loss=loss)
    result, ours = gradients(clip, batch(groups=parts), parts=parts, loss=loss)
    assert result.loss == pytest.approx(whole.loss, abs=1e-5)
    assert result.accuracy == whole.accuracy
    assert_alike(ours, expected)


def test_parts_meet_the_same_dropout_and_patches_twice(clip: Any) -> None:
    """Rows of the first and of the second pass are the same, so the gradients are those of a loss that was computed."""
    clip.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    seen: list[torch.Tensor] = []
    original = clip.encode_image
    clip.encode_image = lambda images: seen.append(original(images)) or seen[-1]  # type: ignore[func-returns-value]
    gradients(clip, batch(groups=2), parts=2)
    first, second, again, once_more = seen
    assert torch.equal(first, again)
    assert torch.equal(second, once_more)
    assert not torch.equal(first, original(batch().images[:6]))  # and patches were left out


def test_running_statistics_move_once_however_many_parts() -> None:
    model = load_model("clipret-small", captions=["a red car on a road"] * 20).model.train()
    model.visual.dropout.p = model.text.dropout.p = 0.0
    once, twice = copy.deepcopy(model), copy.deepcopy(model)
    work = batch(groups=2, vocabulary=6)
    gradients(once, work)
    gradients(twice, work, parts=2)
    norm = once.visual.stem[1]
    assert int(norm.num_batches_tracked) == 1
    assert int(twice.visual.stem[1].num_batches_tracked) == 2  # two parts, the second pass alone
    assert norm.momentum == twice.visual.stem[1].momentum == 0.1


def test_early_pooling_changes_neither_rows_nor_gradients(clip: Any) -> None:
    whole, expected = gradients(clip, batch(groups=3))
    names = list(clip.state_dict())
    pool_early(clip)
    assert list(clip.state_dict()) == names
    computed: list[int] = []
    clip.visual.transformer.resblocks[-1].mlp.register_forward_hook(lambda *a: computed.append(a[2].shape[1]))
    clip.transformer.resblocks[-1].mlp.register_forward_hook(lambda *a: computed.append(a[2].shape[1]))
    result, ours = gradients(clip, batch(groups=3))
    assert computed == [1, 1, 1, 1]  # one token of each, in one group of images and three of texts
    assert result.loss == pytest.approx(whole.loss, abs=1e-5)
    assert_alike(ours, expected)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("make", ["clip", "chinese"])
def test_checkpointed_gradients_are_the_same(
    make: str, precision: str, parts: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue("clip") if make == "clip" else chinese()
    work = batch(groups=parts, vocabulary=49406 if make == "clip" else 98)
    given: dict[str, Any] = {"precision": precision, "parts": parts}
    blocks = [m for m in model.modules() if type(m).__name__ in ("ResidualAttentionBlock", "BertLayer")]
    runs: list[int] = []
    for block in blocks:
        inner = getattr(block, "mlp", None) or block.intermediate
        inner.register_forward_pre_hook(lambda *_: runs.append(1))
    _, expected = gradients(model, work, **given)
    assert len(blocks) == 4
    once = len(runs)
    checkpoint_gradients(model)
    _, ours = gradients(model, work, **given)
    assert len(runs) == 2 * once + parts * len(blocks)  # once more in the backward pass of each part
    assert_alike(ours, expected)


def test_techniques_that_a_model_does_not_have_are_refused() -> None:
    small = load_model("clipret-small", captions=["a red car on a road"] * 20).model
    with pytest.raises(ClipretError, match="no blocks that support gradient checkpointing"):
        checkpoint_gradients(small)
    with pytest.raises(ClipretError, match="the image tower is a _ImageTower"):
        drop_patches(small, 0.5)


def test_patches_are_left_out_in_training_only(clip: Any) -> None:
    before = clip.eval().encode_image(batch().images)
    drop_patches(clip, 0.5)
    assert torch.equal(clip.encode_image(batch().images), before)
    lengths: list[int] = []
    clip.visual.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    clip.train().encode_image(batch().images)
    assert lengths == [1 + 8]  # half of 16 patches, and the class token


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_lower_precisions_are_near(clip: Any, precision: Any, tolerance: float) -> None:
    whole, expected = gradients(clip, batch())
    result, ours = gradients(clip, batch(), precision=precision)
    assert result.loss == pytest.approx(whole.loss, rel=tolerance)
    for name, gradient in expected.items():
        assert ours[name].dtype == torch.float32
        if gradient.norm() > 1e-3:
            assert nn.functional.cosine_similarity(ours[name].flatten(), gradient.flatten(), dim=0) > 0.98, name


@pytest.mark.filterwarnings("ignore:Guards may run slower")  # of Python 3.13.0
def test_a_compiled_step_is_the_same(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as for inductor, whose code would take minutes to make."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    whole, expected = gradients(clip, batch(groups=2))
    result, ours = gradients(clip, batch(groups=2), compiled=True)
    assert result.loss == pytest.approx(whole.loss, abs=1e-5)
    assert_alike(ours, expected)


def test_rows_that_are_no_number_are_told_and_make_no_gradient(clip: Any) -> None:
    work = batch()
    work.images[5, 0, 0, 0] = float("nan")
    result, ours = gradients(clip, work)
    assert result.broken == (5,)
    assert ours == {}


def test_learning_rates() -> None:
    cosine = [learning_rate(step, 100, lr=2.0, warmup=0.1, schedule="cosine") for step in range(1, 101)]
    # What open_clip's own trainer sets, step by step.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0)
    theirs = cosine_lr(optimizer, base_lr=2.0, warmup_length=10, steps=100)
    assert cosine == pytest.approx([theirs(step) for step in range(100)])
    assert cosine[9] == max(cosine) == 2.0
    assert learning_rate(1, 3, lr=2.0, warmup=0.1, schedule="cosine") == 2.0  # a rise shorter than a step
    assert learning_rate(3, 3, lr=2.0, warmup=1.0, schedule="cosine") == 2.0  # all of it a rise
    constant = [learning_rate(step, 100, lr=2.0, warmup=0.1, schedule="constant") for step in range(1, 101)]
    assert constant[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert set(constant[10:]) == {2.0}


def test_seeds_differ_by_every_part_of_their_place() -> None:
    places = [(0, "order", 1, 0), (0, "order", 2, 0), (0, "order", 1, 1), (1, "order", 1, 0), (0, "step", 1, 0)]
    assert len({seed_of(*place) for place in places}) == len(places)
    assert seed_of(*places[0]) == seed_of(*places[0])
    assert all(0 <= seed_of(*place) < 2**63 for place in places)


def test_hard_negatives_and_soft_labels_go_in_parts_too(clip: Any) -> None:
    plain = gradients(clip, batch())[0].loss
    ids = batch().texts.groups[0]
    draw = torch.Generator().manual_seed(1)
    given = {
        "negatives": ids[:5].roll(3, 1).clamp(min=1),
        "negative_keys": torch.full((5, 1), -1),
        "image_attributes": torch.rand(B, 4, generator=draw) < 0.5,
        "text_attributes": torch.rand(2 * B, 4, generator=draw) < 0.5,
    }
    loss = LossConfig(kind="soft")
    whole, expected = gradients(clip, dataclasses.replace(batch(), **given), loss=loss)
    result, ours = gradients(clip, dataclasses.replace(batch(groups=2), **given), loss=loss, parts=2)
    assert result.loss == pytest.approx(whole.loss, abs=1e-5)
    assert abs(whole.loss - plain) > 0.01
    assert_alike(ours, expected)
    none = {"negatives": torch.empty(0, 1, dtype=torch.int64), "negative_keys": torch.empty(0, 1, dtype=torch.int64)}
    assert gradients(clip, dataclasses.replace(batch(), **none))[0].loss == pytest.approx(plain, abs=1e-5)
