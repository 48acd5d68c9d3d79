"""Hostile tensor files: headers that lie about lengths, offsets, shapes, dtypes and names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from forge import TENSORS, Case, put_file, tensor_file, with_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GROUP = "tensor files"
_LENGTHS = (0, 1, 7, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_GARBAGE = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "a string": b'"x"',
    "an open brace": b"{",
    "bytes that are no text": bytes(range(256)),
    "UTF-16": "{}".encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "NaN": b'{"a":NaN}',
    "something behind": b"{} {}",
    "100,000 levels of lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 levels of objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "metadata 100,000 deep": b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number of 100,000 digits": b'{"a":' + b"9" * 100_000 + b"}",
    "17 MiB of spaces": b"{" + b" " * (17 << 20) + b"}",
    "a string of 17 MiB": b'{"a":"' + b"x" * (17 << 20) + b'"}',
}
_OFFSETS: dict[str, Any] = {
    "turned around": [40, 0],
    "negative": [-1200, 0],
    "at 2^63": [2**63, 2**63 + 1200],
    "at 2^64": [2**64, 2**64 + 1200],
    "at 10^30": [10**30, 10**30 + 1200],
    "behind the file": [10**6, 10**6 + 1200],
    "floats": [0.0, 1200.0],
    "words": ["0", "1200"],
    "null": None,
    "booleans": [False, True],
    "one": [1200],
    "three": [0, 1, 1200],
    "an object": {"begin": 0, "end": 1200},
    "a million of them": [0] * 1_000_000,
}
_SHAPES: dict[str, Any] = {
    "negative": [-20, -15],
    "2^63": [2**63],
    "2^64 + 300": [2**64 + 300],
    "2^32 x 2^32, zero in 64 bits": [2**32, 2**32],
    "2^62 x 4 x 300": [2**62, 4, 300],
    "10^30": [10**30],
    "1,000,000 dimensions": [1] * 1_000_000,
    "65 dimensions": [20, 15] + [1] * 63,
    "floats": [20.0, 15.0],
    "words": ["20", "15"],
    "booleans": [True, 300],
    "nested": [[20], [15]],
    "null": None,
    "an object": {"0": 20},
    "one too many": [20, 16],
    "empty beside giant": [0, 2**47],
}
_DTYPES: dict[str, Any] = {
    "unknown": "F128",
    "in small letters": "f32",
    "nothing": "",
    "null": None,
    "a number": 32,
    "a list": ["F32"],
    "an object": {"F32": 1},
    "a dunder": "__class__",
    "of half a byte": "F4",
    "of another size": "F64",
    "10 MB": "F" * 10_000_000,
}
_NAMES = {
    "..": True,
    "/etc/passwd": True,
    "a\0b": True,
    "": True,
    "__class__": True,
    "\u202egnp.exe": True,
    "\x1b[2J": True,
    "x" * 300: True,
    "x" * 513: False,
    "\U0001f4a3" * 200: False,
    "x" * 10_000_000: False,
}


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _lengths()
    for name, header in _GARBAGE.items():
        yield _case(f"header is {name}", lambda fields, data, header=header: with_header(header, data))
    for name, offsets in _OFFSETS.items():
        yield _entry(f"offsets {name}", data_offsets=offsets)
    for name, shape in _SHAPES.items():
        yield _entry(f"shape {name}", shape=shape)
    for name, dtype in _DTYPES.items():
        yield _entry(f"dtype {name}", dtype=dtype)
    for field in ("dtype", "shape", "data_offsets"):
        yield _changed(f"no {field}", lambda fields, field=field: fields["weights"].pop(field))
    for value in (None, [], 1, "x", True, {}):
        yield _changed(f"described by {value!r}", lambda fields, value=value: fields.update(weights=value))
    yield _entry("a field of its own", evil=1)
    yield from _places()
    yield from _names()
    yield from _many()


def _case(name: str, change: Callable[[dict[str, Any], bytes], bytes], *, refused: bool = True) -> Case:
    def make(run: Path) -> None:
        put_file(run, TENSORS, change(*tensor_file(run)))

    return Case(GROUP, name, make, refused)


def _changed(name: str, change: Callable[[dict[str, Any]], object], *, refused: bool = True, tail: int = 0) -> Case:
    """With header fields that `change` has changed, and `tail` more (or fewer) bytes of data."""

    def file(fields: dict[str, Any], data: bytes) -> bytes:
        change(fields)
        return with_header(json.dumps(fields).encode(), data[: len(data) + min(tail, 0)] + bytes(max(tail, 0)))

    return _case(name, file, refused=refused)


def _entry(name: str, **changes: Any) -> Case:
    return _changed(f"weights with {name}", lambda fields: fields["weights"].update(changes))


def _lengths() -> Iterator[Case]:
    for length in _LENGTHS:
        yield _case(
            f"header of {length} bytes, it says",
            lambda fields, data, length=length: with_header(json.dumps(fields).encode(), data, length=length),
        )
    for size in range(9):
        yield _case(f"{size} bytes in all", lambda fields, data, size=size: bytes(size))
    yield _case("one byte too few", lambda fields, data: with_header(json.dumps(fields).encode(), data[:-1]))
    yield _case("one byte too many", lambda fields, data: with_header(json.dumps(fields).encode(), data + b"x"))


def _places() -> Iterator[Case]:
    def twice(fields: dict[str, Any], data: bytes) -> bytes:
        text = json.dumps(fields)
        return with_header((text[:-1] + ',"weights":' + json.dumps(fields["weights"]) + "}").encode(), data)

    def move(by: int) -> Callable[[dict[str, Any]], object]:
        def change(fields: dict[str, Any]) -> None:
            for entry in fields.values():
                entry["data_offsets"] = [at + by for at in entry["data_offsets"]]

        return change

    yield _case("a name twice", twice)
    yield _case(
        "a field twice",
        lambda fields, data: with_header(
            json.dumps(fields).replace('"dtype"', '"dtype": "F32", "dtype"', 1).encode(), data
        ),
    )
    yield _changed("a second tensor over the first", lambda f: f.update(evil=dict(f["weights"])))
    yield _changed("a hole at the start", move(8), tail=8)
    yield _changed("a hole at the end", lambda fields: None, tail=8)
    yield _changed("everything shifted behind the end", move(8))
    yield _changed("a tensor that the state names is gone", lambda f: f.pop("weights"))
    yield _changed("no tensors at all", lambda fields: fields.clear())
    yield _case(
        "tensors of another kind",
        lambda f, d: with_header(json.dumps(f).replace("F32", "I32").encode(), d),
        refused=False,
    )
    yield _changed("metadata", lambda f: f.update(__metadata__={"format": "pt"}), refused=False)


def _names() -> Iterator[Case]:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for name, is_harmless in _NAMES.items():
        yield _changed(
            f"an empty tensor named {name[:12]!r} ({len(name)})",
            lambda fields, name=name: fields.update({name: empty}),
            refused=not is_harmless,
        )
    yield _case(
        "half a surrogate pair as a name",
        lambda f, d: with_header(json.dumps({**f, "x": empty}).replace('"x"', '"\\ud800"').encode(), d),
    )


def _many() -> Iterator[Case]:
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for count in (100_001, 300_000, 600_000):
        names = ",".join(f'"{number}":{empty}' for number in range(count))
        yield _case(f"{count:,} empty tensors", lambda f, d, names=names: with_header(f"{{{names}}}".encode(), b""))
