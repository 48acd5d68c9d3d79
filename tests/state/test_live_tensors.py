"""A module's state with its parameters in it is given only where it is what `state_dict` gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from resumable_trainer.state.parts import live_tensors


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
    live, expected = live_tensors(module), module.state_dict()
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
    assert live_tensors(module) is None
