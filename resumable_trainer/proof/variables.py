"""What the user's code holds beside the parts: variables of the script, its functions and modules, looked into.

A resume brings back the parts. What else lives across batches, in a local variable, in a dataset's attribute,
in a module, is lost; here it is found by name. Bounded: so many entries, so deep.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from argparse import Namespace
from collections import deque
from itertools import islice
from pathlib import Path
from types import (
    BuiltinFunctionType,
    FrameType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import TYPE_CHECKING, Any

import torch

from resumable_trainer.loop import launch
from resumable_trainer.proof import fingerprints
from resumable_trainer.proof.trace import ITEMS, LENGTH

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MAX_ENTRIES = 4000
_MAX_DEPTH = 4
_MAX_ITEMS = 200
_NUM_SAMPLED = 50
_NOT_LOOKED_INTO = {"torch", "numpy", "resumable_trainer", "tqdm"}  # they move by themselves, or are large
_LOADER_FIELDS = ("dataset", "sampler", "batch_sampler", "generator", "collate_fn")


class Variables:
    """Looks at everything that the user's code can reach.

    Args:
        known: Objects that a resume brings back, or that are ours: not looked into.
    """

    def __init__(self, known: list[object]) -> None:
        self._known = set(map(id, known))

    def look(self, frame: FrameType | None) -> dict[str, tuple[str, str]]:
        """(kind, digest) by path, from a frame outwards and through the user's modules.

        Breadth first: what several paths lead to is known by the shortest.
        """
        found: dict[str, tuple[str, str]] = {}
        seen: set[int] = set()
        waiting = deque(
            (prefix + name, value, 0)
            for prefix, variables in _scopes(frame)
            for name, value in list(variables.items())
            if not name.startswith("__")
        )
        while waiting and len(found) < _MAX_ENTRIES:
            path, value, depth = waiting.popleft()
            if _is_code(value):
                continue
            # Of what a resume brings back, only what it leaves out is of interest: attributes beside the state.
            is_known = id(value) in self._known
            fingerprint = None if is_known else fingerprints.of_object(value)
            if fingerprint is not None:
                found[path] = fingerprint
            elif depth < _MAX_DEPTH and id(value) not in seen:
                seen.add(id(value))
                waiting.extend((path + name, inner, depth + 1) for name, inner in _inside(value))
        return found


def _scopes(frame: FrameType | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The user's variables by where they live: functions under way, then modules."""
    while frame is not None:
        code = frame.f_code
        if launch.is_users(code.co_filename) and code.co_name != "<module>":
            yield f"{code.co_name}.", frame.f_locals
        frame = frame.f_back
    for name, module in list(sys.modules.items()):
        if _is_users(module):
            yield "" if name == "__main__" else f"{name}.", vars(module)


def _is_users(module: ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).is_absolute() and launch.is_users(file)


def _is_code(value: object) -> bool:
    if isinstance(value, type):
        return not _is_users(sys.modules.get(value.__module__))
    return isinstance(value, ModuleType | FrameType | BuiltinFunctionType)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container, a loader, a class or an object holds."""
    if isinstance(value, FunctionType):
        yield from _in_function(value)
    elif isinstance(value, MethodType):
        yield "", value.__self__
    elif isinstance(value, functools.partial):
        yield from ((f".{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    elif isinstance(value, type):
        yield from ((f".{name}", inner) for name, inner in _of_class(value).items())
    elif isinstance(value, dict):
        yield from _entries(value)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from _items(value)
    elif isinstance(value, torch.utils.data.DataLoader):
        yield from ((f".{name}", getattr(value, name, None)) for name in _LOADER_FIELDS)
    elif isinstance(value, torch.nn.Module):
        yield from _beside_the_state(value)
    elif _has_fields(value):
        yield from (
            (f".{name}", inner) for name, inner in {**_defaults(type(value)), **fingerprints.fields_of(value)}.items()
        )


def _has_fields(value: object) -> bool:
    """Whether an object is looked into: the user's, one that only holds names, or that of a small library."""
    if isinstance(value, torch.utils.data.Dataset | torch.utils.data.Sampler | SimpleNamespace | Namespace):
        return True
    module = _module_of(value)
    if _is_users(module):
        return True
    library = str(type(value).__module__).partition(".")[0]
    return library not in _NOT_LOOKED_INTO and library not in sys.stdlib_module_names and module is not None


def _of_class(kind: type) -> dict[str, Any]:
    """What a class of the user's holds itself, methods aside."""
    return {
        name: value
        for name, value in list(vars(kind).items())
        if not name.startswith("__") and not isinstance(value, _DESCRIPTORS) and not isinstance(value, type)
    }


_DESCRIPTORS = (FunctionType, classmethod, staticmethod, property, MemberDescriptorType, GetSetDescriptorType)


def _beside_the_state(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of a model and its layers that are neither parameters nor saved buffers nor torch's own."""
    for prefix, layer in module.named_modules():
        dot = f".{prefix}" if prefix else ""
        for name in sorted(layer._non_persistent_buffers_set):
            yield f"{dot}.{name}", layer._buffers.get(name)
        if _is_users(_module_of(layer)):
            own = {name: inner for name, inner in vars(layer).items() if name not in _TORCHS_OWN}
            yield from ((f"{dot}.{name}", inner) for name, inner in {**_defaults(type(layer)), **own}.items())


_TORCHS_OWN = frozenset(vars(torch.nn.Module())) | {"_is_full_backward_hook"}


def _entries(value: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    yield LENGTH, len(value)
    if len(value) <= _MAX_ITEMS:
        yield from ((f"[{key!r}]", inner) for key, inner in list(value.items()) if isinstance(key, _PLAIN_KEYS))
    else:
        yield ITEMS, _here_and_there(list(value.values()))


_PLAIN_KEYS = (str, int, float, tuple, bytes)


def _here_and_there(items: list[Any]) -> str:
    """Digest of some items of many, evenly spread: each look at all of them would take too long."""
    return fingerprints.of_data(list(islice(items, 0, None, len(items) // _NUM_SAMPLED)))


def _defaults(kind: type) -> dict[str, Any]:
    """What an object has by its class until it is set."""
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith("__") and isinstance(value, bool | int | float | str | list | dict)
    }


def _in_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Closures, defaults that are changed in place, attributes."""
    if not launch.is_users(function.__code__.co_filename):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not filled yet
            yield f".{name}", cell.cell_contents
    if function.__defaults__:
        yield ".__defaults__", function.__defaults__
    yield from ((f".{name}", inner) for name, inner in vars(function).items())


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """A long sequence counts by its length and some of its items."""
    yield LENGTH, len(value)
    items = list(value)
    if isinstance(value, set | frozenset):
        yield ITEMS, fingerprints.of_data(value)
    elif len(items) <= _MAX_ITEMS:
        yield from ((f"[{index}]", inner) for index, inner in enumerate(items))
    else:
        yield ITEMS, _here_and_there(items)


def _module_of(value: object) -> ModuleType | None:
    return sys.modules.get(type(value).__module__)
