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

from bisect import bisect_right
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from resumable_trainer.loop import update_rules
from resumable_trainer.loop.update_rules import OTHER_WAYS, AdamSettings, SgdSettings, has_torchs_bits
from resumable_trainer.snapshot.likeness import guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

try:
    from torch._C import _len_torch_dispatch_stack as num_dispatch_modes
    from torch._C import _len_torch_function_stack as num_function_modes
    from torch._C._functorch import peek_interpreter_stack as innermost_transform
except ImportError:  # no public parts of torch: where they are not what they were, one does without
    _is_known = False
else:
    _is_known = update_rules.is_known

_PORTION_BYTES = 1024 * 1024  # of parameters that are updated in one call; five times as much is read or written
_DTYPES = (torch.float32, torch.float64)  # of float16 `_foreach_mul_` gives other bits than `mul_`


Columns = tuple[list[Any], ...]
"""Gradients, parameters, and what the optimizer keeps for each of them in the order of `kept`."""


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
        grads, others = columns[0], [*chain.from_iterable(columns[1:])]
        return (
            len(grads) == len(self.spans)
            and len(others) == len(self.pointers)
            and self.passes(*grads, *others)
            and [*map(Tensor.data_ptr, others)] == self.pointers
            and self.is_apart(grads)
        )

    def is_apart(self, grads: Sequence[Tensor]) -> bool:
        """Whether no gradient lies in a parameter, or in what is kept for one: these change before it is read."""
        begins, ends = self.begins, self.ends
        for begin, span in zip(map(Tensor.data_ptr, grads), self.spans, strict=True):
            after = bisect_right(begins, begin)
            if span and (
                (after > 0 and ends[after - 1] > begin) or (after < len(begins) and begins[after] < begin + span)
            ):
                return False
        return True


class _Work(NamedTuple):
    """What is to be done with a group."""

    settings: AdamSettings | SgdSettings
    columns: Columns
    known: _Known


class MultiTensorStep:
    """The plain steps of an SGD, Adam or AdamW.

    Args:
        optimizer: One of those that `serves` is true for.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._kind = type(optimizer)
        self._known: dict[int, _Known] = {}

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
            torch.set_grad_enabled(False)  # what torch does; as a context it takes longer
            works = self._works()
            for settings, columns, known in works or ():
                for portion in known.portions:
                    settings.update(*(column[portion] for column in columns))
        finally:
            torch.set_grad_enabled(grad_mode)
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
            or "_init_group" in vars(optimizer)
            or optimizer.defaults.get("differentiable", True)
            or getattr(optimizer, "grad_scale", None) is not None
            or getattr(optimizer, "found_inf", None) is not None
            or update_rules.pieces() != update_rules.TORCHS
        )

    def _works(self) -> list[_Work] | None:
        """What is to be done with each group; None if torch has to do it."""
        works = []
        for number, group in enumerate(self._optimizer.param_groups):
            settings = self._settings(group)
            columns = self._columns(group, settings) if settings is not None else None
            if settings is None or columns is None:
                return None
            if not columns[0]:
                continue  # nothing has a gradient
            known = self._what_is_known(number, settings, columns)
            if known is None or not has_torchs_bits(settings.example()):
                return None
            works.append(_Work(settings, columns, known))
        begins = [*chain.from_iterable(work.known.begins for work in works)] if len(works) > 1 else []
        return works if len({*begins}) == len(begins) else None  # what two groups share changes in between

    def _settings(self, group: Mapping[str, Any]) -> AdamSettings | SgdSettings | None:
        """The settings of a group; None if they are not plain."""
        if any(map(group.get, OTHER_WAYS)):
            return None
        try:
            settings = SgdSettings.of(group) if self._kind is SGD else AdamSettings.of(group)
            return settings if settings.are_plain() else None
        except (KeyError, TypeError, ValueError):
            return None

    def _columns(self, group: Mapping[str, Any], settings: AdamSettings | SgdSettings) -> Columns | None:
        """The tensors of a group, one column for each kind; None if they are too few, without state, or not plain."""
        parameters, grads = [], []
        for parameter in group["params"]:
            if (grad := parameter.grad) is not None:
                parameters.append(parameter)
                grads.append(grad)
        if len(parameters) < settings.fewest or (parameters and not _is_plain(parameters[0])):
            return None  # hardly ever is it the only one
        names, state = settings.kept, self._optimizer.state
        try:
            states = [state.get(parameter, {}) for parameter in parameters] if names else []
            return grads, parameters, *([each[name] for each in states] for name in names)
        except KeyError:
            return None

    def _what_is_known(self, number: int, settings: AdamSettings | SgdSettings, columns: Columns) -> _Known | None:
        """What is known of the columns of a group, found out if it is not true of them; None if they are not plain."""
        try:
            known = self._known.get(number)
            if known is None or not known.holds_for(columns):
                known = _found_out(settings, columns)
                if known is None:
                    return None
                self._known[number] = known
        except RuntimeError:  # not all have one memory: nested tensors, say
            return None
        if isinstance(settings, AdamSettings):
            steps = {step.item() for step in columns[2]}
            return known if len(steps) == 1 and min(steps) >= 0 else None
        return known


def _found_out(settings: AdamSettings | SgdSettings, columns: Columns) -> _Known | None:
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
    return known if known.is_apart(grads) else None


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
