"""A module's state with its parameters in it is given only where it is what `state_dict` gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from resumable_trainer.state import modes
from resumable_trainer.state.walk import walk


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))


class OwnStateDict(Doubling):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"w": self.w.detach() * 2}


class OwnSaving(Doubling):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}w"] = self.w.detach() * 2


class OwnExtra(Doubling):
    def get_extra_state(self) -> Any:
        return nn.Parameter(torch.ones(1))


class Special(nn.Parameter):
    pass


def hooked(kind: str) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    if kind == "hook":
        module[0]._register_state_dict_hook(lambda module, state, prefix, meta: None)
    elif kind == "pre-hook":
        module[0].register_state_dict_pre_hook(lambda module, prefix, keep_vars: None)
    else:
        module.register_state_dict_post_hook(lambda module, state, prefix, meta: None)
    return module


def with_special() -> nn.Module:
    module = nn.Linear(2, 2)
    module.weight = Special(torch.ones(2, 2))
    return module


def with_method() -> nn.Module:
    module = nn.Linear(2, 2)
    module.state_dict = lambda *args, **kwargs: {}  # type: ignore[method-assign]
    return nn.Sequential(module)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Conv2d(1, 1, 1))),
        nn.ParameterList([torch.ones(2), torch.ones(3)]),
        nn.MultiheadAttention(4, 2),
    ],
)
def test_it_holds_the_names_the_bytes_and_the_memory_of_the_state_dict(module: nn.Module) -> None:
    live, expected = walk(module).tensors, module.state_dict()
    assert live is not None
    assert list(live) == list(expected)
    assert all(live[name].data_ptr() == tensor.data_ptr() for name, tensor in expected.items())


@pytest.mark.parametrize(
    "module",
    [
        OwnStateDict(),
        nn.Sequential(nn.Sequential(OwnSaving())),
        OwnExtra(),
        hooked("hook"),
        hooked("pre-hook"),
        hooked("post-hook"),
        with_special(),
        with_method(),
        nn.LazyLinear(3),
    ],
)
def test_a_module_that_saves_in_a_way_of_its_own_is_left_to_it(module: nn.Module) -> None:
    assert walk(module).tensors is None


class Several(nn.Module):
    """Shares a module and a parameter, has an absent one, a buffer that passes, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Sequential(nn.ReLU(), self.first)
        self.third = nn.Linear(2, 2, bias=False)
        self.third.weight = self.first.weight
        self.fourth = nn.BatchNorm1d(2)
        self.fourth.weight.requires_grad_(False)
        self.register_buffer("passing", torch.ones(1), persistent=False)
        self.register_parameter("absent", None)


def test_one_walk_finds_what_torch_finds_in_many() -> None:
    module = Several()
    for _ in range(2):
        walked = walk(module)
        assert walked.modules == [*module.modules()]
        assert walked.tensors is not None
        assert list(walked.tensors) == list(module.state_dict())
        every = dict(zip(walked.names, walked.parameters, strict=True))
        assert {n: id(p) for n, p in every.items()}.items() >= {n: id(p) for n, p in module.named_parameters()}.items()
        assert walked.trained == [p.requires_grad for p in walked.parameters]
        assert walked.gradients == [None] * len(walked.parameters)
        module.fifth = nn.Linear(1, 1)  # nothing is remembered
        module._modules.pop("second", None)


def test_gradients_are_named_once_and_frozen_parameters_too() -> None:
    module = Several()
    module.first.weight.grad = torch.ones(2, 2)
    module.first.bias.grad = torch.ones(2)
    walked = {"a": walk(module), "b": walk(nn.Sequential(module.first))}
    found = modes.capture_gradients(walked, used={id(module.first.bias)})
    assert {name: list(named) for name, named in found["pending"].items()} == {"a": ["first.weight"]}
    assert found["spent"] == {"a": ["first.bias"]}
    assert modes.capture_modes(walked)["a"]["frozen"] == ["fourth.weight"]
    module.first.weight.requires_grad_(False)
    assert modes.capture_modes({"a": walk(module)})["a"]["frozen"] == ["first.weight", "fourth.weight"]
