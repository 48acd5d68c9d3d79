"""Nested state to typed JSON plus named tensors, and back.

Policy: exact types only, nothing is guessed: `np.float64` is a float to `isinstance` and a `StrEnum`
a str, and both would come back as something else. A value without a safe form is an error that names
its place. Reading runs no code of whoever wrote the file: no pickle, no import.

The tags are listed in FORMAT.md. A dict with plain string keys, a list, str, int, finite float, bool
and null stand for themselves; everything else is an object with one key that begins with "$".
"""

from __future__ import annotations

import base64
import collections
import datetime
import enum
import json
import math
import pathlib
import re
import struct
import sys
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from resumable_trainer.errors import UnsafeValueError
from resumable_trainer.snapshot.layout import FROZEN
from resumable_trainer.snapshot.raw import MAX_NAME_BYTES
from resumable_trainer.snapshot.tensors import is_storable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

MAX_DEPTH = 40
_INLINE_ARRAY_BYTES = 1024
_WORDS = (str, bool, types.NoneType)  # which stand for themselves
_USUAL_NAN = struct.pack(">d", math.nan).hex()
_FACTORIES = {"list": list, "dict": dict, "int": int, "float": float, "set": set}
_TORCH_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
TensorReader = "Callable[[str, str], torch.Tensor]"
# What decoding may raise on values that `flatten` does not write.
BAD_VALUES = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, struct.error)
TENSOR_FIELDS = frozenset({"$tensor", "device", "stride", "dtype", "parameter"})
_MAX_VARIANTS = 4  # of one stored tensor: as it is, and as a parameter with and without a gradient
_MAX_EQUAL_HASHES = 1000
_NUMPY_DTYPE = re.compile(r"[<>|=][biufcSUmM]\d{1,9}(\[\w{1,40}\])?")


@dataclass(frozen=True)
class Flat:
    """A state taken apart.

    Attributes:
        values: Typed JSON by section.
        tensors: Tensors by file (a section, or what lies apart of it) and name; as live as they were handed in.
        structure: Two states that have the very same object here have equal sections, names, shapes and dtypes.
    """

    values: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]
    structure: object = None


class Plain(dict[str, Any]):
    """Tensors by name, in which a parameter counts as the plain tensor that `Module.state_dict` makes of it.

    Making it costs more than all else that is done about a small tensor.
    """


def flatten(sections: Mapping[str, object], apart: Mapping[str, Collection[str]] | None = None) -> Flat:
    """Take named trees apart into values and tensors; nothing is copied.

    Args:
        sections: Trees by name.
        apart: By section: keys of tensors in its tree that are to lie in the file `SECTION.frozen`, so that a file
            in which nothing has changed need not be written again.

    Raises:
        UnsafeValueError: A value that has no safe form on disk; the message names its place.
    """
    writer = TreeWriter(apart or {})
    values = {name: writer.section(name, tree) for name, tree in sections.items()}
    return Flat(values, writer.found())


def references(encoded: Any) -> Iterator[tuple[str, str]]:
    """(file, name) of every tensor that typed JSON speaks of."""
    if isinstance(encoded, list):
        for inner in encoded:
            yield from references(inner)
    elif isinstance(encoded, dict):
        if "$tensor" in encoded:
            yield encoded["$tensor"][0], encoded["$tensor"][1]
        else:
            for inner in encoded.values():
                yield from references(inner)


def unflatten(values: Mapping[str, Any], tensor: Callable[[str, str], torch.Tensor]) -> dict[str, Any]:
    """The way back; `tensor(section, name)` reads one tensor.

    Raises:
        ValueError: Values that `flatten` does not write.
    """
    reader = TreeReader(tensor)
    return {name: reader.value(encoded) for name, encoded in values.items()}


