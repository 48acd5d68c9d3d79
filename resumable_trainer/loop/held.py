"""The state as it was when an epoch's last batch was done, held while evaluation goes on.

A notice in evaluation must save *that* state: code between the batches and the end of the epoch
(a scheduler's step, what evaluation draws) runs again after a resume. A small state is copied; of
a large one only the values are, and digests of its tensors tell later whether it is still there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumable_trainer.durable.digest import digest_bytes
from resumable_trainer.manager.held import now
from resumable_trainer.state.staging import stage, total_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from resumable_trainer.snapshot.tree import Flat

COPY_UP_TO_BYTES = 64 << 20


class HeldState:
    """A captured state, to be had again later exactly or not at all.

    Args:
        captured: Values, and live tensors.
        copy_up_to_bytes: States up to this size are copied (one memory copy, at once); larger ones
            are digested (one read).

    Attributes:
        taken: When it was captured (ISO 8601, UTC).
    """

    def __init__(self, captured: Flat, *, copy_up_to_bytes: int = COPY_UP_TO_BYTES) -> None:
        self.taken = now()
        self._captured = captured
        self._copy = stage(captured.tensors) if total_bytes(captured.tensors) <= copy_up_to_bytes else None
        self._digests = [] if self._copy is not None else self._digest_all()

    def again(self, copied: Callable[[Flat], Flat]) -> Flat | None:
        """The state as it was, in memory that nobody changes while it is written; None if it has changed since.

        Args:
            copied: Gives a copy of a captured state.
        """
        if self._copy is not None:
            return type(self._captured)(values=self._captured.values, tensors=self._copy)
        return copied(self._captured) if self._digest_all() == self._digests else None

    def _digest_all(self) -> list[str]:
        return [_digest(tensor) for named in self._captured.tensors.values() for tensor in named.values()]


def _digest(tensor: torch.Tensor) -> str:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return digest_bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else ""
