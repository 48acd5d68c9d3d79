"""How SGD, Adam and AdamW update many parameters with one call for each operation; see `multi_tensor`.

Each is torch's single-tensor update (torch/optim/sgd.py, adam.py), operation for operation.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import SGD, Adam, AdamW

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

try:
    from torch.optim import adam as adams
    from torch.optim import sgd as sgds

    def _pieces() -> list[Any]:
        of_adam = (Adam._init_group, AdamW._init_group, adams.adam, adams._single_tensor_adam)
        return [*of_adam, SGD._init_group, sgds.sgd, sgds._single_tensor_sgd]

    _TORCHS = _pieces()
except (ImportError, AttributeError):  # no public parts of torch: where they are not what they were, one does without
    is_known = False
else:
    is_known = True


def are_torchs() -> bool:
    """Whether torch's steps are made of what they were; its compiler, once loaded, has wrapped some of it."""
    pieces = _pieces()
    return pieces == _TORCHS or [getattr(piece, "_torchdynamo_orig_callable", piece) for piece in pieces] == _TORCHS


OTHER_WAYS = ("foreach", "fused", "capturable", "differentiable", "maximize", "amsgrad")
"""Settings of a group with which torch updates in yet another way."""


class AdamSettings(NamedTuple):
    """Settings of a group of Adam or AdamW."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool

    @staticmethod
    def names() -> tuple[str, ...]:
        """All settings that a group has."""
        return ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", *OTHER_WAYS)

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> AdamSettings:
        """Those of one of the optimizer's `param_groups`."""
        beta1, beta2 = group["betas"]
        return cls(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["decoupled_weight_decay"])

    @property
    def kept(self) -> tuple[str, ...]:
        """What the optimizer's state has for each parameter, in torch's names."""
        return ("step", "exp_avg", "exp_avg_sq")

    @property
    def fewest(self) -> int:
        """Parameters from which on one call for all takes less time than it takes to see that all is plain."""
        return 3

    def are_plain(self) -> bool:
        """Whether they are numbers of Python with which torch computes, too, and no error comes of them."""
        return _are_numbers_and_a_flag(self) and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1

    def example(self) -> AdamSettings:
        """The same way of updating with other numbers."""
        return AdamSettings(0.01, 0.9, 0.99, 1e-6, 0.1 if self.weight_decay else 0, self.decoupled_weight_decay)

    def update(self, grads: list[Tensor], parameters: list[Tensor], *kept: list[Tensor]) -> None:
        """One step, in place; lists of one tensor for each parameter, `kept` in its order."""
        steps, means, squares = kept
        torch._foreach_add_(steps, 1)
        step = steps[0].item()
        if self.weight_decay and self.decoupled_weight_decay:
            torch._foreach_mul_(parameters, 1 - self.lr * self.weight_decay)
        elif self.weight_decay:
            grads = [*torch._foreach_add(grads, parameters, alpha=self.weight_decay)]
        torch._foreach_lerp_(means, grads, 1 - self.beta1)
        torch._foreach_mul_(squares, self.beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - self.beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, (1 - self.beta2**step) ** 0.5)
        torch._foreach_add_(denominators, self.eps)
        torch._foreach_addcdiv_(parameters, means, denominators, -(self.lr / (1 - self.beta1**step)))

    def update_by_torch(self, grads: list[Tensor], parameters: list[Tensor], *kept: list[Tensor]) -> None:
        """The same as torch does it, one parameter after the other."""
        steps, means, squares = kept
        settings: dict[str, Any] = {**self._asdict(), "amsgrad": False, "maximize": False, "foreach": False}
        adams.adam(parameters, grads, means, squares, [], steps, **settings)


class SgdSettings(NamedTuple):
    """Settings of a group of SGD."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All settings that a group has."""
        return (*cls._fields, "foreach", "fused", "differentiable", "maximize")

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> SgdSettings:
        """Those of one of the optimizer's `param_groups`."""
        return cls(*(group[name] for name in cls._fields))

    @property
    def kept(self) -> tuple[str, ...]:
        """What the optimizer's state has for each parameter, in torch's names."""
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def fewest(self) -> int:
        """As for Adam; less is done for each parameter here."""
        return 8 if self.momentum else 16

    def are_plain(self) -> bool:
        """Whether they are numbers of Python with which torch computes, too."""
        return _are_numbers_and_a_flag(self)

    def example(self) -> SgdSettings:
        """The same way of updating with other numbers."""
        dampening = 0 if self.nesterov else 0.1
        return SgdSettings(0.01, 0.9 if self.momentum else 0, dampening, 0.1 if self.weight_decay else 0, self.nesterov)

    def update(self, grads: list[Tensor], parameters: list[Tensor], *kept: list[Tensor]) -> None:
        """One step, in place; lists of one tensor for each parameter, `kept` in its order."""
        if self.weight_decay:
            grads = [*torch._foreach_add(grads, parameters, alpha=self.weight_decay)]
        if self.momentum:
            (buffers,) = kept
            torch._foreach_mul_(buffers, self.momentum)
            torch._foreach_add_(buffers, grads, alpha=1 - self.dampening)
            grads = [*torch._foreach_add(grads, buffers, alpha=self.momentum)] if self.nesterov else buffers
        torch._foreach_add_(parameters, grads, alpha=-self.lr)

    def update_by_torch(self, grads: list[Tensor], parameters: list[Tensor], *kept: list[Tensor]) -> None:
        """The same as torch does it, one parameter after the other."""
        buffers: list[Any] = [*(kept[0] if kept else [None] * len(parameters))]
        sgds.sgd(parameters, grads, buffers, **self._asdict(), maximize=False, foreach=False)


Settings = AdamSettings | SgdSettings


def _are_numbers_and_a_flag(settings: tuple[Any, ...]) -> bool:
    """Whether all but the last are numbers of Python, with which torch computes, too."""
    return {*map(type, settings[:-1])} <= {float, int} and type(settings[-1]) is bool


@lru_cache(maxsize=100)
def has_torchs_bits(settings: Settings) -> bool:
    """Whether steps of some small parameters give the bits of torch's single-tensor update."""
    sizes = (1, 7, 64, 99)

    def columns() -> list[list[Tensor]]:
        made = [[torch.linspace(-1, 1, size, device="cpu", dtype=torch.float32) for size in sizes]]
        for name in settings.kept:
            shapes = [() if name == "step" else (size,) for size in sizes]
            made.append([torch.zeros(shape, device="cpu", dtype=torch.float32) for shape in shapes])
        return made

    mine, torchs = columns(), columns()
    try:
        for number in range(3):
            grads = [parameter.sin() - number for parameter in mine[0]]
            settings.update(grads, *mine)
            settings.update_by_torch([grad.clone() for grad in grads], *torchs)
    except Exception:  # noqa: BLE001 - whatever it is, it is slower without
        return False
    return all(map(torch.equal, chain.from_iterable(mine), chain.from_iterable(torchs)))
