"""Logged values to plain numbers, without waiting for a device.

A 0-dim CPU tensor is read at once (its owner may change it in place). A device tensor is copied on
its own device, which only queues a kernel; all of them are read together when rows are written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from resumable_trainer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Scalar = float | int
PendingScalar = Scalar | torch.Tensor


def take(values: Mapping[str, object]) -> dict[str, PendingScalar]:
    """Each value as a plain number, or as a device tensor of our own to be read later.

    Raises:
        UsageError: A value that is no float, int or tensor of one element.
    """
    return {name: _take_one(name, value) for name, value in values.items()}


def _take_one(name: str, value: object) -> PendingScalar:
    kind = type(value)
    if kind is float or kind is int:
        return value  # type: ignore[return-value] # exact types were just compared
    if isinstance(value, torch.Tensor):
        if value.numel() == 1 and not value.is_complex():
            if value.device.type == "cpu":
                number: Scalar = value.item()
                return int(number) if isinstance(number, bool) else number
            return value.detach().reshape(()).clone()
    elif isinstance(value, bool | np.bool_ | np.integer | int):
        return int(value)
    elif isinstance(value, np.floating | float):
        return float(value)
    shape = f" of shape {list(value.shape)}" if isinstance(value, torch.Tensor | np.ndarray) else ""
    raise UsageError(
        f"log: {name} is a {kind.__name__}{shape}, a metric is one number",
        found=kind.__name__,
        expected="float, int or a tensor of one element",
        hint="log a mean or a sum of it",
    )


def read_all(rows: Sequence[dict[str, PendingScalar]]) -> None:
    """Replace, in place, every device tensor in the rows by its number, with one read per dtype."""
    waiting: dict[tuple[torch.device, torch.dtype], list[tuple[dict[str, PendingScalar], str]]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, torch.Tensor):
                waiting.setdefault((value.device, value.dtype), []).append((row, name))
    for places in waiting.values():
        stacked = torch.stack([tensor for row, name in places if isinstance(tensor := row[name], torch.Tensor)])
        for (row, name), number in zip(places, stacked.tolist(), strict=True):
            row[name] = int(number) if isinstance(number, bool) else number
