import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import Tensor

from clipret.errors import ClipretError
from clipret_training.loss import (
    LossBatch,
    LossConfig,
    attribute_overlap,
    compute_loss,
    contrastive_loss,
    positive_mask,
    retrieval_accuracy,
)


def rows(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 8, generator=generator, dtype=torch.float64), dim=-1)


def reference(images: Tensor, texts: Tensor, scale: float, right: list[list[int]]) -> float:
    """The definition in words: for each row the mean over its right answers of -log softmax."""
    logits = [[scale * float(i @ t) for t in texts] for i in images]

    def side(table: list[list[float]], answers: list[list[int]]) -> float:
        total = 0.0
        for line, chosen in zip(table, answers, strict=True):
            log_sum = math.log(sum(map(math.exp, line)))
            total += sum(log_sum - line[at] for at in chosen) / len(chosen)
        return total / len(table)

    columns = [list(column) for column in zip(*logits, strict=True)]
    owners = [[i for i, chosen in enumerate(right) if t in chosen] for t in range(len(texts))]
    return (side(logits, right) + side(columns, owners)) / 2


# Image 0 and 1 share caption 1; image 2 has two captions of its own.
RIGHT = [[0, 1], [1], [2, 3]]


def mask(right: list[list[int]], texts: int) -> Tensor:
    return torch.tensor([[t in chosen for t in range(texts)] for chosen in right])


def test_loss_equals_the_definition() -> None:
    images, texts = rows(3, 1), rows(4, 2)
    loss = contrastive_loss(images, texts, torch.tensor(7.0), mask(RIGHT, 4))
    assert float(loss) == pytest.approx(reference(images, texts, 7.0, RIGHT), rel=1e-5)


def test_gradient_equals_finite_differences() -> None:
    images, texts = rows(3, 3).requires_grad_(), rows(4, 4).requires_grad_()
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    right = mask(RIGHT, 4)
    # The rows move off the unit sphere here, which the loss does not mind.
    torch.autograd.gradcheck(lambda i, t, s: contrastive_loss(i, t, s, right), (images, texts, scale))


def test_one_to_one_is_clips_loss() -> None:
    images, texts = rows(5, 5), rows(5, 6)
    logits, same = 3.0 * images @ texts.T, torch.arange(5)
    clip = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
    loss = contrastive_loss(images, texts, torch.tensor(3.0), torch.eye(5, dtype=torch.bool))
    assert float(loss) == pytest.approx(float(clip), rel=1e-5)


def test_a_shared_caption_is_no_negative() -> None:
    """Two images with the same caption: pulling both to it must cost nothing."""
    images = rows(1, 7).repeat(2, 1)
    texts = images[:1].repeat(2, 1)
    shared = contrastive_loss(images, texts, torch.tensor(50.0), torch.ones(2, 2, dtype=torch.bool))
    assert float(shared) == pytest.approx(math.log(2))  # the entropy of two equal answers: the least there is


def test_accuracy_counts_captions_whose_nearest_image_is_right() -> None:
    images = torch.eye(3)
    texts = torch.stack([images[0], images[1], images[0], images[2]])
    assert float(retrieval_accuracy(images, texts, mask(RIGHT, 4))) == pytest.approx(3 / 4)


# The same relation as RIGHT, said with keys: captions are 0..3, the group of image 2 and its captions is 9.
IMAGE_KEYS = torch.tensor([[0, 1, -1], [1, -1, -1], [2, 3, 9]])
TEXT_KEYS = torch.tensor([[0, -1], [1, -1], [2, 9], [3, 9]])


def batch(**more: Any) -> LossBatch:
    return LossBatch(rows(3, 1), rows(4, 2), IMAGE_KEYS, TEXT_KEYS, **more)


def value(config: LossConfig, of: LossBatch, scale: float = 7.0, bias: float | None = None) -> float:
    return compute_loss(config, of, torch.tensor(scale), None if bias is None else torch.tensor(bias)).item()


def test_rows_that_share_a_key_are_positives() -> None:
    assert torch.equal(positive_mask(IMAGE_KEYS, TEXT_KEYS), mask(RIGHT, 4))
    assert not positive_mask(torch.tensor([[-1]]), torch.tensor([[-1]])).any()  # no key is nobody's key


