"""SGD, Adam and AdamW on the CPU, with one call for all parameters where torch makes one for each.

Why: on the CPU torch updates one parameter after the other, with some ten calls from Python for each. On a small model
that takes more time than anything else in a training step.

Policy: torch's `_foreach_` functions do for each tensor of a list what the single call does, on the CPU by the same
kernel. Each parameter gets the operations of torch's single-tensor update (torch/optim/adam.py, sgd.py) in their order
and with their numbers, so the bits are the same; this is tried out on something small, once for each way of updating.
What lies in one call are parameters that a cache holds together: large ones are updated one by one, as ever, and
memory is taken for no more of them at a time. What is not plain is left to torch: the first step, which makes the
state; settings that are no plain numbers or ask for another way; parameters that have made different numbers of steps;
tensors that are not on the CPU, not dense, of other types, or share memory; and all but float32 and float64 (of
float16 `_foreach_mul_` gives other bits than `mul_`).

Cost: some ten microseconds for seeing that all is plain.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain, pairwise
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

try:
    from torch._C import _len_torch_dispatch_stack as num_dispatch_modes
    from torch._C import _len_torch_function_stack as num_function_modes
    from torch.optim.adam import adam
    from torch.optim.sgd import sgd
except ImportError:  # no public parts of torch: where they are not what they were, one does without
    _is_known = False
else:
    _is_known = True

_PORTION_BYTES = 1024 * 1024  # of parameters that are updated in one call; five times as much is read or written
_DTYPES = (torch.float32, torch.float64)
_OTHER_WAYS = ("foreach", "fused", "capturable", "differentiable", "maximize", "amsgrad")
_looks = attrgetter("__class__", "layout", "dtype")


class _Adam(NamedTuple):
    """Settings of a group of Adam or AdamW."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> _Adam:
        return cls(
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
        )

    @property
    def kept(self) -> tuple[str, ...]:
        return ("step", "exp_avg", "exp_avg_sq")

    def example(self) -> _Adam:
        """The same way of updating with other numbers."""
        return _Adam(0.01, 0.9, 0.99, 1e-6, 0.1 if self.weight_decay else 0, self.decoupled)

    def update(self, grads: list[Tensor], parameters: list[Tensor], *kept: list[Tensor]) -> None:
        steps, means, squares = kept
        torch._foreach_add_(steps, 1)
        step = steps[0].item()
        if self.weight_decay and self.decoupled:
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
        steps, means, squares = kept
        settings: dict[str, Any] = {**self._asdict(), "amsgrad": False, "maximize": False, "foreach": False}
        settings["decoupled_weight_decay"] = settings.pop("decoupled")
        adam(parameters, grads, means, squares, [], steps, **settings)


