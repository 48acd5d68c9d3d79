"""Overlapped staging: copy what only optimizers touch while the next forward and backward run.

What a step changes, and nothing else does, may be read until the next step. So parameters that are in the groups of
an optimizer, and that optimizer's state, are copied in a thread, and a hook before each `step()` waits for it; so do
the end of an epoch's batches, a restore, the next snapshot and the end. Everything else (buffers, gradients,
generators, other parts, what is tied to any of them, what is not on the CPU) is copied at once.

It is exact only if these hold, which is why it is asked for and not the default:

- from a snapshot to the next step, or to the end of the epoch's batches, nobody changes parameters or the state of an
  optimizer that is a part: no clipping of weights, no averaging into them, no `load_state_dict`, no optimizer that
  swaps them outside of its `step()`;
- `step()` is called as torch has it, so that its hooks run: not from a recorded graph.

What is found: any change of such a tensor while it is copied that torch counts (`Tensor._version`), and any change,
whatever made it, of the elements that are compared (the first of up to `_SAMPLES` tensors). Then the snapshot is not
written and the next `step()` raises. A change through `.data` or another library's memory, elsewhere in a tensor, is
not found.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resumable_trainer.errors import UsageError
from resumable_trainer.state.compare import same_bytes
from resumable_trainer.state.modes import heard

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from torch.optim import Optimizer

Place = tuple[str, str]
_SAMPLES = 64
_SAMPLE_ELEMENTS = 256


class Copying:
    """A copy that goes on in a thread until somebody waits for it.

    Args:
        copy: Copies sources into targets.
        targets: Memory of the snapshot.
        sources: Live tensors; what they hold now is what must arrive.
    """

    def __init__(
        self,
        copy: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None],
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
    ) -> None:
        self._copy = copy
        self._targets = targets
        self._live = [source.detach() for source in sources]  # they keep this memory, and count versions with the live
        self._versions = _versions(self._live)
        self._samples = [_sample(source).clone() for source in self._sampled(self._live)]
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="staging")
        self._thread.start()

    def wait(self) -> None:
        """Block until all is copied.

        Raises:
            UsageError: Something else than an optimizer's step has changed a tensor meanwhile.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._copy(self._targets, self._live)
            self._check()
        except BaseException as error:  # noqa: BLE001 - thread edge: it is raised by wait(), wherever that is called
            self._error = error
        finally:
            self._live = []

    def _check(self) -> None:
        arrived = [
            target.view(-1)[: len(sample)]
            for target, sample in zip(self._sampled(self._targets), self._samples, strict=True)
        ]
        if _versions(self._live) == self._versions and all(map(same_bytes, self._samples, arrived)):
            return
        raise UsageError(
            "overlapped staging: a parameter or an optimizer's state was changed outside of the optimizer's step while"
            " it was being copied, so this snapshot would be of no moment of the training; it was not written",
            hint='use staging="copy", or change such tensors only in step() of an optimizer that is a part',
        )

    def _sampled(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return tensors[:: max(1, len(tensors) // _SAMPLES)]


class Fence:
    """Calls something before each step of the optimizers among the parts.

    Args:
        state: The parts.
        wait: What is called; blocks until no copy is under way.
    """

    def __init__(self, state: Mapping[str, object], wait: Callable[[], None]) -> None:
        self._wait = wait
        self._handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in heard(state)]

    def _before_step(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._wait()

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def changed_by_steps_alone(
    state: Mapping[str, object], tensors: Mapping[str, Mapping[str, torch.Tensor]], others: Collection[Place]
) -> set[Place]:
    """Places of captured tensors that can be copied while forward and backward run.

    Args:
        state: The parts.
        tensors: What was captured of them, by file and name.
        others: Places of tensors that something else than a module or an optimizer holds, too.
    """
    modules = [part for part in state.values() if isinstance(part, nn.Module)]
    stepped = {_memory(tensor) for optimizer in heard(state) for tensor in _stepped(optimizer)}
    touched = {_memory(buffer) for module in modules for buffer in module.buffers()}
    touched |= {_memory(p.grad) for module in modules for p in module.parameters() if p.grad is not None}
    touched |= {_memory(tensors[file][name]) for file, name in others}
    may_wait = stepped - touched
    return {
        (file, name)
        for file, named in tensors.items()
        for name, tensor in named.items()
        if tensor.device.type == "cpu" and _memory(tensor) in may_wait
    }


def _stepped(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """What an optimizer's step changes, and nobody else: a learning rate that is a tensor is a scheduler's, too."""
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _memory(tensor: torch.Tensor) -> int:
    return 0 if tensor.layout != torch.strided else tensor.untyped_storage().data_ptr()


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Its first elements, or none if they do not lie one behind the other."""
    return tensor.view(-1)[:_SAMPLE_ELEMENTS] if tensor.is_contiguous() else tensor.new_empty(0)
