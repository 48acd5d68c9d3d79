"""Parts: live objects to a tree of tensors and plain values, and back.

Policy: restoring is strict. All parts are compared with what was saved before anything is touched,
and one error lists every mismatch; afterwards each part is captured again and must give back the
bytes that were put in. Cost: one pass over the state each way, plus that comparison; a part that
`filling` can fill is restored without both.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from resumable_trainer.errors import SettingsError, StateMismatchError
from resumable_trainer.state import generators
from resumable_trainer.state.compare import differences
from resumable_trainer.state.filling import Stored

if TYPE_CHECKING:
    from collections.abc import Mapping

RESERVED_NAMES = frozenset({"generators", "gradients", "loop", "manifest", "modes", "state"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@runtime_checkable
class Stateful(Protocol):
    """Anything that can give its state and take it back, in torch's spelling."""

    def state_dict(self) -> Any:
        """The whole state as tensors and plain values."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Continue where `state_dict` was taken."""


def check_parts(state: Mapping[str, object]) -> None:
    """Refuse parts that could not be captured, all problems at once.

    Raises:
        SettingsError: A name that cannot be a file name or is reserved, an object without state.
    """
    problems = []
    for name, part in state.items():
        problems += name_problems(name)
        if not isinstance(part, Stateful) and not generators.is_generator(part):
            kind = type(part).__name__
            problems.append(f"part {name!r} is a {kind}, which has no state_dict() and load_state_dict()")
    if problems:
        raise SettingsError(f"state: {'; '.join(problems)}", found=problems)


def name_problems(name: object) -> list[str]:
    """Why a part cannot have this name; empty if it can."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return [f"part name {name!r} must be letters, digits, '_', '-' or '.'"]
    return [f"part name {name!r} is reserved"] if name in RESERVED_NAMES else []


def capture_part(part: object) -> object:
    """The part's state as a tree; tensors in it are live, not copied."""
    if generators.is_generator(part):
        return generators.capture_generator(part)
    if isinstance(part, Optimizer) and _saves_as_torch_does(part):
        return _optimizer_state(part)
    tree = cast("Stateful", part).state_dict()  # checked at the beginning, which is not cheap
    return dict(tree) if isinstance(part, nn.Module) else tree


def _saves_as_torch_does(optimizer: Optimizer) -> bool:
    return type(optimizer).state_dict is Optimizer.state_dict and "state_dict" not in vars(optimizer)


# Without the wrapping that keeps torch's compiler out, which no compiled code comes near.
_optimizer_state = getattr(Optimizer.state_dict, "__wrapped__", Optimizer.state_dict)


def mismatches(name: str, part: object, saved: object) -> list[str]:
    """Why `saved` cannot be put into `part`, one line per reason; nothing is touched.

    Args:
        name: The part's name.
        part: The live part.
        saved: Its saved tree; a `Stored` in the place of a tensor will do.
    """
    if isinstance(part, nn.Module):
        return _module_mismatches(name, part, saved)
    if isinstance(part, Optimizer):
        return _optimizer_mismatches(name, part, saved)
    return []


def _module_mismatches(name: str, module: nn.Module, saved: object) -> list[str]:
    if not isinstance(saved, dict):
        return [f"{name} is a module now, it was saved as {type(saved).__name__}"]
    live = module.state_dict()
    lines = [f"{name}.{key} is missing in the snapshot" for key in live if key not in saved]
    lines += [f"{name}.{key} is in the snapshot, the script's has no such entry" for key in saved if key not in live]
    for key, value in live.items():
        if key in saved and isinstance(value, torch.Tensor):
            lines += _tensor_mismatch(f"{name}.{key}", value, saved[key])
    return lines


def _tensor_mismatch(place: str, live: torch.Tensor, saved: object) -> list[str]:
    if not isinstance(saved, torch.Tensor | Stored):
        return [f"{place} was saved as {type(saved).__name__}, the script has a tensor"]
    if isinstance(live, nn.UninitializedParameter | nn.UninitializedBuffer):
        return []
    lines = []
    if live.shape != saved.shape:
        lines.append(f"{place} has shape {list(saved.shape)} in the snapshot, {list(live.shape)} in the script")
    if live.dtype != saved.dtype:
        lines.append(f"{place} has dtype {saved.dtype} in the snapshot, {live.dtype} in the script")
    return lines


def _optimizer_mismatches(name: str, optimizer: Optimizer, saved: object) -> list[str]:
    if not isinstance(saved, dict) or "param_groups" not in saved:
        return [f"{name} is an optimizer now, it was saved as something else"]
    live_sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    if live_sizes == saved_sizes:
        return []
    return [f"{name} has parameter groups of {saved_sizes} tensors in the snapshot, {live_sizes} in the script"]


