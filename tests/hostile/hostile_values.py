"""Hostile `state.json`: tags that name code, giant and senseless numbers, JSON at the edge of what can be parsed."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from forge import STATE, Case, put_file, state_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GROUP = "values"
_SAME_HASH = 2**61 - 1  # Python's hash of its multiples is 0
_COLLIDING = [_SAME_HASH * n for n in range(60_000)]
_ENUMS: tuple[Any, ...] = (
    ["os", "system", "echo"],
    ["subprocess", "Popen", "x"],
    ["builtins", "exec", "x"],
    ["builtins", "object.__subclasses__", "x"],
    ["torch", "_dynamo.config", "x"],
    ["torch", "_inductor.config", "x"],
    ["numpy", "f2py.crackfortran", "x"],
    ["resumable_trainer", "Trainer.fit", "x"],
    ["resumable_trainer", "Run", "x"],
    ["antigravity", "Comic", "x"],
    ["importlib", "import_module", "os"],
    ["sys", "modules", "os"],
    ["os", "path.sep.__class__.__mro__", "x"],
    ["enum", "Enum", "x"],
    ["signal", "Signals", "SIGNOPE"],
    ["signal", "Signals", "__class__"],
    ["__main__", "", ""],
    ["", "", ""],
    [None, None, None],
    [["os"], "x", "y"],
    ["os", 5, "x"],
    ["os"],
    [],
    "os.system",
    None,
    5,
    {"module": "os"},
)
_NUMPY_DTYPES: tuple[Any, ...] = (
    "O",
    "|O",
    "O8",
    "f4,O",
    "i4,i4",
    "(2,2)f4",
    "(1000000,1000000)f8",
    "V8",
    "S2000000000",
    "U500000000",
    "m8[evil]",
    "M8[99999999999999999999s]",
    "float",
    "__import__('os')",
    "",
    "<f3",
    "f" * 1_000_000,
    None,
    8,
    [["a", "O"]],
    {"names": ["a"], "formats": ["O"]},
)
_ARRAYS: tuple[Any, ...] = (
    *({"dtype": dtype, "shape": [1], "data": "AAAAAAAAAAA="} for dtype in _NUMPY_DTYPES),
    *({"dtype": "<f4", "shape": shape, "data": "AAAAAA=="} for shape in ([-1, -1], [2**62], [2**31, 2**31], [0], "x")),
    *({"dtype": "<f4", "shape": [1] * dims, "data": "AAAAAA=="} for dims in (65, 1_000_000)),
    {"dtype": "<f4", "shape": [1], "data": "not base64"},
    {"dtype": "<f4", "shape": [1], "data": "AAA="},
    {"dtype": "<f4", "shape": [1], "data": None},
    {"dtype": "<f4"},
    {"dtype": "<f8", "tensor": {"$tensor": ["part", "half"]}},
    {"dtype": "O", "tensor": {"$tensor": ["part", "order"]}},
    {"dtype": "<f4", "tensor": {"$tensor": ["part", "nothing"]}},
    {"dtype": "<f4", "tensor": 5},
    [],
    None,
    "x",
)
_TENSORS: tuple[Any, ...] = (
    {"$tensor": ["../part", "weights"]},
    {"$tensor": ["/etc/passwd\0", "weights"]},
    {"$tensor": ["nothing", "weights"]},
    {"$tensor": ["part", "nothing"]},
    {"$tensor": ["part", ["weights"]]},
    {"$tensor": [{}, "weights"]},
    {"$tensor": []},
    {"$tensor": "ab"},
    {"$tensor": None},
    {"$tensor": 5},
    *(
        {"$tensor": ["part", "weights"], "stride": stride}
        for stride in (
            [2**40, 1],
            [2**62, 2**62],
            [2**70, 1],
            [-1, 1],
            [0, 0],
            [1, 0],
            [1],
            [1, 2, 3],
            [1.5, 1],
            "ab",
            None,
            5,
        )
    ),
    *({"$tensor": ["part", "weights"], "dtype": dtype} for dtype in ("complex128", "O", 5)),
    *({"$tensor": ["part", "weights"], "device": device} for device in ("evil", "cuda:" + "9" * 30, "", None, 5, [])),
    {"$tensor": ["part", "count"], "parameter": True},
    {"$tensor": ["part", "weights"], "parameter": "x"},
    {"$tensor": ["part", "weights"], "evil": 1},
    [{"$tensor": ["part", "weights"], "device": f"cpu:{number}"} for number in range(100_000)],
)
_OTHERS: dict[str, tuple[Any, ...]] = {
    "$int": ("zz", "", "0x", 5, None, ["0x1"]),
    "$float": ("garbage", "", "nan:", "nan:00", "nan:zz", "nan:" + "0" * 1_000_000, None, []),
    "$complex": ([1], ["a", "b"], [1, 2, 3], None, 5),
    "$range": ([], [0, 1, 0], ["a"], [0, 1.5], [1, 2, 3, 4], None),
    "$size": ([2**70], ["x"], None, 5, [1.5]),
    "$slice": ([1, 2, 3, 4], None, []),
    "$path": (5, None, ["a"], {"$path": "a"}),
    "$datetime": ("garbage", "", "9999-99-99", "2" * 10_000_000, 5, None),
    "$timedelta": ([10**18], [10**30, 0, 0], ["x"], [1, 2, 3, 4, 5, 6, 7, 8], None, {}),
    "$set": ([[1]], [{}], 5, None, [{"$dict": []}], _COLLIDING),
    "$frozenset": ([[1]], None, _COLLIDING),
    "$dict": ([[[1], 2]], [[1]], [1], ["abc"], 5, None, [[1, 2, 3]], [[n, 0] for n in _COLLIDING]),
    "$ordered": ([[[1], 2]], None, [1], [[n, 0] for n in _COLLIDING]),
    "$counter": ([[[1], 2]], None, [1], [[n, 0] for n in _COLLIDING]),
    "$deque": (
        {"items": [], "maxlen": -1},
        {"items": [], "maxlen": 10**30},
        {"items": []},
        {"items": 5, "maxlen": 1},
        [],
    ),
    "$defaultdict": (
        *({"factory": name, "items": []} for name in ("eval", "open", "__import__", "object", 5, [])),
        {"factory": "list"},
        {"factory": "list", "items": [[n, 0] for n in _COLLIDING]},
        [],
    ),
    "$bytes": ("\u00e4", "A", "====", 5, None),
    "$bytearray": ("\u00e4", 5, None),
    "$npscalar": (
        [],
        ["<f8"],
        ["<f8", ""],
        ["O", "AAAAAAAAAAA="],
        ["S2000000000", "AA=="],
        [5, 5],
        None,
        ["i4,i4", "AAAAAAAAAAA="],
    ),
    "$npdtype": ("O", "i4,i4", "evil", 5, None, ["a"], {"names": ["a"], "formats": ["O"]}),
    "$torchdtype": ("evil", "", "Tensor", [], {}, None),
    "$device": ("evil", "cuda:" + "9" * 30, 10**30, None, []),
    "$exec": ("import os",),
    "$pickle": ("gASVAAAAAAAAAAA=",),
    "$": (1,),
    "$$tensor": (1,),
}
_HARMLESS: tuple[Any, ...] = (
    {"$range": [0, 10**18, 1]},
    {"$range": [0, 10**400, 7]},
    {"$int": "0x" + "f" * 4_000_000},
    {"$path": "/etc/passwd"},
    {"$path": "../" * 1000},
    {"$float": "1e999"},
    {"$size": [2**40]},
    {"$enum": ["signal", "Signals", "SIGKILL"]},
    {"$device": "cuda:0"},
    {"$bytes": base64.b64encode(bytes(10_000_000)).decode()},
    {"$deque": {"items": [1, 2], "maxlen": 10**15}},
    {"$tensor": ["part", "weights"], "device": "cuda:7"},
    {"$slice": [{"$int": "0x" + "f" * 1000}, None, None]},
    "\x1b[2J\u202e\0",
    [[]] * 400_000,
    [{}] * 400_000,
    list(range(400_000)),
)
_TEXTS = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a string": b'"part"',
    "an open brace": b'{"part":',
    "bytes that are no text": bytes(range(256)),
    "UTF-16": "{}".encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"part":{}}',
    "a key twice": b'{"part":{},"part":{}}',
    "a key twice inside": b'{"part":{"a":1,"a":2}}',
    "NaN": b'{"part":{"a":NaN}}',
    "infinity": b'{"part":{"a":-Infinity}}',
    "something behind": b'{"part":{}} {}',
    "100,000 levels of lists": b'{"part":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 levels of objects": b'{"part":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "250 levels": b'{"part":' + b"[" * 250 + b"]" * 250 + b"}",
    "190 levels of tuples": b'{"part":' + b'{"$tuple":[' * 190 + b"]}" * 190 + b"}",
    "a number of 100,000 digits": b'{"part":' + b"9" * 100_000 + b"}",
    "a number of 10^7 digits": b'{"part":' + b"9" * 10_000_000 + b"}",
    "an exponent of 10^7 digits": b'{"part":1e' + b"9" * 10_000_000 + b"}",
}
_LEGAL_TEXTS = ("190 levels of tuples", "an exponent of 10^7 digits")
_SECTIONS: dict[str, tuple[Any, ...]] = {
    "generators": (
        None,
        [],
        {},
        {"python": 5},
        {"python": {"version": 3, "words": {"$tuple": [1, 2]}, "gauss": None}},
        {"python": {"version": 99, "words": [], "gauss": None}},
        {"torch": None},
        {"torch": {"$tensor": ["part", "weights"]}},
        {"numpy": 5},
        {"numpy": {"bit_generator": "os.system", "state": {}}},
        {"numpy": {"bit_generator": "MT19937", "state": {"key": [1], "pos": 10**9}}},
        {"accelerators": 5},
        {"accelerators": {"evil": [1]}},
    ),
    "modes": (None, [], 5, {"part": None}),
    "gradients": (None, [], {}, {"spent": 5, "pending": {}}, {"spent": {"part": 5}, "pending": None}),
}


def cases() -> Iterator[Case]:
    """All of them."""
    for tag, values in (("$enum", _ENUMS), ("$ndarray", _ARRAYS), *_OTHERS.items()):
        for number, value in enumerate(values):
            yield _part(f"{tag} {number}: {str(value)[:50]}", {tag: value})
    for number, value in enumerate(_TENSORS):
        yield _part(f"$tensor {number}: {str(value)[:70]}", value)
    yield _part("a tag beside another", {"$int": "0x1", "$float": "inf"})
    for number, value in enumerate(_HARMLESS):
        yield _part(f"harmless {number}: {str(value)[:50]}", value, refused=False)
    for name, data in _TEXTS.items():
        yield Case(GROUP, name, lambda run, data=data: put_file(run, STATE, data), refused=name not in _LEGAL_TEXTS)
    for section, trees in _SECTIONS.items():
        for number, tree in enumerate(trees):
            yield _section(section, number, tree)
    yield _with("100,000 sections", lambda fields: fields.update({str(n): 1 for n in range(100_000)}), refused=False)
    yield _with("no section of the part", lambda fields: fields.pop("part"), refused=False)


def _part(name: str, value: Any, *, refused: bool = True) -> Case:
    return _with(name, lambda fields: fields["part"].update(evil=value), refused=refused)


def _section(section: str, number: int, tree: Any) -> Case:
    """A section of the package's own that is not what it writes; what is given of an object stands beside the rest."""

    def change(fields: dict[str, Any]) -> None:
        is_patch = isinstance(tree, dict) and tree and section == "generators"
        fields[section] = {**fields[section], **tree} if is_patch else tree

    return _with(f"{section} {number}: {str(tree)[:50]}", change, refused=False)


def _with(name: str, change: Callable[[dict[str, Any]], object], *, refused: bool) -> Case:
    def make(run: Path) -> None:
        fields = state_fields(run)
        change(fields)
        put_file(run, STATE, json.dumps(fields).encode())

    return Case(GROUP, name, make, refused)
