"""Elements of stored tensors as numbers, and how far two pieces of them are apart. NumPy alone, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from resumable_trainer.snapshot.raw import ITEM_BYTES

Array = np.ndarray[Any, Any]

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
    "C64": "<c8",
}
_FLOAT8 = {  # bits of exponent, bias, whether the all-ones exponent means infinities and NaN
    "F8_E4M3": (4, 7, False),
    "F8_E5M2": (5, 15, True),
    "F8_E4M3FNUZ": (4, 8, False),
    "F8_E5M2FNUZ": (5, 16, False),
}


@dataclass(frozen=True)
class Distance:
    """How far two pieces of tensors are apart.

    Attributes:
        differing: Elements whose bytes differ (whose values do, if the dtypes differ).
        largest: Largest absolute difference among those that are finite on both sides; None if there are none.
        not_finite: Differing elements that are NaN or infinite on a side.
    """

    differing: int = 0
    largest: float | None = None
    not_finite: int = 0

    def plus(self, other: Distance) -> Distance:
        """Both pieces together."""
        largest = [value for value in (self.largest, other.largest) if value is not None]
        return Distance(
            self.differing + other.differing, max(largest, default=None), self.not_finite + other.not_finite
        )


def distance(code_a: str, a: Array, code_b: str, b: Array) -> Distance:
    """How far two equally long pieces are apart.

    Args:
        code_a: Dtype of `a` in the layout's spelling.
        a: Its bytes (uint8).
        code_b: Dtype of `b`.
        b: Its bytes.
    """
    if code_a == code_b:
        word = f"<u{ITEM_BYTES[code_a]}"
        places = np.flatnonzero(a.view(word) != b.view(word))
        if not places.size:
            return Distance()
        x, y = numbers(code_a, a)[places], numbers(code_b, b)[places]
        if x.dtype.kind in "iu":
            return Distance(int(places.size), _largest_of_integers(x, y))
    else:
        x, y = _wide(numbers(code_a, a)), _wide(numbers(code_b, b))
        differ = (x != y) & ~(np.isnan(x) & np.isnan(y))
        x, y = x[differ], y[differ]
    finite = np.isfinite(x) & np.isfinite(y)
    with np.errstate(all="ignore"):
        apart = np.abs(_wide(x[finite]) - _wide(y[finite]))
    largest = float(apart.max()) if apart.size else None
    return Distance(int(x.size), largest, int(x.size - apart.size))


def numbers(code: str, data: Array) -> Array:
    """The elements that the bytes (uint8) stand for; narrow floats as float32."""
    if code == "BF16":  # the upper half of a float32
        return (data.view("<u2").astype("<u4") << np.uint32(16)).view("<f4")
    if code in _DTYPES:
        return data.view(_DTYPES[code])
    return _float8_values(code)[data]


def _wide(values: Array) -> Array:
    with np.errstate(all="ignore"):
        return values.astype("<c16" if values.dtype.kind == "c" else "<f8")


def _largest_of_integers(x: Array, y: Array) -> int:
    """Exact, as a float64 is not beyond 2^53: the difference modulo 2^n, of the larger minus the smaller."""
    word = f"<u{x.dtype.itemsize}"
    larger, smaller = np.maximum(x, y), np.minimum(x, y)
    with np.errstate(all="ignore"):
        return int((larger.view(word) - smaller.view(word)).max())


@cache
def _float8_values(code: str) -> Array:
    """The 256 values of an 8-bit float (OCP "8-bit floating point"; FNUZ: Graphcore, AMD)."""
    return np.array([_float8_value(code, byte) for byte in range(256)], dtype="<f4")


def _float8_value(code: str, byte: int) -> float:
    if code == "F8_E8M0":
        return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)
    exponent_bits, bias, is_ieee = _FLOAT8[code]
    mantissa_bits = 7 - exponent_bits
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte & 0x7F) >> mantissa_bits, byte & ((1 << mantissa_bits) - 1)
    if code.endswith("FNUZ") and byte == 0x80:
        return math.nan
    if is_ieee and exponent == (1 << exponent_bits) - 1:
        return math.nan if mantissa else sign * math.inf
    if code == "F8_E4M3" and byte & 0x7F == 0x7F:
        return math.nan
    fraction = mantissa if exponent == 0 else mantissa + (1 << mantissa_bits)
    return sign * math.ldexp(fraction, max(exponent, 1) - bias - mantissa_bits)
