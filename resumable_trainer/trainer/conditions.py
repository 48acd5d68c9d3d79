"""Which steps can be compiled exactly, and why others cannot: each reason is one line for a person."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from resumable_trainer.loop.lean import has_step_of_its_own
from resumable_trainer.state.modes import StepWatch
from resumable_trainer.trainer import artefacts, updates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from resumable_trainer.trainer.tracing import Recipe

_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@dataclass(frozen=True)
class Members:
    """What a module consists of, by name; each thing once, under the first name that leads to it."""

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, root: nn.Module) -> Self:
        """In one walk; `named_parameters()` and its like take one each."""
        modules = dict(root.named_modules())
        parameters: dict[int, tuple[str, nn.Parameter]] = {}
        buffers: dict[int, tuple[str, Tensor]] = {}
        for prefix, module in modules.items():
            start = f"{prefix}." if prefix else ""
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    parameters.setdefault(id(parameter), (start + name, parameter))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    buffers.setdefault(id(buffer), (start + name, buffer))
        return cls(modules, dict(parameters.values()), dict(buffers.values()))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return {**self.parameters, **self.buffers}


def why_not(recipe: Recipe, members: Members, *, accumulate: int) -> str | None:
    """Why no step of this kind can be compiled; None if it may be."""
    checks: tuple[Callable[[], Iterator[str]], ...] = (
        lambda: _of_settings(accumulate),
        lambda: _of_optimizer(recipe.optimizer),
        lambda: _of_hooks(members),
        lambda: _of_tensors(members.tensors),
        lambda: _of_ownership(recipe, members),
    )
    return next((reason for check in checks for reason in check()), None)


def _of_settings(accumulate: int) -> Iterator[str]:
    if accumulate != 1:
        yield f"accumulate is {accumulate}: a compiled step is one batch"
    if torch.is_anomaly_enabled():
        yield "autograd's anomaly detection is on"


def _of_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[str]:
    kind = type(optimizer)
    if kind not in updates.OPTIMIZERS:
        names = ", ".join(known.__name__ for known in updates.OPTIMIZERS)
        yield f"the optimizer is {kind.__name__}: compiled steps know {names}"
        return
    if has_step_of_its_own(optimizer):
        yield "the optimizer's step is the script's own"
    post_hooks = [hook for hook in optimizer._optimizer_step_post_hooks.values() if not _is_ours(hook)]
    if post_hooks or optimizer._optimizer_step_pre_hooks or _has_global_optimizer_hooks():
        yield "the optimizer has hooks"
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            yield "the optimizer is differentiable"
        settings = [group["lr"], *updates.settings_of(group).values(), *group.get("betas", ())]
        if any(isinstance(value, torch.Tensor) for value in settings):
            yield "a setting of the optimizer is a tensor"


def _is_ours(hook: object) -> bool:
    return isinstance(getattr(hook, "__self__", None), StepWatch)


def _has_global_optimizer_hooks() -> bool:
    from torch.optim import optimizer

    return bool(optimizer._global_optimizer_pre_hooks or optimizer._global_optimizer_post_hooks)


def _of_hooks(members: Members) -> Iterator[str]:
    for name, module in members.modules.items():
        if any(getattr(module, kind, None) for kind in _MODULE_HOOKS):
            yield f"{name} ({type(module).__name__}) has hooks"
    for name, parameter in members.parameters.items():
        if any(getattr(parameter, kind, None) for kind in _PARAMETER_HOOKS):
            yield f"{name} has hooks"
    from torch.nn.modules import module as modules

    if any(getattr(modules, f"_global{kind}", None) for kind in _MODULE_HOOKS):
        yield "there are hooks on all modules"


def _of_tensors(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            continue  # the first step, an eager one, gives it a shape
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            yield f"{name} is a {type(tensor).__name__}"
        elif tensor.layout != torch.strided or tensor.is_complex():
            yield f"{name} is sparse or complex"
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) != 1:
        yield f"the model is on {len(devices)} devices"
    elif (device := devices.pop()).type not in ("cpu", "cuda"):
        yield f"the model is on {device}: compiled steps know cpu and cuda"
    elif device.type == "cpu" and artefacts.cxx() is None:
        yield "there is no C++ compiler (g++, or what CXX names)"


def _of_ownership(recipe: Recipe, members: Members) -> Iterator[str]:
    named = {id(parameter): name for name, parameter in members.parameters.items()}
    updated = {id(parameter) for group in recipe.optimizer.param_groups for parameter in group["params"]}
    if updated - named.keys():
        yield "the optimizer has parameters that are not the model's or the loss's"
    if recipe.clip is not None:
        for name, parameter in members.parameters.items():
            if parameter.requires_grad and id(parameter) not in updated and name.startswith("model."):
                yield f"clip_grad_norm counts the gradient of {name}, which is not the optimizer's"


def overlapping(tensors: Sequence[Tensor]) -> bool:
    """Whether two of the tensors share memory: compiled code takes them for separate."""
    spans = sorted(_span(tensor) for tensor in tensors if tensor.numel())
    return any(a[0] == b[0] and a[2] > b[1] for a, b in pairwise(spans))


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """Device, first byte, and first byte behind it."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return tensor.device.type, begin, begin + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.device.type, begin, begin + (last + 1) * tensor.element_size()
