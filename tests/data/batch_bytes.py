"""Batches as plain bytes, for comparisons in which nothing is nearly equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def as_bytes(batch: Any) -> Any:
    """A batch with each tensor as (dtype, shape, bytes), kinds of containers included."""
    if isinstance(batch, torch.Tensor):
        plain = batch.detach().cpu().contiguous()
        return str(plain.dtype), tuple(plain.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(batch, np.ndarray):
        return str(batch.dtype), batch.shape, batch.tobytes()
    if isinstance(batch, dict):
        return {key: as_bytes(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch).__name__, [as_bytes(item) for item in batch]
    return type(batch).__name__, batch


def all_bytes(batches: Any) -> list[Any]:
    """All batches of an iterator as bytes."""
    return [as_bytes(batch) for batch in batches]