class _Sgd(NamedTuple):
    """Settings of a group of SGD."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> _Sgd:
        return cls(*(group[name] for name in cls._fields))

    @property
    def kept(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def example(self) -> _Sgd:
        """The same way of updating with other numbers."""
        dampening = 0 if self.nesterov else 0.1
        return _Sgd(0.01, 0.9 if self.momentum else 0, dampening, 0.1 if self.weight_decay else 0, self.nesterov)

    def update(self, grads: list[Tensor], parameters: list[Tensor], *kept: list[Tensor]) -> None:
        if self.weight_decay:
            grads = [*torch._foreach_add(grads, parameters, alpha=self.weight_decay)]
        if self.momentum:
            (buffers,) = kept
            torch._foreach_mul_(buffers, self.momentum)
            torch._foreach_add_(buffers, grads, alpha=1 - self.dampening)
            grads = [*torch._foreach_add(grads, buffers, alpha=self.momentum)] if self.nesterov else buffers
        torch._foreach_add_(parameters, grads, alpha=-self.lr)

    def update_by_torch(self, grads: list[Tensor], parameters: list[Tensor], *kept: list[Tensor]) -> None:
        buffers: list[Any] = [*(kept[0] if kept else [None] * len(parameters))]
        sgd(parameters, grads, buffers, **self._asdict(), maximize=False, foreach=False)


class _Known(NamedTuple):
    """Parameters and what an optimizer keeps for them, and what was found out about them."""

    tensors: list[Any]
    pointers: list[int]
    places: frozenset[int]  # where something begins
    looks: list[Any]  # of the parameters, and so of their gradients
    portions: list[slice] | None  # of the parameters; None if torch must update them


class _Work(NamedTuple):
    """What is to be done with a group."""

    settings: _Adam | _Sgd
    columns: tuple[list[Tensor], ...]  # gradients, parameters, and what is kept for each
    portions: list[slice]
    places: frozenset[int]


class MultiTensorStep:
    """The plain steps of an SGD, Adam or AdamW.

    Args:
        optimizer: One of those that `serves` is true for.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._settings_of = _Sgd.of if type(optimizer) is SGD else _Adam.of
        self._known: dict[int, _Known] = {}

    @staticmethod
    def serves(optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer is of exactly these types: a subclass may do something else."""
        return _is_known and type(optimizer) in (SGD, Adam, AdamW)

    def __call__(self) -> bool:
        """Do what `optimizer.step()` does; False if nothing was done because torch has to do it."""
        if num_function_modes() or num_dispatch_modes():
            return False
        works = []
        for number, group in enumerate(self._optimizer.param_groups):
            work = self._work(number, group)
            if work is None:
                return False
            works.append(work)
        places = [*chain.from_iterable(places for *_, places in works)] if len(works) > 1 else []
        if len({*places}) < len(places):
            return False
        grad_mode = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(False)
            for settings, columns, portions, _ in works:
                for portion in portions:
                    settings.update(*(column[portion] for column in columns))
        finally:
            torch.set_grad_enabled(grad_mode)
        return True

    def _work(self, number: int, group: Mapping[str, Any]) -> _Work | None:
        """What is to be done with a group; None if it is not plain."""
        if any(map(group.get, _OTHER_WAYS)):
            return None
        settings = self._settings_of(group)
        if not {*map(type, settings[:-1])} <= {float, int}:
            return None
        parameters, grads = [], []
        for parameter in group["params"]:
            if (grad := parameter.grad) is not None:
                parameters.append(parameter)
                grads.append(grad)
        state = self._optimizer.state
        names = settings.kept
        try:
            states = [state.get(parameter, {}) for parameter in parameters] if names else []
            columns = (parameters, *([each[name] for each in states] for name in names))
        except KeyError:
            return None
        known = self._look(number, names, columns)
        if known.portions is None or [*map(_looks, grads)] != known.looks:
            return None
        if not known.places.isdisjoint([grad.data_ptr() for grad in grads]):
            return None
        if isinstance(settings, _Adam) and len({step.item() for step in columns[1]}) > 1:
            return None
        if not _has_torchs_bits(settings.example()):
            return None
        return _Work(settings, (grads, *columns), known.portions, known.places)

    def _look(self, number: int, names: tuple[str, ...], columns: tuple[list[Any], ...]) -> _Known:
        """What is known of the tensors of a group, found out if they are others than in its last step."""
        tensors = [*chain.from_iterable(columns)]
        known = self._known.get(number)
        if (
            known is None
            or len(known.tensors) != len(tensors)
            or not all(map(is_, tensors, known.tensors))
            or (known.portions is not None and [*map(Tensor.data_ptr, tensors)] != known.pointers)
        ):
            known = self._known[number] = _find_out(tensors, names, columns)
        return known


def _find_out(tensors: list[Any], names: tuple[str, ...], columns: tuple[list[Any], ...]) -> _Known:
    parameters, *kept = columns
    if not _are_plain(parameters, dict(zip(names, kept, strict=True))) or _share_memory(tensors):
        return _Known(tensors, [], frozenset(), [], None)
    pointers = [tensor.data_ptr() for tensor in tensors]
    looks = [(Tensor, *_looks(parameter)[1:]) for parameter in parameters]
    return _Known(tensors, pointers, frozenset(pointers) - {0}, looks, [*_portions(parameters)])


def _are_plain(parameters: list[Any], kept: Mapping[str, list[Any]]) -> bool:
    """Whether they are dense tensors on the CPU, and what is kept for each is as it is, or the number of its steps."""
    if not all(type(each) in (nn.Parameter, Tensor) and each.dtype in _DTYPES for each in parameters):
        return False
    if not all(each.is_cpu and each.layout is torch.strided and not each.is_inference() for each in parameters):
        return False
    for name, values in kept.items():
        for parameter, value in zip(parameters, values, strict=True):
            if type(value) is not Tensor or not value.is_cpu or value.layout is not torch.strided:
                return False
            if name != "step" and (value.dtype != parameter.dtype or value.shape != parameter.shape):
                return False
    return True


def _share_memory(tensors: list[Tensor]) -> bool:
    """Whether two of some tensors do: what is written into one in between would be seen in the other."""
    extents = []
    for tensor in tensors:
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            extents.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    return any(end > begin for (_, end), (begin, _) in pairwise(sorted(extents)))


def _portions(parameters: list[Tensor]) -> Iterator[slice]:
    """Runs of parameters that a cache holds; one that is too large for it is one of its own."""
    begin = num_bytes = 0
    for number, parameter in enumerate(parameters):
        if number > begin and num_bytes + parameter.nbytes > _PORTION_BYTES:
            yield slice(begin, number)
            begin, num_bytes = number, 0
        num_bytes += parameter.nbytes
    if parameters:
        yield slice(begin, len(parameters))


@lru_cache(maxsize=100)
def _has_torchs_bits(settings: _Adam | _Sgd) -> bool:
    """Whether steps of some small parameters give the bits of torch's single-tensor update."""
    sizes = (1, 7, 64, 99)

    def columns() -> list[list[Tensor]]:
        made = [[torch.linspace(-1, 1, size, device="cpu", dtype=torch.float32) for size in sizes]]
        for name in settings.kept:
            shapes = [() if name == "step" else (size,) for size in sizes]
            made.append([torch.zeros(shape, device="cpu", dtype=torch.float32) for shape in shapes])
        return made

    mine, torchs = columns(), columns()
    with torch.no_grad():
        try:
            for number in range(3):
                grads = [parameter.sin() - number for parameter in mine[0]]
                settings.update(grads, *mine)
                settings.update_by_torch([grad.clone() for grad in grads], *torchs)
        except Exception:  # noqa: BLE001 - whatever it is, it is slower without
            return False
    return all(map(torch.equal, chain.from_iterable(mine), chain.from_iterable(torchs)))
