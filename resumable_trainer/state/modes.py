"""What a module holds beside its `state_dict`: modes and gradients under accumulation.

*Modes* are `training` flags and `requires_grad`: code that froze a layer in epoch 3, or forgot
`model.train()` after an evaluation, must find the same after a resume as if never killed.

*Gradients* matter between a backward and the optimizer step that uses them. They are saved only
then: a parameter whose optimizer stepped in the batch just finished has had its gradient used, and
only *that* it had one is kept (as zeros, which is what the next `zero_grad` leaves anyway).
"""

from __future__ import annotations

from itertools import chain
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from resumable_trainer.state.walk import walk, walk_all

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from resumable_trainer.state.walk import Walked

_MOST_WRAPPERS = 8  # around one another


def heard(state: Mapping[str, object]) -> list[Optimizer]:
    """The optimizers among some parts that tell of their steps; one that merely wraps another stands for that.

    Accelerate's has hooks of its own only in name: it is an `Optimizer` that was never initialised as one.
    """
    found = []
    for part in state.values():
        for _ in range(_MOST_WRAPPERS):
            if not isinstance(part, Optimizer) or hasattr(part, "_optimizer_step_post_hooks"):
                break
            part = getattr(part, "optimizer", None)
        if isinstance(part, Optimizer) and hasattr(part, "_optimizer_step_post_hooks"):
            found.append(part)
    return found


class StepWatch:
    """Knows which optimizers have stepped since the batch under way began.

    Cost: one method call per optimizer step.

    Attributes:
        stepped: `id` of each; whoever begins a batch clears it.
    """

    def __init__(self, state: Mapping[str, object]) -> None:
        self.stepped: set[int] = set()
        self._optimizers = heard(state)
        self._handles = [o.register_step_post_hook(self._note) for o in self._optimizers]

    def _note(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self.stepped.add(id(optimizer))

    def resume(self, spent: set[int]) -> None:
        """As it was when gradients were captured: who has such a parameter had stepped."""
        self.stepped.clear()
        if spent:
            self.stepped.update(id(o) for o in self._optimizers if not spent.isdisjoint(_ids(o)))

    def used_gradients(self) -> set[int]:
        """`id` of every parameter whose optimizer has stepped since the batch began."""
        stepped = [optimizer for optimizer in self._optimizers if id(optimizer) in self.stepped]
        return {parameter for optimizer in stepped for parameter in _ids(optimizer)}

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def capture_modes(walked: Mapping[str, Walked]) -> dict[str, Any]:
    """Training flags and frozen parameters of all modules, as short lists of exceptions."""
    return {
        name: {
            "training": part.module.training,
            "otherwise": _otherwise(part),
            "frozen": frozen_parameters(part),
        }
        for name, part in walked.items()
    }


def _otherwise(part: Walked) -> list[str]:
    """Names of the modules in it whose training flag is not its own."""
    training = part.module.training
    if {inner.training for inner in part.modules} == {training}:
        return []
    return [name for name, inner in part.module.named_modules() if inner.training != training]


def frozen_parameters(part: Walked) -> list[str]:
    """Names of the parameters that are not trained."""
    if all(part.trained):
        return []
    return [name for name, parameter in _each_once(part, set()) if not parameter.requires_grad]


def restore_modes(state: Mapping[str, object], saved: Mapping[str, Any]) -> None:
    """The way back of `capture_modes`."""
    for name, part in state.items():
        if isinstance(part, nn.Module) and name in saved:
            modes = saved[name]
            otherwise, frozen = set(modes["otherwise"]), set(modes["frozen"])
            for module_name, module in part.named_modules():
                module.training = modes["training"] != (module_name in otherwise)
            if frozen == {*frozen_parameters(walk(part))}:
                continue
            for parameter_name, parameter in part.named_parameters():
                parameter.requires_grad_(parameter_name not in frozen)


def capture_gradients(walked: Mapping[str, Walked], *, used: Collection[int]) -> dict[str, Any]:
    """Gradients still to be used (live tensors), and the names of those that were used."""
    pending: dict[str, dict[str, torch.Tensor]] = {}
    spent: dict[str, list[str]] = {}
    if all({*map(type, part.gradients)} <= {NoneType} for part in walked.values()):
        return {"pending": pending, "spent": spent}
    for name, parameter_name, parameter in _parameters(walked):
        if parameter.grad is not None:
            if id(parameter) in used:
                spent.setdefault(name, []).append(parameter_name)
            else:
                pending.setdefault(name, {})[parameter_name] = parameter.grad
    return {"pending": pending, "spent": spent}


def restore_gradients(state: Mapping[str, object], saved: Mapping[str, Any]) -> set[int]:
    """The way back of `capture_gradients`; every other gradient is None, as it was.

    Returns:
        `id` of each parameter whose gradient had been used.
    """
    used: set[int] = set()
    spent = {name: set(names) for name, names in saved["spent"].items()}
    walked = walk_all(state)
    if not spent and not saved["pending"]:
        for parameter in chain.from_iterable(part.parameters for part in walked.values()):
            parameter.grad = None
        return used
    for name, parameter_name, parameter in _parameters(walked):
        pending = saved["pending"].get(name, {}).get(parameter_name)
        if pending is not None:
            parameter.grad = pending.to(parameter.device)
        elif parameter_name in spent.get(name, ()):
            parameter.grad = torch.zeros_like(parameter)
            used.add(id(parameter))
        else:
            parameter.grad = None
    return used


def _each_once(part: Walked, seen: set[int]) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter under the first name that leads to it, if it was not seen before."""
    for name, parameter in zip(part.names, part.parameters, strict=True):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _parameters(walked: Mapping[str, Walked]) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Each parameter of all modules once, under the first name that leads to it."""
    seen: set[int] = set()
    for name, part in walked.items():
        for parameter_name, parameter in _each_once(part, seen):
            yield name, parameter_name, parameter
