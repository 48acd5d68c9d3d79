"""JSON from a file that may be damaged or hostile: bounded, and strict where Python's is lax.

Python's parser takes duplicate keys (the last wins), NaN, and any depth until the interpreter's
stack ends; all of these are refused here. Free of torch.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_DEPTH = 200


def parse(data: bytes, *, max_bytes: int) -> Any:
    """The value that the bytes describe.

    Raises:
        ValueError: Too long, not UTF-8, not JSON, a duplicate key, NaN or infinity, nested too deep.
    """
    if len(data) > max_bytes:
        raise ValueError(f"{len(data)} bytes of JSON, at most {max_bytes} are read")
    try:
        value = _decode(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("JSON is nested too deep") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    """What passed the parser's own recursion limit may still be deeper than readers want to walk."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list  # the parser makes no other kinds that hold something
        ]
        if not level:
            return
    raise ValueError(f"JSON is nested deeper than {MAX_DEPTH}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("JSON has a duplicate key")
    return fields


def _refuse(token: str) -> NoReturn:
    raise ValueError(f"JSON holds {token}")


_decode = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse).decode
