"""The live parts, and copies of their state in memory that later training cannot change.

Cost: the training thread waits for this, and for nothing else that a snapshot needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from resumable_trainer.garbage import WithoutCollections
from resumable_trainer.snapshot.layout import FROZEN
from resumable_trainer.snapshot.plan import Planner
from resumable_trainer.snapshot.tree import Flat, Plain, references
from resumable_trainer.snapshot.unchanged import WORTH_BYTES
from resumable_trainer.state import generators, modes
from resumable_trainer.state.overlap import Fence, changed_by_steps_alone
from resumable_trainer.state.parts import capture_part
from resumable_trainer.state.staging import Arena
from resumable_trainer.state.walk import walk_all

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from resumable_trainer.state.walk import Walked


class Capturing:
    """Takes the state of some parts apart, and copies it.

    Args:
        state: Parts by name.
    """

    def __init__(self, state: Mapping[str, object]) -> None:
        self._state = state
        self._planner = Planner()
        self._arena = Arena()
        self._fence: Fence | None = None
        self._generators: dict[str, Any] | None = None  # as captured last

    def overlap(self) -> None:
        """From now on copy while training goes on, what is not changed before the next step of an optimizer."""
        self._fence = Fence(self._state, self.let_go)

    def close(self) -> None:
        """Call nothing any more when an optimizer steps."""
        if self._fence is not None:
            self._fence.close()
            self._fence = None

    def capture(self, sections: Mapping[str, object], watch: modes.StepWatch | None) -> Flat:
        """The whole state taken apart: values as they are now, tensors live, not copied.

        Args:
            sections: Trees beside the parts.
            watch: Says whose gradients an optimizer step has used; without one all are saved.
        """
        with WithoutCollections():
            trees = self._trees(watch.used_gradients() if watch is not None else set())
            trees.update(sections)
            if "generators" not in trees:
                trees["generators"] = self._generators = generators.capture_global(self._generators)
            return self._planner.flatten(trees, _lying_apart(trees), made_once=("generators",))

    def _trees(self, used_gradients: set[int]) -> dict[str, object]:
        walked = walk_all(self._state)
        gradients = modes.capture_gradients(walked, used=used_gradients)
        trees = {name: _tree_of(part, walked.get(name)) for name, part in self._state.items()}
        return {**trees, "modes": modes.capture_modes(walked), "gradients": gradients}

    def stage(self, captured: Flat) -> Flat:
        """A copy of a captured state, in memory that is used again by the next call."""
        later = self.changed_by_steps_alone(captured) if self._fence is not None else set()
        tensors = self._arena.stage(captured.tensors, structure=captured.structure, later=later)
        return Flat(captured.values, tensors, captured.structure)

    def let_go(self) -> None:
        """Block until training may change the state that was staged last.

        Raises:
            UsageError: It was changed meanwhile by something else than an optimizer's step.
        """
        self._arena.let_go()

    def settle(self) -> None:
        """Block until the state that was staged last is copied.

        Raises:
            SnapshotWriteError: It could not be copied from a device.
            UsageError: It was changed meanwhile by something else than an optimizer's step.
        """
        self._arena.settle()

    def arrival(self) -> Callable[[], object] | None:
        """Blocks the thread that writes until what was staged last is there; None if it is."""
        return self._arena.ready()

    def changed_by_steps_alone(self, captured: Flat) -> set[tuple[str, str]]:
        """Files and names of tensors that may be copied until the next step of an optimizer."""
        kinds = (nn.Module, Optimizer)
        others = [values for name, values in captured.values.items() if not isinstance(self._state.get(name), kinds)]
        return changed_by_steps_alone(self._state, captured.tensors, {*references(others)})


def _tree_of(part: object, walked: Walked | None) -> object:
    return capture_part(part) if walked is None or walked.tensors is None else Plain(walked.tensors)


def _lying_apart(trees: Mapping[str, Any]) -> dict[str, list[str]]:
    """Tensors of each module that get a file of their own: those that are not trained, if they are worth it."""
    frozen = {name: found["frozen"] for name, found in trees["modes"].items() if name + FROZEN not in trees}
    return {name: keys for name, keys in frozen.items() if keys and _num_bytes(trees[name], keys) >= WORTH_BYTES}


def _num_bytes(tree: Mapping[str, Any], keys: Sequence[str]) -> int:
    tensors = [tree[key] for key in keys if isinstance(tree.get(key), torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
