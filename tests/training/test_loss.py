import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipret.training.loss import contrastive_loss, retrieval_accuracy


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


# Picture 0 and 1 share caption 1; picture 2 has two captions of its own.
RIGHT = [[0, 1], [1], [2, 3]]


def mask(right: list[list[int]], texts: int) -> Tensor:
    return torch.tensor([[t in chosen for t in range(texts)] for chosen in right])


def test_loss_equals_the_definition() -> None:
    images, texts = rows(3, 1), rows(4, 2)
    loss = contrastive_loss(images, texts, torch.tensor(7.0), mask(RIGHT, 4))
    assert float(loss) == pytest.approx(reference(images, texts, 7.0, RIGHT), rel=1e-6)


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
    assert float(loss) == pytest.approx(float(clip), rel=1e-6)


def test_a_shared_caption_is_no_negative() -> None:
    """Two pictures with the same caption: pulling both to it must cost nothing."""
    images = rows(1, 7).repeat(2, 1)
    texts = images[:1].repeat(2, 1)
    shared = contrastive_loss(images, texts, torch.tensor(50.0), torch.ones(2, 2, dtype=torch.bool))
    assert float(shared) == pytest.approx(math.log(2))  # the entropy of two equal answers: the least there is


def test_accuracy_counts_captions_whose_nearest_picture_is_right() -> None:
    images = torch.eye(3)
    texts = torch.stack([images[0], images[1], images[0], images[2]])
    assert float(retrieval_accuracy(images, texts, mask(RIGHT, 4))) == pytest.approx(3 / 4)
