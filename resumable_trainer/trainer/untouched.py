"""Running a module's Python without leaving a trace of it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from resumable_trainer.state import generators
from resumable_trainer.state.compare import differences
from resumable_trainer.trainer.graphs import CannotTraceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_OF_RECURRENT_LAYERS = frozenset({"_flat_weights", "_flat_weight_refs"})
"""Lists of their parameters, which those layers follow up themselves whenever one is exchanged, as tracing does."""


@contextlib.contextmanager
def untouched(pair: nn.Module) -> Iterator[None]:
    """Puts back what running a module's Python has changed, and refuses what a graph would leave out."""
    before = generators.capture_global()
    kept = [_Attributes(module) for module in pair.modules()]
    changed: list[str] = []
    try:
        yield
    finally:
        after = generators.capture_global()
        generators.restore_global(before)
        for attributes in kept:
            changed += attributes.put_back()
    if changed:
        raise CannotTraceError(f"its forward pass changes {changed[0]!r}, an attribute that a graph would leave out")
    for name in ("python", "numpy"):
        if differences(before[name], after[name], place=name):
            raise CannotTraceError(f"its forward pass draws from {name}'s generator, which a graph would leave out")


class _Attributes:
    """A module's attributes, and what its own dicts, lists and sets hold; not deeper."""

    def __init__(self, module: nn.Module) -> None:
        self._live = vars(module)
        self._copy = dict(self._live)
        self._containers = [(n, v, type(v)(v)) for n, v in self._live.items() if type(v) in (dict, list, set)]

    def put_back(self) -> list[str]:
        """Names of what was another object, or held another."""
        live, copy = self._live, self._copy
        others = [name for name in copy.keys() | live.keys() if live.get(name, self) is not copy.get(name, self)]
        changed = [name for name in others if not _same_objects(live.get(name), copy.get(name))]
        if others:
            live.clear()
            live.update(copy)
        for name, container, before in self._containers:
            if not _same_objects(container, before):
                changed.append(name)
                container.clear()
                (container.extend if type(container) is list else container.update)(before)
        return [name for name in changed if name not in _OF_RECURRENT_LAYERS]


def _same_objects(a: Any, b: Any) -> bool:
    """Whether two things are containers of a kind that hold the same objects."""
    if type(a) is not type(b) or type(a) not in (dict, list, set):
        return False
    if type(a) is dict and not _same_objects(list(a.values()), list(b.values())):
        return False
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
