"""One walk through a module, for all that a snapshot takes from it.

Each walk of torch's own is a call or more for each module, and a snapshot needs five of them: on a small model they
cost more than its bytes. Nothing is remembered from one walk to the next, so nothing that was replaced, added, frozen
or hooked meanwhile can be missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

_TENSORS = {torch.Tensor, nn.Parameter}
_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")


@dataclass(slots=True)
class Walked:
    """What a module holds at this moment.

    Attributes:
        module: The module.
        modules: It and those in it, each once.
        names: Of the parameters, in torch's order; one that several modules hold has several.
        parameters: For each name.
        gradients: Of each parameter.
        trained: Whether each is.
        tensors: Its `state_dict()` with the parameters themselves in it; None where a module in it makes its state in
            a way of its own, which may tell the two apart.
    """

    module: nn.Module
    modules: list[nn.Module]
    names: list[str]
    parameters: list[nn.Parameter]
    gradients: list[torch.Tensor | None]
    trained: list[bool]
    tensors: dict[str, Any] | None


def walk(module: nn.Module) -> Walked:
    """Walk through a module.

    The plain tensors that `state_dict()` makes of parameters cost more than anything else that is done about a small
    one: whoever copies them at once needs none.
    """
    modules: list[nn.Module] = []
    names: list[str] = []
    parameters: list[nn.Parameter] = []
    tensors: dict[str, Any] = {}
    seen: set[int] = set()
    saves_plainly, is_tree = True, True
    to_come = [("", module)]
    while to_come:
        prefix, each = to_come.pop()
        if id(each) in seen:
            is_tree = False
            continue
        seen.add(id(each))
        modules.append(each)
        if each._state_dict_hooks or each._state_dict_pre_hooks or not vars(each).keys().isdisjoint(_METHODS):
            saves_plainly = False
        if each._parameters:
            found = _without_none(each._parameters)
            if prefix:
                found = dict(zip(map(prefix.__add__, found), found.values(), strict=True))
            names += found
            parameters += found.values()
            tensors.update(found)
        if each._buffers:
            passing = each._non_persistent_buffers_set
            tensors |= {prefix + n: b for n, b in _without_none(each._buffers).items() if n not in passing}
        if each._modules:
            to_come += [(f"{prefix}{n}.", m) for n, m in reversed(each._modules.items()) if m is not None]
    gradients: list[torch.Tensor | None] = []
    trained: list[bool] = []
    for parameter in parameters:  # both at once: one of ten thousand has left the caches when the last was asked
        gradients.append(parameter.grad)
        trained.append(parameter.requires_grad)
    saves_plainly = saves_plainly and all(map(_saves_as_torch_does, {*map(type, modules)}))
    if saves_plainly and not is_tree:  # what is in two places has two names
        tensors = dict(module.state_dict(keep_vars=True))
    is_plain = saves_plainly and {*map(type, tensors.values())} <= _TENSORS
    return Walked(module, modules, names, parameters, gradients, trained, tensors if is_plain else None)


def walk_all(state: Mapping[str, object]) -> dict[str, Walked]:
    """Walk through each module among the parts."""
    return {name: walk(part) for name, part in state.items() if isinstance(part, nn.Module)}


def _without_none(named: Mapping[str, Any]) -> Mapping[str, Any]:
    if type(named) is dict and NoneType not in {*map(type, named.values())}:
        return named
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _saves_as_torch_does(kind: type[nn.Module]) -> bool:
    return (
        kind.state_dict is nn.Module.state_dict
        and kind._save_to_state_dict is nn.Module._save_to_state_dict
        and kind.get_extra_state is nn.Module.get_extra_state
    )
