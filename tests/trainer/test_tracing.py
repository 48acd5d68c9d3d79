"""Traced steps, run as graphs, against the same step by hand."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from resumable_trainer.trainer import compiled, conditions, tracing

if TYPE_CHECKING:
    from collections.abc import Callable


class Mean(nn.Module):
    """Gives its buffer a new tensor at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0)
        return self.layer(inputs - self.mean)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.back.weight = self.there.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.back(torch.tanh(self.there(inputs)))[:, :1]


class Constant(nn.Module):
    """Refers to a tensor that is neither parameter nor buffer, and makes one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 1), torch.tensor([2.0])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) * self.scale + torch.arange(1, dtype=torch.float32)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.used(inputs)


class Noisy(nn.Module):
    """Draws in several ways, one of them for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        inputs = nn.functional.dropout(inputs + 0.1 * torch.randn_like(inputs), 0.3)
        return self.layer(inputs) + torch.empty(len(inputs), 1).uniform_(-0.1, 0.1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True), nn.LayerNorm(4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        sequence = inputs[:, None] * torch.ones(1, 3, 1)
        return self.norm(sequence + self.attention(sequence, sequence, sequence)[0]).mean(1)[:, :1]


def spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 1))


def convolution() -> nn.Module:
    # Normalised at once, its bias would have no gradient but rounding errors, of which Adam makes whole steps.
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2), nn.GELU(), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 1)
    )


def recurrent() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(1, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.out(self.rnn(inputs[..., None])[0][:, -1])

    return Last()


def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return ((outputs - targets) ** 2).mean()


def by_graph(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
    recipe = tracing.Recipe(tracing.Pair(model, loss_fn), optimizer, {}, None, keep_outputs=False)
    steps = compiled.CompiledSteps.__new__(compiled.CompiledSteps)
    steps._recipe, steps._rates = recipe, []
    live, _ = steps._inputs(conditions.Members.of(recipe.pair))
    for rate, group in zip(live.rates, optimizer.param_groups, strict=True):
        rate.fill_(group["lr"])
    leaves, spec = pytree.tree_flatten((inputs, targets))
    traced = tracing.trace(recipe, live, leaves, spec)
    return traced.graph(*live.flat(), *leaves, *traced.constants, *(draw() for draw in traced.draws))[0]


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
    loss = loss_fn(model(inputs), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


MODELS: list[Callable[[], nn.Module]] = [
    Mean, Tied, Constant, Unused, Noisy, Attention, spectral, convolution, recurrent
]  # fmt: skip


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_graph_does_what_the_step_does(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs, targets = torch.randn(6, 4), torch.randn(6, 1)
    by_hand(model, optimizer, inputs, targets)
    others = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    twin = others[0]
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    twin_optimizer.load_state_dict(others[1])
    for number in range(3):
        torch.manual_seed(number)
        expected = by_hand(twin, twin_optimizer, inputs, targets)
        after = torch.get_rng_state()
        torch.manual_seed(number)
        got = by_graph(model, optimizer, inputs, targets)
        assert torch.equal(after, torch.get_rng_state()), "as much is drawn"
        torch.testing.assert_close(got, expected)
    for (name, tensor), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other, msg=name)
    assert len(optimizer.state) == len(twin_optimizer.state)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_members_are_those_that_torch_names(make: Callable[[], nn.Module]) -> None:
    model = make()
    members = conditions.Members.of(model)
    for ours, torchs in (
        (members.modules, model.named_modules()),
        (members.parameters, model.named_parameters()),
        (members.buffers, model.named_buffers()),
    ):
        expected = dict(torchs)
        assert list(ours) == list(expected)
        assert all(ours[name] is thing for name, thing in expected.items())


def test_tensors_that_share_memory_are_found() -> None:
    whole = torch.zeros(10)
    assert conditions.overlapping([whole[:6], whole[5:]])
    assert not conditions.overlapping([whole[:5], whole[5:]])
    assert conditions.overlapping([whole, whole])
    assert not conditions.overlapping([torch.zeros(0), whole])
