"""Logged values to plain numbers, without waiting for a device.

A 0-dim CPU tensor is read at once (its owner may change it in place). A device tensor is copied on
its own device, which only queues a kernel; all of them are read together when rows are written.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from resumable_trainer.errors import UsageError
from resumable_trainer.metrics.history import POSITION_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RESERVED = frozenset(POSITION_COLUMNS)
Scalar = float | int
PendingScalar = Scalar | torch.Tensor


def take(values: Mapping[str, object], into: dict[str, PendingScalar]) -> None:
    """Add each value to a row, as a plain number or as a device tensor of our own to be read later.

    Raises:
        UsageError: A reserved name, or a value that is no float, int or tensor of one element.
    """
    if not RESERVED.isdisjoint(values):
        names = ", ".join(sorted(RESERVED & values.keys()))
        raise UsageError(f"log: {names} is in every row already, log it under another name")
    taken: dict[str, PendingScalar] = {}
    for name, value in values.items():
        kind = type(value)
        # The usual ones first: every step comes by here.
        if kind is torch.Tensor and value.is_cpu and not value.ndim:  # type: ignore[attr-defined]
            value = value.item()  # type: ignore[attr-defined]
            kind = type(value)
        taken[name] = value if kind is float or kind is int else _take_one(name, value)  # type: ignore[assignment]
    into.update(taken)


def _take_one(name: str, value: object) -> PendingScalar:
    kind = type(value)
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
    places = [(row, name) for row in rows for name in row]
    numbers = read_list([row[name] for row, name in places])
    for (row, name), number in zip(places, numbers, strict=True):
        row[name] = number


def read_list(values: list[PendingScalar]) -> list[Scalar]:
    """The same list, every device tensor in it replaced by its number, with one read per device and dtype."""
    waiting: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            waiting.setdefault((value.device, value.dtype), []).append(place)
    for places in waiting.values():
        stacked = torch.stack([tensor for place in places if isinstance(tensor := values[place], torch.Tensor)])
        for place, number in zip(places, stacked.tolist(), strict=True):
            values[place] = int(number) if isinstance(number, bool) else number
    return values  # type: ignore[return-value] # only numbers are left


def json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with NaN and infinities as words, as they come back from a manifest."""
    return {name: _word(value) for name, value in values.items()}


def _word(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