def test_the_default_is_the_contrastive_loss() -> None:
    assert value(LossConfig(), batch()) == pytest.approx(reference(rows(3, 1), rows(4, 2), 7.0, RIGHT), rel=1e-5)


def test_siglip_equals_its_definition() -> None:
    """Equation 1 of the paper, over images and over texts."""
    total = 0.0
    for i, image in enumerate(rows(3, 1)):
        for t, text in enumerate(rows(4, 2)):
            z = 1 if t in RIGHT[i] else -1
            total += math.log1p(math.exp(-z * (7.0 * float(image @ text) - 3.0)))
    assert value(LossConfig("siglip"), batch(), bias=-3.0) == pytest.approx((total / 3 + total / 4) / 2, rel=1e-5)


def test_siglip_of_single_pairs_is_open_clips() -> None:
    images, texts, keys = rows(5, 5).float(), rows(5, 6).float(), torch.arange(5)[:, None]
    ours = value(LossConfig("siglip"), LossBatch(images, texts, keys, keys), 4.0, -2.0)
    theirs = SigLipLoss(rank=0, world_size=1)(images, texts, torch.tensor(4.0), torch.tensor(-2.0))
    assert ours == pytest.approx(float(theirs), rel=1e-5)


def test_label_smoothing_is_torchs() -> None:
    images, texts, keys = rows(5, 5), rows(5, 6), torch.arange(5)[:, None]
    logits, same = 3.0 * images @ texts.T, torch.arange(5)
    expected = sum(F.cross_entropy(side, same, label_smoothing=0.2) for side in (logits, logits.T)) / 2
    ours = value(LossConfig(label_smoothing=0.2), LossBatch(images, texts, keys, keys), 3.0)
    assert ours == pytest.approx(float(expected), rel=1e-5)


def test_the_worst_rows_are_left_out() -> None:
    """Ten pairs of which two have the wrong caption: with 20 % dropped only the others are learned from."""
    images, keys = torch.eye(10, dtype=torch.float64), torch.arange(10)[:, None]
    texts = images[[0, 1, 2, 3, 4, 5, 6, 7, 9, 8]].clone().requires_grad_()
    scale = torch.tensor(20.0, dtype=torch.float64)
    loss = compute_loss(LossConfig(drop_worst=0.2), LossBatch(images, texts, keys, keys), scale)
    logits = scale * images @ texts.T
    losses = -logits.log_softmax(dim=1).diagonal()
    assert loss.item() == pytest.approx(losses[:8].mean().item())
    assert value(LossConfig(drop_worst=0.19), LossBatch(images, texts, keys, keys), 20.0) > 1
    loss.backward()
    assert texts.grad is not None
    assert texts.grad[8:].abs().max() < 1e-6


