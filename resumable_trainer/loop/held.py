"""The state as it was when an epoch's last batch was done, held while evaluation goes on.

A notice in evaluation must save *that* state: code between the batches and the end of the epoch
(a scheduler's step, what evaluation draws) runs again after a resume. A small state is copied; of
a large one only the values are, and digests of its tensors tell later whether it is still there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumable_trainer.durable.digest import digest_bytes
from resumable_trainer.state.staging import stage, total_bytes

if TYPE_CHECKING:
    import torch

    from resumable_trainer.snapshot.tree import Flat

COPY_UP_TO_BYTES = 64 << 20


class HeldState:
    """A captured state, to be had again later exactly or not at all.

    Args:
        captured: Values, and live tensors.
        copy_up_to_bytes: States up to this size are copied (one memory copy, at once); larger ones
            are digested (one read).
    """

    def __init__(self, captured: Flat, *, copy_up_to_bytes: int = COPY_UP_TO_BYTES) -> None:
        self._captured = captured
        self._copy = stage(captured.tensors) if total_bytes(captured.tensors) <= copy_up_to_bytes else None
        self._digests = [] if self._copy is not None else self._digest_all()

    def again(self) -> Flat | None:
        """The state as it was, in memory of its own; None if its tensors have changed since."""
        flat = type(self._captured)
        if self._copy is not None:
            return flat(values=self._captured.values, tensors=self._copy)
        if self._digest_all() != self._digests:
            return None
        return flat(values=self._captured.values, tensors=stage(self._captured.tensors))

    def _digest_all(self) -> list[str]:
        return [_digest(tensor) for named in self._captured.tensors.values() for tensor in named.values()]


def _digest(tensor: torch.Tensor) -> str:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return digest_bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else ""
