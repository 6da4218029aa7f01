import copy
import doctest
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipret.errors import ClipretError
from clipret_training.optim import averaging, schedule
from clipret_training.optim.averaging import MovingAverage, greedy_soup, interpolate, uniform_soup


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def train(net: nn.Module, average: MovingAverage, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        average.update(net)


def test_the_average_is_the_recursion() -> None:
    net = model()
    net[0].requires_grad_(False)
    average = MovingAverage(net, 0.6)
    expected, mean = net[2].weight.detach().clone(), net[1].running_mean.clone()
    for step in range(1, 8):
        train(net, average, 1, step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net[2].weight.detach()
        mean = decay * mean + (1 - decay) * net[1].running_mean
    weights = copy.deepcopy(net.state_dict())
    with average.applied(net):
        torch.testing.assert_close(net[2].weight.detach(), expected)
        torch.testing.assert_close(net[1].running_mean, mean)
        assert torch.equal(net[0].weight, weights["0.weight"])  # frozen
        assert not torch.allclose(net[2].weight, weights["2.weight"])
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert "0.weight" not in average.state_dict()["averages"]


def test_a_resumed_average_goes_on_exactly(tmp_path: Any) -> None:
    straight = model()
    average = MovingAverage(straight, 0.9)
    train(straight, average, 3, 1)
    torch.save({"model": straight.state_dict(), "average": average.state_dict()}, tmp_path / "state.pt")
    train(straight, average, 4, 2)

    resumed = model(9)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = MovingAverage(resumed, 0.9)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["average"])
    train(resumed, again, 4, 2)
    with average.applied(straight), again.applied(resumed):
        assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())
    with pytest.raises(ClipretError, match=r"different models: .* has the weight 1\.bias"):
        MovingAverage(nn.Sequential(nn.Linear(4, 3)), 0.9).load_state_dict(saved["average"])


def test_weights_of_half_precision_are_averaged_in_float32() -> None:
    net = nn.Linear(2, 1, bias=False).bfloat16()
    net.weight.data.fill_(1.0)
    average = MovingAverage(net, 0.999)
    for _ in range(2000):  # in bfloat16, a step of one thousandth would be lost
        net.weight.data.fill_(2.0)
        average.update(net)
    with average.applied(net):
        assert net.weight.dtype == torch.bfloat16
        assert net.weight.float().min() > 1.8


def state(value: float, steps: int = 1) -> dict[str, Tensor]:
    return {"w": torch.full((2, 2), value), "half": torch.full((2,), value).half(), "steps": torch.tensor(steps)}


def test_interpolation_and_uniform_soup() -> None:
    mixed = interpolate(state(1.0, 5), state(3.0, 9), 0.25)
    assert torch.equal(mixed["w"], torch.full((2, 2), 1.5))
    assert (mixed["half"].dtype, mixed["half"][0].item()) == (torch.float16, 1.5)
    assert mixed["steps"].item() == 5
    assert torch.equal(interpolate(state(1.0), state(3.0), 1.0)["w"], state(3.0)["w"])
    values = {"a": 1.0, "b": 2.0, "c": 6.0}
    soup = uniform_soup(list(values), lambda name: state(values[name]))
    torch.testing.assert_close(soup.weights["w"], torch.full((2, 2), 3.0))
    assert soup.ingredients == ("a", "b", "c")
    with pytest.raises(ClipretError, match=r"alpha is 1\.5"):
        interpolate(state(1.0), state(3.0), 1.5)


def test_a_greedy_soup_takes_what_helps() -> None:
    """The best weights are 2.0: 1.4 and 2.8 mix well, 9.0 spoils the soup; the order of the names does not matter."""
    values = {"far": 9.0, "low": 1.4, "high": 2.8}
    lines: list[str] = []
    soup = greedy_soup(
        list(values), lambda name: state(values[name]), lambda w: -abs(float(w["w"].mean()) - 2.0), lines.append
    )
    assert soup.ingredients == ("low", "high")
    assert soup.weights["w"].mean().item() == pytest.approx(2.1)
    assert soup.quality == pytest.approx(-0.1)
    assert soup.quality >= max(soup.alone.values())
    assert [line for line in lines if "left out" in line] == [lines[-1]]


def test_different_models_do_not_mix() -> None:
    other = {**state(1.0), "more": torch.zeros(1)}
    with pytest.raises(ClipretError, match="a and b are different models: b has the weight more, a does not"):
        uniform_soup(["a", "b"], lambda name: other if name == "b" else state(1.0))
    wide = {**state(1.0), "w": torch.zeros(3, 2)}
    measured: list[Any] = []
    with pytest.raises(ClipretError, match=r"w is \[2, 2\] in one and \[3, 2\] in the other"):
        greedy_soup(["a", "b"], lambda name: wide if name == "b" else state(1.0), measured.append)
    assert not measured
    with pytest.raises(ClipretError, match=r"decay of a moving average is 1\.0"):
        MovingAverage(model(), 1.0)


@pytest.mark.parametrize("module", [averaging, schedule])
def test_the_examples_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