@dataclass
class TreeWriter:
    """Encodes one tree after the other, and collects their tensors."""

    apart: Mapping[str, Collection[str]] = field(default_factory=dict)
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    _known: dict[tuple[Any, ...], list[str]] = field(default_factory=dict)
    _section: str = ""
    _apart: Collection[str] = frozenset()
    _is_plain: bool = False

    def section(self, name: str, tree: object) -> Any:
        """A tree's typed JSON; its tensors go to the section of this name."""
        self._section = name
        self._apart = frozenset(self.apart.get(name, ()))
        self.tensors[name] = {}
        return self.value(tree, ())

    def found(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of all files that have any."""
        return {name: tensors for name, tensors in self.tensors.items() if tensors}

    def value(self, value: object, path: tuple[Any, ...]) -> Any:
        """The typed JSON of any value, at its place in the section."""
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**64 else {"$int": hex(value)}  # type: ignore[operator, arg-type]
        if kind is float:
            return value if math.isfinite(value) else {"$float": _special(value)}  # type: ignore[arg-type]
        if len(path) > MAX_DEPTH:
            raise self.unsafe(value, path[:8], f"is nested deeper than {MAX_DEPTH}, or holds itself")
        if isinstance(value, torch.Tensor):
            return self.tensor(value, path)
        encode = _ENCODERS.get(kind)
        if encode is not None:
            return encode(self, value, path)
        return self.by_base_class(value, path)

    def by_base_class(self, value: object, path: tuple[Any, ...]) -> Any:
        """Values whose type says less than a class that it comes from."""
        if isinstance(value, np.generic):
            return _encode_numpy_scalar(self, value, path)
        if isinstance(value, enum.Enum):
            return {"$enum": [type(value).__module__, type(value).__qualname__, value.name]}
        if isinstance(value, pathlib.PurePath):
            return {"$path": str(value)}
        if isinstance(value, np.dtype):
            return {"$npdtype": value.str}
        raise self.unsafe(value, path, f"is a {type(value).__module__}.{type(value).__qualname__}")

    def items(self, values: Any, path: tuple[Any, ...]) -> list[Any]:
        """Each with its number as its place."""
        return [self.value(inner, (*path, index)) for index, inner in enumerate(values)]

    def pairs(self, values: Mapping[Any, Any], path: tuple[Any, ...]) -> list[list[Any]]:
        """Keys that JSON does not have are values, too."""
        return [[self.value(key, (*path, key)), self.value(inner, (*path, key))] for key, inner in values.items()]

    def tensor(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> dict[str, Any]:
        """A reference to the tensor, with what its bytes do not say."""
        reason = is_storable(tensor)
        if reason is not None:
            raise self.unsafe(tensor, path, reason)
        plain = tensor.detach()
        encoded: dict[str, Any] = {"$tensor": self.place(plain, path)}
        if plain.device.type != "cpu":
            encoded["device"] = str(plain.device)
        if not plain.is_contiguous() and is_dense(plain.shape, plain.stride()):
            encoded["stride"] = list(plain.stride())
        if plain.dtype == torch.complex128:
            encoded["dtype"] = "complex128"
        if isinstance(tensor, torch.nn.Parameter) and not self._is_plain:
            encoded["parameter"] = tensor.requires_grad
        return encoded

    def place(self, plain: torch.Tensor, path: tuple[Any, ...]) -> list[str]:
        """[file, name] of the tensor; one that shares all its memory with an earlier one gets that one's."""
        stored = torch.view_as_real(plain.resolve_conj()) if plain.dtype == torch.complex128 else plain
        identity = (
            plain.untyped_storage().data_ptr() or id(plain),
            plain.storage_offset(),
            tuple(plain.shape),
            plain.stride(),
            plain.dtype,
            str(plain.device),
            plain.is_conj(),
            plain.is_neg(),
        )
        if plain.numel() and identity in self._known:
            return self._known[identity]
        file = self._section + FROZEN if len(path) == 1 and path[0] in self._apart else self._section
        name = self.free_name(file, path)
        self.store(file, name, stored)
        self._known[identity] = [file, name]
        return self._known[identity]

    def store(self, file: str, name: str, tensor: torch.Tensor) -> None:
        """Take in a tensor under a name that is free in its file."""
        self.tensors.setdefault(file, {})[name] = tensor

    def free_name(self, file: str, path: tuple[Any, ...]) -> str:
        """A name for the tensor at a place that no other in its file has."""
        taken = self.tensors.get(file, {})
        name = ".".join(str(key) for key in path) or "value"
        if len(name.encode()) > MAX_NAME_BYTES - 20 or not name.isprintable() or name == "__metadata__":
            name = "tensor"
        candidate, number = name, 2
        while candidate in taken:
            candidate, number = f"{name}~{number}", number + 1
        return candidate

    def unsafe(self, value: object, path: tuple[Any, ...], reason: str) -> UnsafeValueError:
        """The error that names the place of a value."""
        place = self._section + "".join(f"[{key!r}]" for key in path)
        return UnsafeValueError(
            f"{place} {reason}, which has no safe form in a snapshot",
            found=type(value).__qualname__,
            hint="keep it out of the state, or hand over plain values and tensors (see FORMAT.md)",
        )


def _special(value: Any) -> str:
    """Infinities and NaN as words; a NaN of another sign or payload than the usual one as its bits."""
    bits = struct.pack(">d", value).hex()
    return f"nan:{bits}" if value != value and bits != _USUAL_NAN else repr(value)


def _float_of(word: str) -> float:
    kind, colon, bits = word.partition(":")
    if not colon:
        return float(kind)
    if kind != "nan" or len(bits) != 16:
        raise ValueError(f"state.json holds a float {word[:40]!r}")
    return float(struct.unpack(">d", bytes.fromhex(bits))[0])


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor fills its memory without gaps and overlaps, in some order of its dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _encode_dict(writer: TreeWriter, value: dict[Any, Any], path: tuple[Any, ...]) -> Any:
    if {*map(type, value)} <= {str} and "$" not in {key[:1] for key in value}:
        return {
            key: inner if type(inner) in _WORDS else writer.value(inner, (*path, key)) for key, inner in value.items()
        }
    return {"$dict": writer.pairs(value, path)}


def _encode_plain(writer: TreeWriter, value: Plain, path: tuple[Any, ...]) -> Any:
    writer._is_plain = True
    encoded = _encode_dict(writer, value, path)
    writer._is_plain = False
    return encoded


def _encode_list(writer: TreeWriter, value: list[Any], path: tuple[Any, ...]) -> Any:
    if {*map(type, value)} == {int} and min(value) >= -(2**63) and max(value) < 2**64:
        return list(value)  # an optimizer's numbers of ten thousand parameters
    return writer.items(value, path)


def _encode_set(tag: str) -> Callable[[TreeWriter, Any, tuple[Any, ...]], Any]:
    def encode(writer: TreeWriter, value: Any, path: tuple[Any, ...]) -> Any:
        return {tag: sorted(writer.items(value, path), key=json.dumps)}

    return encode


def _encode_defaultdict(writer: TreeWriter, value: Any, path: tuple[Any, ...]) -> Any:
    factory = None if value.default_factory is None else value.default_factory.__name__
    if factory is not None and _FACTORIES.get(factory) is not value.default_factory:
        raise writer.unsafe(value, path, f"is a defaultdict of {factory}")
    return {"$defaultdict": {"factory": factory, "items": writer.pairs(value, path)}}


def _encode_array(writer: TreeWriter, value: np.ndarray[Any, Any], path: tuple[Any, ...]) -> Any:
    if value.dtype.hasobject or value.dtype.names is not None or value.dtype.kind not in "biufcSUmM":
        raise writer.unsafe(value, path, f"is an array of dtype {value.dtype}")
    if value.nbytes > _INLINE_ARRAY_BYTES and value.dtype.kind in "biufc" and value.dtype.isnative:
        try:
            row_major = value if value.flags.c_contiguous else np.ascontiguousarray(value).reshape(value.shape)
            tensor = torch.from_numpy(row_major)
        except TypeError:
            pass  # a dtype that torch does not know
        else:
            return {"$ndarray": {"tensor": writer.tensor(tensor, path), "dtype": value.dtype.str}}
    data = base64.b64encode(value.tobytes()).decode()
    return {"$ndarray": {"dtype": value.dtype.str, "shape": list(value.shape), "data": data}}


def _encode_numpy_scalar(writer: TreeWriter, value: Any, path: tuple[Any, ...]) -> Any:
    if value.dtype.hasobject or value.dtype.names is not None:
        raise writer.unsafe(value, path, f"is a scalar of dtype {value.dtype}")
    return {"$npscalar": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}


_ENCODERS: dict[type, Callable[[TreeWriter, Any, tuple[Any, ...]], Any]] = {
    dict: _encode_dict,
    Plain: _encode_plain,
    list: _encode_list,
    tuple: lambda w, v, p: {"$tuple": w.items(v, p)},
    set: _encode_set("$set"),
    frozenset: _encode_set("$frozenset"),
    bytes: lambda _w, v, _p: {"$bytes": base64.b64encode(v).decode()},
    bytearray: lambda _w, v, _p: {"$bytearray": base64.b64encode(v).decode()},
    complex: lambda w, v, p: {"$complex": [w.value(v.real, p), w.value(v.imag, p)]},
    collections.OrderedDict: lambda w, v, p: {"$ordered": w.pairs(v, p)},
    collections.Counter: lambda w, v, p: {"$counter": w.pairs(v, p)},
    collections.deque: lambda w, v, p: {"$deque": {"items": w.items(v, p), "maxlen": v.maxlen}},
    collections.defaultdict: _encode_defaultdict,
    range: lambda _w, v, _p: {"$range": [v.start, v.stop, v.step]},
    slice: lambda w, v, p: {"$slice": w.items([v.start, v.stop, v.step], p)},
    datetime.datetime: lambda _w, v, _p: {"$datetime": v.isoformat()},
    datetime.timedelta: lambda _w, v, _p: {"$timedelta": [v.days, v.seconds, v.microseconds]},
    np.ndarray: _encode_array,
    torch.dtype: lambda _w, v, _p: {"$torchdtype": str(v).removeprefix("torch.")},
    torch.device: lambda _w, v, _p: {"$device": str(v)},
    torch.Size: lambda _w, v, _p: {"$size": list(v)},
}


class TreeReader:
    """Typed JSON back to the values that it stands for.

    Args:
        tensor: Reads one tensor of a section, by both names.
    """

    def __init__(self, tensor: Callable[[str, str], torch.Tensor]) -> None:
        self._read = tensor
        self._tensors: dict[tuple[str, str, str], torch.Tensor] = {}
        self._variants: collections.Counter[tuple[str, str]] = collections.Counter()

    def value(self, encoded: Any) -> Any:
        """One value.

        Raises:
            ValueError: A value that `flatten` does not write.
        """
        if isinstance(encoded, list):
            return [self.value(inner) for inner in encoded]
        if not isinstance(encoded, dict):
            return encoded
        tag = next(iter(encoded), "")
        if not tag.startswith("$"):
            return {key: self.value(inner) for key, inner in encoded.items()}
        if tag == "$tensor":
            return self.tensor(encoded)
        decode = _DECODERS.get(tag)
        if decode is None or len(encoded) != 1:
            raise ValueError(f"state.json holds {tag!r}, which this version does not know")
        return decode(self, encoded[tag])

    def pairs(self, encoded: list[list[Any]]) -> list[tuple[Any, Any]]:
        """Keys and values of a mapping."""
        pairs = [(self.value(key), self.value(inner)) for key, inner in encoded]
        _check_hashes([key for key, _ in pairs])
        return pairs

    def keys(self, encoded: list[Any]) -> list[Any]:
        """Items of a set."""
        keys: list[Any] = self.value(encoded)
        _check_hashes(keys)
        return keys

    def tensor(self, encoded: dict[str, Any]) -> torch.Tensor:
        """Equal references give the very same tensor: what was tied is tied again."""
        section, name = encoded["$tensor"]
        key = (section, name, "" if len(encoded) == 1 else json.dumps(encoded, sort_keys=True))
        if key not in self._tensors:
            self._variants[section, name] += 1
            if not encoded.keys() <= TENSOR_FIELDS or self._variants[section, name] > _MAX_VARIANTS:
                raise ValueError(f"state.json speaks of tensor {name!r} of {section!r} in a way that is never written")
            tensor = self._read(section, name)
            if "dtype" in encoded:
                if encoded["dtype"] != "complex128":
                    raise ValueError(f"state.json gives tensor {name!r} of {section!r} another dtype")
                tensor = torch.view_as_complex(tensor)
            if "stride" in encoded:
                tensor = _strided(tensor, encoded["stride"])
            if "device" in encoded:
                tensor = _on_device(tensor, encoded["device"])
            if "parameter" in encoded:
                tensor = torch.nn.Parameter(tensor, requires_grad=encoded["parameter"])
            self._tensors[key] = tensor
        return self._tensors[key]

    def array(self, encoded: dict[str, Any]) -> np.ndarray[Any, Any]:
        """An array of NumPy's."""
        dtype = _numpy_dtype(encoded["dtype"])
        if "tensor" in encoded:
            return self.tensor(encoded["tensor"]).numpy().view(dtype)
        data = base64.b64decode(encoded["data"], validate=True)
        return np.frombuffer(data, dtype=dtype).reshape(encoded["shape"]).copy()


def _strided(tensor: torch.Tensor, stride: list[int]) -> torch.Tensor:
    """The same values laid out as they were, channels_last say: kernels round differently on other layouts."""
    if not is_dense(tensor.shape, stride):  # before memory is asked for
        raise ValueError(f"state.json gives stride {stride} for shape {list(tensor.shape)}")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def _check_hashes(keys: list[Any]) -> None:
    """Keys made to have one hash would take the square of their number in time.

    Raises:
        ValueError: There are too many of them.
    """
    if len(keys) - len({hash(key) for key in keys}) > _MAX_EQUAL_HASHES:
        raise ValueError(f"state.json holds more than {_MAX_EQUAL_HASHES} keys of the same hash")


def _on_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """On the device where it was, if this machine has one of that kind; on the CPU otherwise."""
    wanted = torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or accelerator.type != wanted.type:
        return tensor
    return tensor.to(wanted if (wanted.index or 0) < torch.accelerator.device_count() else accelerator)


def _numpy_dtype(text: str) -> np.dtype[Any]:
    """A plain one: NumPy takes words for objects, records and shapes too, and evaluates some."""
    if not isinstance(text, str) or _NUMPY_DTYPE.fullmatch(text) is None:
        raise ValueError(f"state.json holds an array of dtype {str(text)[:40]!r}")
    return np.dtype(text)


def _decode_enum(_reader: TreeReader, encoded: list[str]) -> Any:
    """Looked up among what is loaded already, never imported: no code of a stranger runs.

    Nor any other: attributes of modules may import more when they are asked for, so only what is there counts.
    """
    module, qualified_name, member = encoded
    found: Any = sys.modules.get(module)
    for part in qualified_name.split("."):
        found = vars(found).get(part) if isinstance(found, type | types.ModuleType) else None
    if not (isinstance(found, type) and issubclass(found, enum.Enum)):
        raise ValueError(f"state.json holds {module}.{qualified_name}.{member}: import {module} before restoring")
    return found[member]


def _decode_numpy_scalar(_reader: TreeReader, encoded: list[str]) -> Any:
    data = base64.b64decode(encoded[1], validate=True)
    return np.frombuffer(data, dtype=_numpy_dtype(encoded[0]))[0]


def _decode_defaultdict(reader: TreeReader, encoded: dict[str, Any]) -> Any:
    factory = None if encoded["factory"] is None else _FACTORIES[encoded["factory"]]
    return collections.defaultdict(factory, reader.pairs(encoded["items"]))


def _decode_complex(reader: TreeReader, encoded: list[Any]) -> complex:
    real, imaginary = reader.value(encoded)
    return complex(real, imaginary)


def _decode_timedelta(_reader: TreeReader, encoded: list[int]) -> datetime.timedelta:
    days, seconds, microseconds = encoded
    return datetime.timedelta(days, seconds, microseconds)


def _decode_size(_reader: TreeReader, encoded: list[int]) -> torch.Size:
    if not all(type(n) is int and 0 <= n < 2**63 for n in encoded):
        raise ValueError("state.json holds a size that no tensor has")
    return torch.Size(encoded)


_DECODERS: dict[str, Callable[[TreeReader, Any], Any]] = {
    "$int": lambda _r, v: int(v, 16),
    "$float": lambda _r, v: _float_of(v),
    "$dict": lambda r, v: dict(r.pairs(v)),
    "$tuple": lambda r, v: tuple(r.value(v)),
    "$set": lambda r, v: set(r.keys(v)),
    "$frozenset": lambda r, v: frozenset(r.keys(v)),
    "$bytes": lambda _r, v: base64.b64decode(v, validate=True),
    "$bytearray": lambda _r, v: bytearray(base64.b64decode(v, validate=True)),
    "$complex": _decode_complex,
    "$ordered": lambda r, v: collections.OrderedDict(r.pairs(v)),
    "$counter": lambda r, v: collections.Counter(dict(r.pairs(v))),
    "$deque": lambda r, v: collections.deque(r.value(v["items"]), v["maxlen"]),
    "$defaultdict": _decode_defaultdict,
    "$range": lambda _r, v: range(*v),
    "$slice": lambda r, v: slice(*r.value(v)),
    "$path": lambda _r, v: pathlib.Path(v),
    "$datetime": lambda _r, v: datetime.datetime.fromisoformat(v),
    "$timedelta": _decode_timedelta,
    "$ndarray": lambda r, v: r.array(v),
    "$npscalar": _decode_numpy_scalar,
    "$npdtype": lambda _r, v: _numpy_dtype(v),
    "$torchdtype": lambda _r, v: _TORCH_DTYPES[v],
    "$device": lambda _r, v: torch.device(v),
    "$size": _decode_size,
    "$enum": _decode_enum,
}
