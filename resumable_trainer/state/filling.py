"""Which live tensors a part's saved tensors can be read straight into, so that no second copy of it is needed.

Policy: only where the result is provably what `load_state_dict` would have given. A module or optimizer that
takes its state in torch's own way, without hooks, and whose tensors are plain and do not overlap, is *filled*;
every other part is restored with its own `load_state_dict` from tensors in memory of their own.

A filled part gives back what was put in without a comparison of bytes: where a module's tensors go was found
by capturing it, and nothing of its own runs in between; an optimizer is captured again, and holds the very
tensors that were filled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import batchnorm, instancenorm
from torch.optim import Optimizer

from resumable_trainer.state.compare import differences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_MODULE_METHODS = (
    "state_dict",
    "load_state_dict",
    "_save_to_state_dict",
    "_load_from_state_dict",
    "get_extra_state",
    "set_extra_state",
)
# They differ from nn.Module's for states of old torch versions only, and no snapshot says that it is one.
_KNOWN_LOADERS = (
    nn.Module._load_from_state_dict,
    batchnorm._NormBase._load_from_state_dict,
    instancenorm._InstanceNorm._load_from_state_dict,
)
_MODULE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OPTIMIZER_METHODS = ("state_dict", "load_state_dict", "_process_value_according_to_param_policy")
_OPTIMIZER_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_PLAIN_TYPES = (torch.Tensor, nn.Parameter)


@dataclass(slots=True, eq=False)
class Stored:
    """A tensor that is not read yet.

    Attributes:
        section: Whose file holds it.
        name: Its name there.
        shape: Its sizes.
        dtype: Its dtype.
        stride: How it lay in memory, if that was dense and not row-major.
        device: Where it was, if not on the CPU.
        is_parameter: Whether it was an `nn.Parameter`.
    """

    section: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None
    device: str | None = None
    is_parameter: bool = False


@dataclass
class Filling:
    """How a part is restored by filling.

    Attributes:
        targets: Tensors to be filled, by name in the part's file.
        copies: Pairs (filled, other): the other one was saved as the same tensor, and is to hold the same.
        finish: Called when all targets are filled; gives where the part does not hold now what was saved.
        keeps_targets: Whether the part takes the targets themselves, as an optimizer does with its state.
    """

    targets: dict[str, torch.Tensor]
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    finish: Callable[[], list[str]] = list
    keeps_targets: bool = False

    def written(self) -> list[torch.Tensor]:
        """Every tensor that is filled or copied into."""
        return [*self.targets.values(), *(other for _, other in self.copies)]

    def filled(self) -> list[str]:
        """The targets hold what was saved: the rest of the restoring; lines as `parts.unfaithful` gives them."""
        with torch.no_grad():
            for source, other in self.copies:
                other.copy_(source)
        torch.autograd.graph.increment_version(list(self.targets.values()))
        return self.finish()


def can_plan(part: object) -> bool:
    """Whether a part is of a kind that may be filled."""
    return isinstance(part, nn.Module | Optimizer)


def plan(section: str, part: object, outline: object) -> Filling | None:
    """How to fill a part, nothing touched yet; None if it is to be restored with its `load_state_dict`.

    Args:
        section: The part's name.
        part: The live part.
        outline: Its saved tree, with a `Stored` for each tensor.
    """
    if isinstance(part, nn.Module):
        return _plan_module(section, part, outline)
    if isinstance(part, Optimizer):
        return _plan_optimizer(section, part, outline)
    return None


def without_overlaps(fillings: Mapping[str, Filling]) -> dict[str, Filling]:
    """Those that can be filled one after the other: no two targets share memory."""

    def overlap(some: Mapping[str, Filling]) -> bool:
        return _overlapping(tensor for filling in some.values() for tensor in filling.written())

    if not overlap(fillings):
        return dict(fillings)
    sound = {name: filling for name, filling in fillings.items() if not overlap({name: filling})}
    return {} if overlap(sound) else sound


def _plan_module(section: str, module: nn.Module, outline: object) -> Filling | None:
    if not isinstance(outline, dict) or not _loads_plainly(module):
        return None
    live = module.state_dict(keep_vars=True)  # ten thousand tensors that are not parameters cost as much as their bytes
    if live.keys() != outline.keys():
        return None
    filling = Filling({})
    for key, tensor in live.items():
        stored = outline[key]
        if not _fits(section, tensor, stored):
            return None
        first = filling.targets.setdefault(stored.name, tensor)
        if first is not tensor and not _is_same_memory(first, tensor):
            filling.copies.append((first, tensor))
    return filling


def _loads_plainly(module: nn.Module) -> bool:
    if torch.__future__.get_swap_module_params_on_conversion():
        return False
    modules = list(module.modules())
    if not all(_is_plain_class(kind) for kind in {type(each) for each in modules}):
        return False
    for each in modules:
        own = vars(each)
        if any(own.get(hooks) for hooks in _MODULE_HOOKS) or not own.keys().isdisjoint(_MODULE_METHODS):
            return False
        live = (*own["_parameters"].values(), *own["_buffers"].values())
        if any(tensor is not None and type(tensor) not in _PLAIN_TYPES for tensor in live):
            return False  # one of a subclass may take bytes in another way
    return True


def _is_plain_class(kind: type[nn.Module]) -> bool:
    for name in _MODULE_METHODS:
        found = getattr(kind, name)
        if found is not getattr(nn.Module, name) and found not in (_KNOWN_LOADERS if "_load_from" in name else ()):
            return False
    return True


def _plan_optimizer(section: str, optimizer: Optimizer, outline: object) -> Filling | None:
    if not isinstance(outline, dict) or outline.keys() != {"state", "param_groups"} or not _takes_plainly(optimizer):
        return None
    groups, saved_state = outline["param_groups"], outline["state"]
    parameters = _by_index(optimizer, groups)
    if parameters is None or not isinstance(saved_state, dict) or not saved_state.keys() <= parameters.keys():
        return None
    filling = Filling({}, keeps_targets=True)
    state: dict[torch.Tensor, dict[str, Any]] = {}
    for index, saved in saved_state.items():
        group, parameter = parameters[index]
        taken = _entries(section, saved, parameter, group, optimizer.state.get(parameter, {}))
        if taken is None:
            return None
        names = [stored.name for stored in saved.values() if isinstance(stored, Stored)]
        if not filling.targets.keys().isdisjoint(names) or len(set(names)) < len(names):
            return None  # one tensor in two places: it is to be one again
        filling.targets.update({saved[key].name: taken[key] for key in saved if isinstance(saved[key], Stored)})
        state[parameter] = taken

    def finish() -> list[str]:
        # torch's own rules for the groups, and for what subclasses derive from them; the state goes in as it was.
        optimizer.load_state_dict({"state": {}, "param_groups": groups})
        optimizer.state.update(state)
        expected = {index: state[parameters[index][1]] for index in saved_state}
        return differences({"state": expected, "param_groups": groups}, optimizer.state_dict(), place=section)

    filling.finish = finish
    if _overlapping([*filling.targets.values(), *(parameter for _, parameter in parameters.values())]):
        return None  # a state that is its parameter's own memory
    return filling


def _takes_plainly(optimizer: Optimizer) -> bool:
    kind, own = type(optimizer), vars(optimizer)
    return (
        all(getattr(kind, name) is getattr(Optimizer, name) for name in _OPTIMIZER_METHODS)
        and kind.__setstate__.__module__.startswith("torch.optim.")
        and own.keys().isdisjoint(_OPTIMIZER_METHODS)
        and not any(own.get(hooks) for hooks in _OPTIMIZER_HOOKS)
    )


def _by_index(optimizer: Optimizer, groups: object) -> dict[Any, tuple[dict[str, Any], torch.Tensor]] | None:
    """Group as saved and live parameter, by the number that stands for it in the saved state; None if no fit."""
    if not isinstance(groups, list) or len(groups) != len(optimizer.param_groups):
        return None
    found: dict[Any, tuple[dict[str, Any], torch.Tensor]] = {}
    for saved, live in zip(groups, optimizer.param_groups, strict=True):
        if not _is_plain(saved) or not isinstance(saved, dict) or len(saved["params"]) != len(live["params"]):
            return None
        found |= {index: (saved, each) for index, each in zip(saved["params"], live["params"], strict=True)}
    return found if len(found) == sum(len(group["params"]) for group in groups) else None


def _entries(
    section: str, saved: object, parameter: torch.Tensor, group: Mapping[str, Any], live: object
) -> dict[str, Any] | None:
    """The state of one parameter with a tensor to be filled for each that was saved; None if it is of another form."""
    if type(saved) is not dict or not isinstance(live, dict):
        return None
    taken: dict[str, Any] = {}
    for key, value in saved.items():
        if not isinstance(value, Stored):
            if not _is_plain(value):
                return None
            taken[key] = value
            continue
        moves = key != "step" or group.get("capturable", False) or group.get("fused", False)
        if value.section != section or value.is_parameter or (value.device is not None and not moves):
            return None
        device = parameter.device if moves else torch.device("cpu")
        if device.type == "meta":
            return None
        taken[key] = _target(value, device, live.get(key))
    return taken


def _target(stored: Stored, device: torch.device, live: object) -> torch.Tensor:
    """The live tensor, if it is laid out as the one that was saved; else a new one."""
    stride = stored.stride or _row_major(stored.shape)
    if (
        isinstance(live, torch.Tensor)
        and _fits(stored.section, live, stored)
        and live.device == device
        and _same_layout(live, stride)
        and not live.requires_grad
    ):
        return live
    return torch.empty_strided(stored.shape, stride, dtype=stored.dtype, device=device)


def _same_layout(tensor: torch.Tensor, stride: Sequence[int]) -> bool:
    """Whether the strides are these, wherever they matter; tells apart what `is_contiguous` does not."""
    return tensor.stride() == tuple(stride)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _is_plain(value: object) -> bool:
    """Whether a value holds no tensor, and is of the kinds that loading hands on as they are."""
    if value is None or type(value) in (bool, int, float, complex, str):
        return True
    if type(value) in (list, tuple):
        return all(_is_plain(inner) for inner in value)  # type: ignore[attr-defined]
    return type(value) is dict and all(_is_plain(inner) for inner in value.values())


def _fits(section: str, tensor: object, stored: object) -> bool:
    """Whether the bytes of a stored tensor can be put into a live one as they are."""
    return (
        type(stored) is Stored
        and stored.section == section
        and type(tensor) in _PLAIN_TYPES
        and tensor.shape == stored.shape  # type: ignore[attr-defined]
        and tensor.dtype == stored.dtype  # type: ignore[attr-defined]
        and _is_plain_memory(tensor)  # type: ignore[arg-type]
    )


def _is_plain_memory(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
        and (tensor.is_contiguous() or _is_dense(tensor))
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether it fills its memory without gaps and overlaps, in some order of its dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.device == b.device


def _overlapping(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether any two of these dense tensors share memory."""
    by_device: dict[torch.device, list[tuple[int, int]]] = {}
    for tensor in tensors:
        if num_bytes := tensor.nbytes:
            by_device.setdefault(tensor.device, []).append((tensor.data_ptr(), num_bytes))
    return any(a + num_bytes > b for each in by_device.values() for (a, num_bytes), (b, _) in pairwise(sorted(each)))
