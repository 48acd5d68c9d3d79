"""SGD, Adam and AdamW on the CPU, with one call for all parameters where torch makes one for each.

Why: on the CPU torch updates one parameter after the other, with some ten calls from Python for each. On a small model
that takes more time than anything else in a training step.

Policy: torch's `_foreach_` functions do for each tensor of a list what the single call does, on the CPU by the same
kernel. Each parameter gets the operations of torch's single-tensor update (torch/optim/adam.py, sgd.py) in their order
and with their numbers, so the bits are the same; this is tried out on something small, once for each way of updating.
What lies in one call are parameters that a cache holds together: large ones are updated one by one, as ever, and
memory is taken for no more of them at a time. Whatever is not plain is left to torch before anything is changed, as is
the first step, which makes the state; what is plain is said where it is asked.

Cost: at each step a few calls for all tensors of a group, to see that all is plain; groups too small to gain by it go
torch's way. No tensor is kept from one step to the next.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import chain, pairwise, repeat
from operator import add, is_, itemgetter
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from resumable_trainer.loop import update_rules
from resumable_trainer.loop.update_rules import OTHER_WAYS, AdamSettings, Settings, SgdSettings, has_torchs_bits
from resumable_trainer.snapshot.likeness import guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

try:
    from torch._C import _len_torch_dispatch_stack as num_dispatch_modes
    from torch._C import _len_torch_function_stack as num_function_modes
    from torch._C import _set_grad_enabled as set_grad_enabled
    from torch._C._functorch import peek_interpreter_stack as innermost_transform
except ImportError:  # no public parts of torch: where they are not what they were, one does without
    _is_known = False
else:
    _is_known = update_rules.is_known

_PORTION_BYTES = 1024 * 1024  # of parameters that are updated in one call; five times as much is read or written
_DTYPES = (torch.float32, torch.float64)  # of float16 `_foreach_mul_` gives other bits than `mul_`


_UNCHANGING = {float, int, bool, NoneType, tuple}  # of which a number that is the same object is the same number

Columns = tuple[list[Any], ...]
"""Gradients, parameters, and what the optimizer keeps for each of them in the order of `kept`."""


class MultiTensorStep:
    """The plain steps of an SGD, Adam or AdamW.

    Args:
        optimizer: One of those that `serves` is true for.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._kind = type(optimizer)
        self._groups: list[_Group] = []

    @staticmethod
    def serves(optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer is of exactly these types: a subclass may do something else."""
        return _is_known and type(optimizer) in (SGD, Adam, AdamW)

    def __call__(self) -> bool:
        """Do what `optimizer.step()` does; False if nothing was done because torch has to do it."""
        if not self._steps_plainly():
            return False
        grad_mode = torch.is_grad_enabled()
        try:
            set_grad_enabled(False)  # what torch does; as a context it takes longer
            works = self._works()
            for settings, columns, known in works or ():
                for portion in known.portions:
                    settings.update(*(column[portion] for column in columns))
        finally:
            set_grad_enabled(grad_mode)
        return works is not None

    def _steps_plainly(self) -> bool:
        """Whether it steps as torch has made it, and nobody hears of torch's operations or asks for something else."""
        optimizer = self._optimizer
        return not (
            num_function_modes()
            or num_dispatch_modes()
            or innermost_transform() is not None
            or torch.cuda.is_initialized()  # type: ignore[no-untyped-call] # torch steps in no graph that is captured
            or type(optimizer) is not self._kind
            or "_init_group" in optimizer.__dict__
            or optimizer.defaults.get("differentiable", True)
            or getattr(optimizer, "grad_scale", None) is not None
            or getattr(optimizer, "found_inf", None) is not None
            or not update_rules.are_torchs()
        )

    def _works(self) -> list[_Work] | None:
        """What is to be done with each group; None if torch has to do it."""
        groups, state = self._optimizer.param_groups, self._optimizer.state
        while len(self._groups) < len(groups):
            self._groups.append(_Group(SgdSettings if self._kind is SGD else AdamSettings))
        owners, kept = [*state], [*state.values()]
        works, begin = [], 0
        for group, remembered in zip(groups, self._groups, strict=False):
            rule = remembered.rule_of(group)
            if rule is None:
                return None
            parameters, grads = [], []
            for parameter in group["params"]:
                if (grad := parameter.grad) is not None:
                    parameters.append(parameter)
                    grads.append(grad)
            if len(parameters) < rule.fewest:
                return None
            if not parameters:
                continue
            end = begin + len(parameters)
            if end <= len(owners) and all(map(is_, owners[begin:end], parameters)):
                states = kept[begin:end]  # nearly always, and quicker to see than each is to look up
            else:
                states = [state.get(parameter, {}) for parameter in parameters]
            begin = end
            work = remembered.work(rule, grads, parameters, states)
            if work is None:
                return None
            works.append(work)
        begins = [*chain.from_iterable(work.known.begins for work in works)] if len(works) > 1 else []
        return works if len({*begins}) == len(begins) else None  # what two groups share changes in between


class _Rule(NamedTuple):
    """How a group is updated.

    Attributes:
        settings: Its settings.
        fewest: As in the settings.
        take: Takes what is kept for one parameter; one function for each of `kept`.
    """

    settings: Settings
    fewest: int
    take: list[itemgetter[Any]]


class _Group:
    """What is remembered of one of the groups from one step to the next: no tensor.

    Args:
        kind: Of its settings.
    """

    def __init__(self, kind: type[Settings]) -> None:
        self._kind = kind
        self._read = itemgetter(*kind.names())
        self._values: tuple[Any, ...] = ()
        self._rule: _Rule | None = None
        self._known: _Known | None = None

    def rule_of(self, group: Mapping[str, Any]) -> _Rule | None:
        """How the group is updated; None if its settings are not plain."""
        try:
            values = self._read(group)
            if self._rule is not None and all(map(is_, values, self._values)):
                return self._rule
            if any(map(group.get, OTHER_WAYS)):
                return None
            settings = self._kind.of(group)
            if not settings.are_plain() or not has_torchs_bits(settings.example()):
                return None
        except (KeyError, TypeError, ValueError):
            return None
        rule = _Rule(settings, settings.fewest, [*map(itemgetter, settings.kept)])
        if {*map(type, values)} <= _UNCHANGING:
            self._values, self._rule = values, rule
        return rule

    def work(self, rule: _Rule, grads: list[Tensor], parameters: list[Tensor], states: list[Any]) -> _Work | None:
        """What is to be done with all parameters that have gradients; None if something is not plain."""
        settings, known = rule.settings, self._known
        try:
            columns = (grads, parameters, *[[*map(take, states)] for take in rule.take])
            if known is None or not known.holds_for(columns):
                known = _found_out(settings, columns)
                if known is None:
                    return None
                self._known = known
        except (KeyError, RuntimeError):  # no state yet; not all have one memory: nested tensors, say
            return None
        if isinstance(settings, AdamSettings):
            steps = [*map(Tensor.item, columns[2])]
            if steps.count(steps[0]) < len(steps) or steps[0] < 0:
                return None
        return _Work(settings, columns, known)


class _Known(NamedTuple):
    """What was found out about plain columns.

    Attributes:
        passes: Whether tensors have the types, shapes, strides and so on of these.
        pointers: Where parameters and what is kept for them lie.
        begins: The same, of those that are not empty, in rising order.
        ends: Where each of these ends.
        spans: Bytes from the first to the last element of each gradient.
        portions: Which parameters are updated in one call.
    """

    passes: Callable[..., bool]
    pointers: list[int]
    begins: list[int]
    ends: list[int]
    spans: list[int]
    portions: list[slice]

    def holds_for(self, columns: Columns) -> bool:
        """Whether it is true of these columns, too, wherever their gradients lie."""
        tensors, num_grads = [*chain.from_iterable(columns)], len(self.spans)
        if len(tensors) != num_grads + len(self.pointers) or not self.passes(*tensors):
            return False
        pointers = [*map(Tensor.data_ptr, tensors)]
        return pointers[num_grads:] == self.pointers and self.is_apart(pointers[:num_grads])

    def is_apart(self, grads: list[int]) -> bool:
        """Whether no gradient lies in a parameter, or in what is kept for one: these change before it is read.

        Args:
            grads: Where each gradient begins.
        """
        num_begun = [*map(bisect_right, repeat(self.begins), grads)]  # of what lies there, before each gradient
        num_ended = [*map(bisect_right, repeat(self.ends), grads)]
        num_begun_at_end = [*map(bisect_left, repeat(self.begins), map(add, grads, self.spans))]
        return num_ended == num_begun == num_begun_at_end


class _Work(NamedTuple):
    """What is to be done with a group."""

    settings: Settings
    columns: Columns
    known: _Known


def _found_out(settings: Settings, columns: Columns) -> _Known | None:
    grads, parameters, *kept = columns
    if not all(map(_is_plain, parameters)) or not all(map(_is_like, grads, parameters)):
        return None
    for name, values in zip(settings.kept, kept, strict=True):
        if name == "step":
            if not all(map(_is_counter, values)) or len({value.dtype for value in values}) > 1:
                return None
        elif not all(map(_is_like, values, parameters)):
            return None
    tensors = [*chain.from_iterable(columns[1:])]
    extents = sorted((tensor.data_ptr(), tensor.data_ptr() + _span(tensor)) for tensor in tensors if tensor.numel())
    passes = guard([*grads, *tensors])
    if passes is None or any(end > begin for (_, end), (begin, _) in pairwise(extents)):
        return None
    known = _Known(
        passes,
        pointers=[*map(Tensor.data_ptr, tensors)],
        begins=[begin for begin, _ in extents],
        ends=[end for _, end in extents],
        spans=[*map(_span, grads)],
        portions=[*_portions(parameters)],
    )
    return known if known.is_apart([*map(Tensor.data_ptr, grads)]) else None


def _is_plain(parameter: Any) -> bool:
    return type(parameter) in (nn.Parameter, Tensor) and _is_dense(parameter) and parameter.dtype in _DTYPES


def _is_like(value: Any, parameter: Tensor) -> bool:
    """Whether it is a plain tensor of the parameter's dtype and shape."""
    return (
        type(value) is Tensor and _is_dense(value) and value.dtype == parameter.dtype and value.shape == parameter.shape
    )


def _is_counter(value: Any) -> bool:
    return type(value) is Tensor and _is_dense(value) and not value.ndim and value.dtype in _DTYPES


def _is_dense(tensor: Tensor) -> bool:
    """Whether it is memory on the CPU, read as it lies there, which may be written into."""
    is_strided = tensor.is_cpu and tensor.layout is torch.strided
    return is_strided and not tensor.is_neg() and not tensor.is_inference()


def _span(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _portions(parameters: list[Tensor]) -> Iterator[slice]:
    """Runs of parameters that a cache holds; one that is too large for it is one of its own."""
    begin = num_bytes = 0
    for number, parameter in enumerate(parameters):
        if number > begin and num_bytes + parameter.nbytes > _PORTION_BYTES:
            yield slice(begin, number)
            begin, num_bytes = number, 0
        num_bytes += parameter.nbytes
    yield slice(begin, len(parameters))
