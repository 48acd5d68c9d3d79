"""The trainer's way to torch's engine: the same gradients, and the ordinary way wherever something is unusual."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from resumable_trainer.trainer import backward
from resumable_trainer.trainer.backward import Backward

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Losses that went the ordinary way."""
    losses: list[torch.Tensor] = []
    original = torch.Tensor.backward

    def told(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        losses.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", told)
    return losses


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    yield
    backward._is_as_expected.cache_clear()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(net: nn.Module) -> torch.Tensor:
    return net(torch.linspace(-1, 1, 24).reshape(6, 4)).square().mean()


def test_gradients_are_torchs_to_the_bit(ordinary: list[torch.Tensor]) -> None:
    mine, theirs = model(), model()
    asked = Backward(mine)
    ordinary.clear()
    for _ in range(3):  # each added to those before
        asked(loss_of(mine))
    assert not ordinary
    for _ in range(3):
        loss_of(theirs).backward()
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_the_gradient_that_is_put_in_stays_one(ordinary: list[torch.Tensor]) -> None:
    """Of a loss that is a parameter it is the parameter's gradient, which others write into."""
    parameter = nn.Parameter(torch.tensor(2.0))
    asked = Backward(nn.Identity())
    ordinary.clear()
    for _ in range(2):
        parameter.grad = None
        asked(parameter.view(()))
        assert parameter.grad == 1.0
        parameter.grad.mul_(5.0)
    assert not ordinary


class Listens(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_what_is_unusual_goes_the_ordinary_way(ordinary: list[torch.Tensor]) -> None:
    net = model()
    asked = Backward(net)
    ordinary.clear()
    asked(loss_of(net).reshape(1))
    assert len(ordinary) == 1
    with Listens():
        asked(loss_of(net))
    assert len(ordinary) > 1
    ordinary.clear()
    with pytest.raises(RuntimeError, match="does not require grad"):
        asked(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs"):
        asked(net(torch.ones(3, 4)))
    parameter = nn.Parameter(torch.tensor(2.0))
    asked(parameter)
    assert parameter.grad == 1.0
    assert len(ordinary) == 3


def test_hooks_and_anomalies_are_the_engines_and_not_passed_by(ordinary: list[torch.Tensor]) -> None:
    net, told = model(), []
    asked = Backward(net)
    ordinary.clear()
    next(net.parameters()).register_hook(lambda grad: told.append(grad))
    next(net.parameters()).register_post_accumulate_grad_hook(lambda parameter: told.append(parameter))
    asked(loss_of(net))
    assert len(told) == 2
    with (
        warnings.catch_warnings(action="ignore"),
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        asked((next(net.parameters()) * 0).sum().sqrt())
    assert not ordinary


def test_a_model_that_is_compiled_goes_the_ordinary_way(ordinary: list[torch.Tensor]) -> None:
    net = model()
    net[0].compile(backend="eager")  # type: ignore[index]
    assert Backward(net)._run is None
    assert Backward(nn.Sequential(torch.compile(model(), backend="eager")))._run is None  # type: ignore[arg-type]
    Backward(net)(loss_of(model()))
    assert len(ordinary) == 1


def test_whoever_debugs_the_graph_sees_it(ordinary: list[torch.Tensor]) -> None:
    logger = logging.getLogger("torch.autograd.graph")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        assert Backward(model())._run is None
    finally:
        logger.setLevel(level)


@pytest.mark.parametrize("fault", ["refuses", "gives others"])
def test_an_engine_that_is_called_otherwise_is_not_called(
    monkeypatch: pytest.MonkeyPatch, ordinary: list[torch.Tensor], fault: str
) -> None:
    backward._is_as_expected.cache_clear()
    real = backward._engine()

    def engine(tensors: Any, grads: Any, *args: Any, **kwargs: Any) -> Any:
        if fault == "refuses":
            raise TypeError("takes other arguments")
        return real(tensors, (grads[0] * 2,), *args, **kwargs)

    monkeypatch.setattr(backward, "_engine", lambda: engine)
    net = model()
    asked = Backward(net)
    assert asked._run is None
    ordinary.clear()
    asked(loss_of(net))
    assert len(ordinary) == 1
