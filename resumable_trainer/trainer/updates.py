"""The updates of SGD, Adam and AdamW as traceable functions of tensors.

Each is torch's own single-tensor update (torch/optim/sgd.py, adam.py) with two differences: the
learning rate is a 0-dim float64 tensor, which a scheduler may change without another compilation,
and Adam's bias corrections are computed in float64 from the `step` tensor that the optimizer
keeps, as Python computes them there. The state is the optimizer's own, under its own names, changed
in place: what `optimizer.state_dict()` gives after a compiled step is what an eager optimizer holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Exactly these types: a subclass may do something else."""


def state_names(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> tuple[str, ...]:
    """What the optimizer keeps for each parameter of a group that has stepped, in torch's names."""
    if type(optimizer) is torch.optim.SGD:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()
    moments = ("step", "exp_avg", "exp_avg_sq")
    return (*moments, "max_exp_avg_sq") if group["amsgrad"] else moments


def blank(group: Mapping[str, Any], parameter: Tensor, name: str) -> Tensor:
    """A tensor of the shape, dtype and device that an entry of the state will have; for tracing before it is there."""
    if name != "step":
        return torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
    fused = bool(group.get("fused"))
    on_device = fused or bool(group.get("capturable"))
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 and not fused else torch.float32
    return torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a group that are constants of the compiled step: all but parameters and learning rate."""
    notes = ("params", "lr", "initial_lr", "max_lr", "min_lr", "param_names")
    return {name: value for name, value in group.items() if name not in notes}


def update(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    *,
    parameter: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    lr: Tensor,
) -> None:
    """One parameter's step, in place; traced, without gradients recorded.

    Args:
        optimizer: Only its type counts.
        group: Its settings.
        parameter: Changed in place.
        grad: Of the parameter's shape.
        state: Tensors by name as `state_names` lists them; changed in place.
        lr: 0-dim float64.
    """
    grad = -grad if group["maximize"] else grad
    if type(optimizer) is torch.optim.SGD:
        _sgd(group, parameter, grad, state, lr)
    else:
        _adam(group, parameter, grad, state, lr)


def _sgd(group: Mapping[str, Any], parameter: Tensor, grad: Tensor, state: Mapping[str, Tensor], lr: Tensor) -> None:
    momentum = group["momentum"]
    if group["weight_decay"] != 0:
        grad = grad.add(parameter, alpha=group["weight_decay"])
    if momentum != 0:
        buffer = state["momentum_buffer"]
        buffer.mul_(momentum).add_(grad, alpha=1 - group["dampening"])
        grad = grad.add(buffer, alpha=momentum) if group["nesterov"] else buffer
    parameter.sub_(lr * grad)


def _adam(group: Mapping[str, Any], parameter: Tensor, grad: Tensor, state: Mapping[str, Tensor], lr: Tensor) -> None:
    beta1, beta2 = group["betas"]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    step = state["step"].add_(1).to(torch.float64)
    if group["weight_decay"] != 0:
        if group.get("decoupled_weight_decay"):
            parameter.mul_(1 - lr * group["weight_decay"])
        else:
            grad = grad.add(parameter, alpha=group["weight_decay"])
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if group["amsgrad"]:
        square = torch.maximum(state["max_exp_avg_sq"], square)
        state["max_exp_avg_sq"].copy_(square)
    step_size = lr / (1 - beta1**step)
    denominator = square.sqrt() / (1 - beta2**step).sqrt() + group["eps"]
    parameter.sub_(step_size * (mean / denominator))


def clip_by_norm(grads: list[Tensor], largest: float) -> list[Tensor]:
    """What `torch.nn.utils.clip_grad_norm_` makes of the gradients, as new tensors."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
    factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
    return [grad * factor for grad in grads]
