"""Digests of whatever a training gives out: state, batches, and what the user's code holds beside both."""

from __future__ import annotations

import io
import itertools
import json
import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from resumable_trainer.durable.digest import digest_bytes
from resumable_trainer.errors import UnsafeValueError
from resumable_trainer.snapshot.tree import flatten
from resumable_trainer.state.compare import as_bytes
from resumable_trainer.state.generators import capture_generator, is_generator
from resumable_trainer.state.parts import capture_part

if TYPE_CHECKING:
    from resumable_trainer.snapshot.tree import Flat

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_SEQUENCES = (list, tuple, set, frozenset, deque)
_MAX_DEPTH = 6


def of_tensor(tensor: torch.Tensor) -> str:
    """Digest of dtype, shape and elements."""
    plain = tensor.detach()
    if plain.is_nested:
        return digest_bytes(repr((plain.layout, [*map(of_tensor, plain.unbind())])).encode())
    if plain.layout != torch.strided or plain.is_quantized or plain.device.type == "meta":
        return digest_bytes(repr((plain.dtype, tuple(plain.shape), plain.layout)).encode())
    head = repr((str(plain.dtype), tuple(plain.shape))).encode()
    return digest_bytes(head + as_bytes(plain).numpy().tobytes())


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
    elif hasattr(value, "__dict__") or hasattr(value, "__slots__"):
        inner = [f"{key}={of_data(item, depth=depth + 1)}" for key, item in fields_of(value).items()]
    else:
        inner = []
    return digest_bytes(f"{type(value).__qualname__}({','.join(inner)})".encode())


def fields_of(value: object) -> dict[str, Any]:
    """An object's attributes, in slots or not."""
    named = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    slots = [name for names in named for name in ([names] if isinstance(names, str) else names)]
    in_slots = {name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)}
    return {**in_slots, **getattr(value, "__dict__", {})}


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

    Kinds: "generator" (of random numbers), "iterator", "state" (has a `state_dict`), "tensor", "value".
    """
    if is_generator(value):
        return "generator", _of_tree(capture_generator(value))
    if isinstance(value, np.random.RandomState):
        return "generator", _of_tree(value.get_state(legacy=False))
    if isinstance(value, torch.nn.Module | torch.optim.Optimizer) or _has_state(value):
        return _of_stateful(value)
    if isinstance(value, torch.Tensor):
        return "tensor", of_tensor(value if value.numel() * value.element_size() <= _MAX_BYTES else _some_of(value))
    if isinstance(value, np.ndarray | np.generic):
        return "tensor", _of_array(np.asarray(value if value.nbytes <= _MAX_BYTES else value.reshape(-1)[::_STRIDE]))
    if isinstance(value, _PLAIN):
        return "value", digest_bytes(repr(value).encode())
    if isinstance(value, Iterator):
        place = place_of_iterator(value)
        return None if place is None else ("iterator", place)
    return None


def place_of_iterator(value: object, *, depth: int = 0) -> str | None:
    """Digest of how far an iterator has come; nothing is taken from it. None if that cannot be seen."""
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, GeneratorType):
        return _place_of_generator(value, depth)
    if isinstance(value, io.TextIOWrapper | io.BufferedReader):
        return _place_in_file(value)
    if isinstance(value, itertools.count | itertools.repeat):
        return digest_bytes(repr(value).encode())
    if hasattr(value, "_num_yielded"):  # a DataLoader's
        return digest_bytes(str(value._num_yielded).encode())
    if type(value).__module__ not in ("builtins", "itertools"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 deprecates that of itertools
            made = value.__reduce__()
    except (TypeError, AttributeError):
        return None
    return digest_bytes(repr([_place_in(part, depth) for part in made[1:]]).encode())


def _place_in(part: object, depth: int) -> object:
    """What an iterator is made of: counts, and the iterators below it; not what it goes over."""
    if isinstance(part, int):
        return part
    if isinstance(part, tuple):
        return [_place_in(inner, depth + 1) for inner in part] if depth <= _MAX_DEPTH else None
    return place_of_iterator(part, depth=depth + 1) if isinstance(part, Iterator) else None


def _place_of_generator(value: GeneratorType[Any, Any, Any], depth: int) -> str:
    if value.gi_frame is None:
        return "ended"
    found: list[object] = [value.gi_frame.f_lasti]
    for name, inner in sorted(value.gi_frame.f_locals.items()):
        if isinstance(inner, Iterator):
            found.append((name, place_of_iterator(inner, depth=depth + 1)))
        elif isinstance(inner, (*_PLAIN, torch.Tensor)) or (isinstance(inner, list) and len(inner) <= _MAX_LIST):
            found.append((name, of_data(inner)))
    if isinstance(value.gi_yieldfrom, Iterator):
        found.append(place_of_iterator(value.gi_yieldfrom, depth=depth + 1))
    return digest_bytes(repr(found).encode())


def _place_in_file(file: io.TextIOWrapper | io.BufferedReader) -> str | None:
    """Of a file that is read; what is written is the script's own affair."""
    try:
        if not file.readable() or file.isatty():
            return None
        return digest_bytes(str(os.lseek(file.fileno(), 0, os.SEEK_CUR)).encode())
    except (OSError, ValueError):
        return None


_MAX_LIST = 1000
_MAX_BYTES = 16 << 20


_STRIDE = 1009  # a prime: no column of a table is left out


def _some_of(tensor: torch.Tensor) -> torch.Tensor:
    """Of a large tensor, elements here and there."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return tensor
    return tensor.detach().view(-1)[::_STRIDE] if tensor.is_contiguous() else tensor[:1]


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
