"""Staging: copies in host memory that later training cannot change.

Invariant: after `stage` returns, no tensor of the result shares memory with a live one: 0-dim
optimizer steps and BatchNorm buffers on the CPU included. Four published systems wrote snapshots
of a later step than they said because `state_dict()` hands out live tensors.

Cost: one memory copy of the state; the training thread waits for exactly this and no longer. An `Arena` is
asked for memory once: fresh pages for each snapshot would cost more than the copy itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping


def stage(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """Contiguous CPU copies of all tensors, by section and name."""
    return {section: {name: _copy(tensor) for name, tensor in named.items()} for section, named in tensors.items()}


class Arena:
    """Host memory into which one snapshot after the other is staged.

    What `stage` gives is good until it is called again: the snapshot before must be on disk by then.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, dict[str, torch.Tensor]] = {}

    def stage(self, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """Contiguous CPU copies of all tensors, by section and name."""
        before, self._buffers = self._buffers, {}
        targets, sources = [], []
        for section, named in tensors.items():
            kept = before.pop(section, {})
            mine = self._buffers[section] = {}
            for name, tensor in named.items():
                buffer = kept.pop(name, None)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                mine[name] = buffer
                targets.append(buffer)
                sources.append(tensor)
        if targets:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources)
        return self._buffers


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.copy_(tensor.detach())


def total_bytes(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> int:
    """Bytes of tensor data."""
    return sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
