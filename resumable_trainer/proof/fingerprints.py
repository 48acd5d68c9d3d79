"""Digests of whatever a training gives out: state, batches, and what the user's code holds beside both."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from resumable_trainer.durable.digest import digest_bytes
from resumable_trainer.errors import UnsafeValueError
from resumable_trainer.snapshot.tree import flatten
from resumable_trainer.state.generators import capture_generator, is_generator
from resumable_trainer.state.parts import capture_part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resumable_trainer.snapshot.tree import Flat

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_SEQUENCES = (list, tuple, set, frozenset, deque)
_MAX_DEPTH = 6


def of_tensor(tensor: torch.Tensor) -> str:
    """Digest of dtype, shape and elements."""
    plain = tensor.detach()
    if plain.is_sparse or plain.is_quantized or plain.device.type == "meta":
        return digest_bytes(repr((plain.dtype, tuple(plain.shape), plain.layout)).encode())
    flat = plain.cpu().contiguous().reshape(-1)
    head = repr((str(plain.dtype), tuple(plain.shape))).encode()
    return digest_bytes(head + (flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""))


def of_state(flat: Flat) -> dict[str, str]:
    """Digest by "section/name" of a captured state: each tensor, and what each entry holds of plain values."""
    found = {f"{section}/{name}": of_tensor(t) for section, named in flat.tensors.items() for name, t in named.items()}
    for section, values in flat.values.items():
        entries = values if isinstance(values, dict) else {"": values}
        for key, value in entries.items():
            text = json.dumps(value, sort_keys=True).encode()
            found[f"{section}/{key}:"] = digest_bytes(text)
    return found


def of_data(value: Any, *, depth: int = 0) -> str:
    """Digest of a batch: tensors, arrays, numbers and texts, in whatever they are nested."""
    if isinstance(value, torch.Tensor):
        return of_tensor(value)
    if isinstance(value, np.ndarray | np.generic):
        return _of_array(np.asarray(value))
    if isinstance(value, _PLAIN):
        return digest_bytes(repr((type(value).__name__, value)).encode())
    if depth >= _MAX_DEPTH:
        return "deep"
    if isinstance(value, Mapping):
        inner = [f"{key!r}={of_data(item, depth=depth + 1)}" for key, item in value.items()]
    elif isinstance(value, _SEQUENCES):
        inner = [of_data(item, depth=depth + 1) for item in value]
        inner = sorted(inner) if isinstance(value, set | frozenset) else inner
    elif hasattr(value, "__dict__"):
        inner = [f"{key}={of_data(item, depth=depth + 1)}" for key, item in vars(value).items()]
    else:
        inner = []
    return digest_bytes(f"{type(value).__qualname__}({','.join(inner)})".encode())


def _of_array(array: np.ndarray[Any, Any]) -> str:
    data = repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes()
    return digest_bytes(repr((array.dtype.str, array.shape)).encode() + data)


def of_samples(batch: Any) -> list[str]:
    """A digest for each sample of a batch; empty if it cannot be taken apart."""
    leaves = list(_leaves(batch, 0))
    sizes = {len(leaf) for leaf in leaves}
    if len(sizes) != 1 or not (size := sizes.pop()):
        return []
    return [digest_bytes("".join(of_data(leaf[index]) for leaf in leaves).encode()) for index in range(size)]


def _leaves(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, torch.Tensor | np.ndarray):
        if value.ndim:
            yield value
    elif isinstance(value, Mapping) and depth < _MAX_DEPTH:
        for inner in value.values():
            yield from _leaves(inner, depth + 1)
    elif isinstance(value, list | tuple) and depth < _MAX_DEPTH:
        if value and all(isinstance(inner, _PLAIN) for inner in value):
            yield value
        else:
            for inner in value:
                yield from _leaves(inner, depth + 1)


def of_object(value: object) -> tuple[str, str] | None:
    """(kind, digest) of one thing that a user's variable holds; None for what is opaque or a container.

    Kinds: "generator", "state" (has a `state_dict`), "tensor", "value".
    """
    if is_generator(value):
        return "generator", _of_tree(capture_generator(value))
    if isinstance(value, np.random.RandomState):
        return "generator", _of_tree(value.get_state(legacy=False))
    if isinstance(value, torch.nn.Module | torch.optim.Optimizer) or _has_state(value):
        return _of_stateful(value)
    if isinstance(value, torch.Tensor):
        return ("tensor", of_tensor(value)) if value.numel() * value.element_size() <= _MAX_BYTES else None
    if isinstance(value, np.ndarray | np.generic):
        return ("tensor", _of_array(np.asarray(value))) if value.nbytes <= _MAX_BYTES else None
    if isinstance(value, _PLAIN):
        return "value", digest_bytes(repr(value).encode())
    if isinstance(value, itertools.count | itertools.repeat):
        return "value", digest_bytes(repr(value).encode())
    return None


_MAX_BYTES = 16 << 20


def _has_state(value: object) -> bool:
    kind = type(value)
    return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))


def _of_stateful(value: object) -> tuple[str, str] | None:
    try:
        return "state", _of_tree(capture_part(value))
    except Exception:  # noqa: BLE001 - the user's own code; what cannot be looked at is opaque
        return None


def _of_tree(tree: object) -> str:
    try:
        return digest_bytes(json.dumps(of_state(flatten({"it": tree})), sort_keys=True).encode())
    except UnsafeValueError:
        return of_data(tree)
