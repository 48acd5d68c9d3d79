"""The traceable updates against torch's own optimizers, option by option."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resumable_trainer.trainer import updates

SGD, ADAM, ADAMW = updates.OPTIMIZERS
CASES: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    *((kind, {"lr": 0.01}) for kind in (ADAM, ADAMW)),
    *((kind, {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-4}) for kind in (ADAM, ADAMW)),
    *((kind, {"lr": 0.01, "weight_decay": 0.3}) for kind in (ADAM, ADAMW)),
    *((kind, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}) for kind in (ADAM, ADAMW)),
    *((kind, {"lr": 0.01, "maximize": True}) for kind in (ADAM, ADAMW)),
    *((kind, {"lr": 0.01, "fused": True}) for kind in (ADAM, ADAMW)),
    *((kind, {"lr": 0.01, "foreach": True}) for kind in (ADAM, ADAMW)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_an_update_is_that_of_torch(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start, ours = torch.randn(5, 3, generator=generator, dtype=dtype), torch.empty(5, 3, dtype=dtype)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = kind([parameter], **options)
    group = optimizer.param_groups[0]
    state: dict[str, torch.Tensor] = {}
    for step in range(6):
        grad = torch.randn(5, 3, generator=generator, dtype=dtype)
        before = parameter.detach().clone()
        parameter.grad = grad.clone()
        optimizer.step()
        live = dict(optimizer.state[parameter])
        if step == 0:  # torch makes the state
            assert set(live) >= set(updates.state_names(optimizer, group))
            for name in updates.state_names(optimizer, group):
                blank = updates.blank(group, parameter, name)
                assert (blank.shape, blank.dtype) == (live[name].shape, live[name].dtype)
        else:
            ours.copy_(before)
            lr = torch.tensor(group["lr"], dtype=torch.float64)
            updates.update(optimizer, group, parameter=ours, grad=grad, state=state, lr=lr)
            torch.testing.assert_close(ours, parameter.detach(), rtol=1e-5, atol=1e-7)
            for name, tensor in state.items():
                torch.testing.assert_close(tensor, live[name], rtol=1e-5, atol=1e-7)
        state = {name: live[name].clone() for name in updates.state_names(optimizer, group)}


def test_settings_are_all_that_decides_on_numbers_but_the_learning_rate() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    settings = updates.settings_of(optimizer.param_groups[0])
    assert settings["momentum"] == 0.9
    assert not settings.keys() & {"lr", "initial_lr", "params"}


@pytest.mark.parametrize("largest", [0.1, 100.0])
def test_clipping_is_that_of_torch(largest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator) for shape in ((3, 2), (4,))]
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(parameters, largest)
    for parameter, clipped in zip(parameters, updates.clip_by_norm(grads, largest), strict=True):
        torch.testing.assert_close(clipped, parameter.grad)