def restore_part(name: str, part: object, saved: Any) -> None:
    """Put `saved` into `part`, exactly.

    Raises:
        StateMismatchError: The part refuses it, or does not hold afterwards what was put in.
    """
    if generators.is_generator(part):
        generators.restore_generator(part, saved)
        return
    assert isinstance(part, Stateful)
    if isinstance(part, nn.Module):
        # torch keeps versions of modules' states in an attribute that a plain dict does not have.
        live = part.state_dict()
        saved = OrderedDict(saved)
        saved._metadata = getattr(live, "_metadata", None)
    try:
        part.load_state_dict(saved)
    except Exception as error:
        raise StateMismatchError(
            f"part {name!r} does not take back its saved state: {type(error).__name__}: {error}",
            hint="restore the script's old definition of it, or start a new run with --fresh",
        ) from error
    if isinstance(part, Optimizer):
        _put_back_exactly(part, saved)


def unfaithful(name: str, part: object, saved: object) -> list[str]:
    """Where the part, captured again, differs from what was put in; empty if it is exact."""
    if generators.is_generator(part):
        return []
    return differences(saved, capture_part(part), place=name)


def _put_back_exactly(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo the casts of `Optimizer.load_state_dict`.

    It casts floating-point state to the parameter's dtype: fp32 moments of bf16 parameters would
    come back as bf16. The saved tensors go in with their own dtype, on the device torch chose.
    """
    live = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ids = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(ids, live, strict=True):
        if index in saved["state"]:
            optimizer.state[parameter] = _like(saved["state"][index], optimizer.state[parameter])


def _like(saved: Any, loaded: Any) -> Any:
    """`saved` with each tensor on the device where `loaded` has it."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if type(saved) is not type(loaded):
        return saved
    if isinstance(saved, dict):
        return {key: _like(value, loaded.get(key)) for key, value in saved.items()}
    if isinstance(saved, list | tuple) and len(saved) == len(loaded):
        return type(saved)(_like(value, other) for value, other in zip(saved, loaded, strict=True))
    return saved


def scalar_settings(part: object) -> dict[str, object]:
    """The plain numbers and words in an optimizer's or scheduler's state, by place.

    These are settings that the script writes and loading overwrites (learning rate, patience of
    ReduceLROnPlateau, base_lrs): recorded as the script builds them, they tell on a resume what the
    script has changed.
    """
    if isinstance(part, nn.Module) or generators.is_generator(part):
        return {}
    tree = capture_part(part)
    if isinstance(part, Optimizer) and isinstance(tree, dict):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in tree["param_groups"]]
        tree = {"param_groups": groups}
    found: dict[str, object] = {}
    _collect_scalars(tree, "", found)
    return found


def _collect_scalars(tree: object, place: str, found: dict[str, object]) -> None:
    if isinstance(tree, bool | int | float | str) or tree is None:
        found[place] = tree if isinstance(tree, bool | int | str) or tree is None else float(tree)
    elif isinstance(tree, np.generic | torch.Tensor) and np.ndim(tree) == 0:
        found[place] = tree.item()
    elif isinstance(tree, dict) and len(place) < 200:
        for key, value in tree.items():
            if isinstance(key, str | int):
                _collect_scalars(value, f"{place}.{key}" if place else str(key), found)
    elif isinstance(tree, list | tuple) and len(tree) <= 64:
        for index, value in enumerate(tree):
            _collect_scalars(value, f"{place}.{index}" if place else str(index), found)


def undriven_schedulers(state: Mapping[str, object]) -> list[str]:
    """Names of optimizers that a learning-rate scheduler drives which is not among the parts.

    torch marks an optimizer's `step` when a scheduler is built on it; a scheduler that is not handed
    over starts from zero after a resume, the classic silent loss.
    """
    covered = {id(getattr(part, "optimizer", None)) for part in state.values()}
    return [
        name
        for name, part in state.items()
        if isinstance(part, Optimizer) and getattr(part.step, "_wrapped_by_lr_sched", False) and id(part) not in covered
    ]


def has_finite_parameters(state: Mapping[str, object]) -> bool:
    """Whether no parameter of a module holds NaN or infinities; buffers may (masks do). Reads every parameter."""
    return all(
        bool(torch.isfinite(parameter).all())
        for part in state.values()
        if isinstance(part, torch.nn.Module)
        for parameter in part.parameters()
    )
