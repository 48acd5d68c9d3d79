"""Compare two trees of tensors and plain values to the bit.

`==` will not do: NaN differs from itself, 0.0 equals -0.0, and 1 equals True. What was promised
bit-exact is compared bit-exact.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes, wherever they live."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(as_bytes(a), as_bytes(b)))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor's elements, row by row: uint8 of one dimension, on the CPU."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # of one element, contiguous with any stride


def differences(a: object, b: object, *, place: str) -> list[str]:
    """One line for each place where two trees differ; empty if they are the same to the bit.

    Mappings are compared by key, not by order; a list equals a tuple only in kind.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a is b:
            return []
        return [] if same_bytes(a, b) else [f"{place} differs"]
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        same = a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        return [] if same else [f"{place} differs"]
    if isinstance(a, dict) and isinstance(b, dict):
        return _dict_differences(a, b, place)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return _list_differences(a, b, place)
    return [] if _same_value(a, b) else [f"{place} is {_short(b)}, expected {_short(a)}"]


def _dict_differences(a: dict[Any, Any], b: dict[Any, Any], place: str) -> list[str]:
    lines = [f"{place}[{key!r}] is missing" for key in a if key not in b]
    lines += [f"{place}[{key!r}] is unexpected" for key in b if key not in a]
    for key in a:
        if key in b:
            lines += differences(a[key], b[key], place=f"{place}[{key!r}]")
    return lines


def _list_differences(a: Any, b: Any, place: str) -> list[str]:
    if len(a) != len(b):
        return [f"{place} has {len(b)} entries, expected {len(a)}"]
    return [
        line
        for index, (x, y) in enumerate(zip(a, b, strict=True))
        for line in differences(x, y, place=f"{place}[{index}]")
    ]


def _same_value(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.generic) and isinstance(b, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, float | complex) and isinstance(b, float | complex):
        return struct.pack("<dd", a.real, a.imag) == struct.pack("<dd", b.real, b.imag)
    try:
        return bool(a == b)
    except (TypeError, ValueError):
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