def test_soft_targets_are_least_where_the_model_agrees_with_the_attributes() -> None:
    """Attributes: colour and type. A red car is half a red van and nothing of a blue dog."""
    of = torch.tensor([[1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1]])
    overlap = attribute_overlap(of, of)
    torch.testing.assert_close(overlap, torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1.0]]))
    assert attribute_overlap(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0
    keys = torch.arange(3)[:, None]
    config = LossConfig("soft", soft_weight=1.0, soft_temperature=0.5)
    rows_ = torch.linalg.cholesky(overlap)  # rows whose products are the overlaps
    agrees = LossBatch(rows_, rows_, keys, keys, of, of)
    assert value(config, agrees, 1 / 0.5) == pytest.approx(0, abs=1e-5)
    assert value(config, agrees, 20.0) > 0.1  # surer than the attributes are
    hard = LossConfig("soft", soft_weight=0.0)
    assert value(hard, agrees, 5.0) == pytest.approx(value(LossConfig(), agrees, 5.0), rel=1e-5)
    assert value(config, agrees, 5.0) > value(LossConfig("soft", soft_weight=0.5), agrees, 5.0) > 0


def test_hard_negatives_are_further_columns_of_the_images() -> None:
    """The second one happens to be a caption of image 2, which it must not be pushed from."""
    extra = rows(2, 8)
    with_extra = batch(negative_embeddings=extra, negative_keys=torch.tensor([[-1], [3]]))
    images, texts = rows(3, 1), rows(4, 2)
    logits = torch.cat([7.0 * images @ texts.T, 7.0 * images @ extra.T], dim=1)
    logits[2, 5] = -math.inf
    expected = sum(-logits.log_softmax(dim=1)[i, chosen].mean() for i, chosen in enumerate(RIGHT)) / 3
    columns = (7.0 * images @ texts.T).T.log_softmax(dim=1)
    expected += sum(-columns[t, [i for i in range(3) if t in RIGHT[i]]].mean() for t in range(4)) / 4
    assert value(LossConfig(), with_extra) == pytest.approx(float(expected) / 2, rel=1e-5)
    for config in (LossConfig(label_smoothing=0.1), LossConfig("siglip")):
        assert math.isfinite(value(config, with_extra, bias=-1.0))
        assert value(config, with_extra, bias=-1.0) > value(config, batch(), bias=-1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "hinge"}, "kind is 'hinge' .*: it must be one of infonce, siglip, soft"),
        ({"drop_worst": 1.0}, "drop_worst is 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"soft_weight": 2}, "soft_weight is 2"),
        ({"soft_temperature": 0}, "soft_temperature is 0"),
        ({"kind": "siglip", "label_smoothing": 0.1}, "does not work with the siglip loss"),
    ],
)
def test_a_loss_that_makes_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ClipretError, match=message):
        LossConfig(**given)


def test_what_a_loss_needs_is_asked_for() -> None:
    with pytest.raises(ClipretError, match="logit bias"):
        value(LossConfig("siglip"), batch())
    with pytest.raises(ClipretError, match="attributes"):
        value(LossConfig("soft"), batch())


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    """Over gloo, with unequal numbers of rows, keys of unequal width, hard negatives and attributes."""
    generator = torch.Generator().manual_seed(1)

    def part(B: int, T: int, N: int, first: int, keys: int) -> dict[str, Tensor]:
        owners = torch.arange(T) % B
        return {
            "image_inputs": torch.randn(B, 6, generator=generator),
            "text_inputs": torch.randn(T, 6, generator=generator),
            # An image's own number, and one of three groups that reach across the processes.
            "image_keys": torch.stack([first + torch.arange(B), 100 + torch.arange(B) % 3], dim=1),
            "text_keys": torch.stack([first + owners] + [100 + owners % 3] * keys, dim=1),
            "image_attributes": torch.randint(2, (B, 4), generator=generator),
            "text_attributes": torch.randint(2, (T, 4), generator=generator),
            "negative_inputs": torch.randn(N, 6, generator=generator),
            "negative_keys": torch.full((N, 1), 101),
        }

    parts = [part(5, 7, 2, 0, 2), part(4, 9, 3, 50, 1)]
    weights = torch.randn(8, 6, generator=generator)
    options: list[dict[str, Any]] = [
        {},
        {"drop_worst": 0.3},
        {"kind": "siglip"},
        {"kind": "siglip", "drop_worst": 0.3},
        {"kind": "soft", "label_smoothing": 0.1},
    ]
    cases = [(LossConfig(**given, local_loss=local), parts, weights) for given in options for local in (False, True)]
    torch.save(cases, tmp_path / "cases.pt")
    worker = Path(__file__).with_name("gather_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, worker, str(rank), "2", tmp_path], stderr=subprocess.PIPE, env=environment)
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()

    spec = importlib.util.spec_from_file_location("gather_worker", worker)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wide = [{**p, "text_keys": F.pad(p["text_keys"], (0, 3 - p["text_keys"].shape[1]), value=-1)} for p in parts]
    whole = {name: torch.cat([p[name] for p in wide]) for name in parts[0]}
    for rank in (0, 1):
        results, refused = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert "process 1 has negative_embeddings, process 0 does not" in refused
        for (config, _, _), (loss, gradients) in zip(cases, results, strict=True):
            expected, expected_gradients = module.run(config, whole, weights, 1)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
            for ours, theirs in zip(gradients, expected_gradients, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            assert expected_gradients[0].abs().max() > 1e-3
