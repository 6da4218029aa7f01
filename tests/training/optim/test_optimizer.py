import copy
from typing import Any

import open_clip
import pytest
import torch
from timm.optim.muon import Muon
from torch import nn

from clipret_training.optim.optimizer import make_optimizer
from clipret_training.tuning.adapters import AdapterConfig, add_adapters
from clipret_training.tuning.freezing import layer_weights, parameter_groups

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
TEXT = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 99, "context_length": 12}
LR, DECAY = 0.01, 0.1


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT)


def optimizer(model: nn.Module, *, muon: bool) -> torch.optim.Optimizer:
    groups = parameter_groups(model, lr=LR, weight_decay=DECAY, muon=muon)
    return make_optimizer(groups, lr=LR, betas=(0.9, 0.98), epsilon=1e-6)


def learn(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(4, 3, 32, 32, generator=draw)
    ids = torch.randint(1, 98, (4, 12), generator=draw)
    optimizer.zero_grad()
    (model.encode_image(images) @ model.encode_text(ids).T * model.logit_scale.exp()).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_muon_makes_the_steps_of_layer_weights_orthogonal_and_leaves_the_rest_to_adamw(
    model: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipret_training.optim.optimizer.native_precision", lambda _: precision)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    other = copy.deepcopy(model)
    learn(model, optimizer(model, muon=True), 0)
    learn(other, optimizer(other, muon=False), 0)
    weights = layer_weights(model)
    assert "visual.transformer.resblocks.1.mlp.c_fc.weight" in weights
    with torch.no_grad():
        for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            if name not in weights:
                assert torch.equal(ours, theirs), name
                continue
            # At the first step the momentum is the gradient: count its directions beyond the rounding of bf16.
            singular = torch.linalg.svdvals((ours.grad / ours.grad.norm()).flatten(1))
            directions = int((singular > torch.finfo(torch.bfloat16).eps).sum())
            kept = start[name] * (1 - LR * DECAY)
            both = (torch.linalg.svdvals(((kept - weight) / LR).flatten(1)) for weight in (ours, theirs))
            steps, plain = (values[:directions] / (0.2 * max(ours.flatten(1).shape) ** 0.5) for values in both)
            assert steps.min() > 0.9, name
            assert steps.max() < 1.2, name  # all directions move as far as in AdamW's steps,
            assert plain.max() > 5, name  # which follow few directions


@pytest.mark.parametrize("muon", [False, True])
def test_a_restored_optimizer_goes_on_exactly(model: Any, muon: bool) -> None:
    ours = optimizer(model, muon=muon)
    for seed in range(3):
        learn(model, ours, seed)
    copied = copy.deepcopy(model)
    theirs = optimizer(copied, muon=muon)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for group in (*ours.param_groups, *theirs.param_groups):
        group["lr"] = LR / 2  # as a schedule does after the moments are restored
    learn(model, ours, 3)
    learn(copied, theirs, 3)
    for weight, copied_weight in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(weight, copied_weight)
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()


def test_either_may_have_nothing_to_do(model: Any) -> None:
    add_adapters(model, AdapterConfig(2, 4, targets=("q",)))  # only weights of layers
    learn(model, optimizer(model, muon=True), 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "positional_embedding")
    before = model.positional_embedding.detach().clone()
    learn(model, optimizer(model, muon=True), 0)
    assert not torch.equal(model.positional_embedding, before)


def matrices() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((256, 768), (1024, 256), (64, 3, 4, 4), (128, 64, 3, 3))
    weights = [0.05 * torch.randn(shape, generator=draw) for shape in shapes]
    channels_last = [w.to(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
    return [nn.Parameter(weight) for weight in channels_last]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_muon_is_timms_in_either_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipret_training.optim.optimizer.native_precision", lambda _: precision)
    start, ours, theirs = matrices(), matrices(), matrices()
    group = {"params": ours, "lr": LR, "weight_decay": DECAY, "use_muon": True}
    optimizers = (
        make_optimizer([group], lr=LR, betas=(0.9, 0.98), epsilon=1e-6),
        Muon(theirs, LR, DECAY, nesterov=True),
    )
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        for our, their in zip(ours, theirs, strict=True):
            our.grad = torch.randn(our.shape, generator=draw)
            their.grad = our.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for before, our, their in zip(start, ours, theirs, strict=True):
        moved, difference = ((weight - their).detach().norm() for weight in (before, our))
        assert moved > 0.1
        # timm computes in bf16, with an order of summation that depends on the processor: two roundings at most.
        assert difference < 2 * torch.finfo(torch.bfloat16).eps * moved
