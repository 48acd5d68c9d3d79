"""Numbers read without torch are torch's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from resumable_trainer.report.numbers import Distance, distance, numbers
from resumable_trainer.snapshot.raw import ITEM_BYTES
from resumable_trainer.snapshot.tensors import DTYPES


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().copy()


@pytest.mark.parametrize("code", [code for code in DTYPES if code.startswith(("F8", "BF16", "F16"))])
def test_every_value_of_a_narrow_float_is_the_one_torch_reads(code: str) -> None:
    words = np.arange(2 ** (8 * ITEM_BYTES[code]), dtype=f"<u{ITEM_BYTES[code]}").view("u1")
    expected = torch.from_numpy(words).view(DTYPES[code]).to(torch.float32).numpy()
    found = numbers(code, words).astype("<f4")
    assert np.array_equal(found, expected, equal_nan=True)


def test_every_dtype_that_is_stored_can_be_read() -> None:
    assert DTYPES.keys() == ITEM_BYTES.keys()
    for code, dtype in DTYPES.items():
        assert dtype.itemsize == ITEM_BYTES[code]
        assert len(numbers(code, np.zeros(ITEM_BYTES[code] * 3, dtype="u1"))) == 3


def test_the_largest_difference_of_integers_is_exact() -> None:
    a, b = torch.tensor([2**63 - 1, 5, -7]), torch.tensor([-(2**63), 6, -7])
    assert distance("I64", raw(a), "I64", raw(b)) == Distance(2, 2**64 - 1)
    near = torch.tensor([2**62 + 1])
    assert distance("I64", raw(near), "I64", raw(torch.tensor([2**62]))) == Distance(1, 1)


def test_zeros_of_other_sign_differ_by_nothing_and_special_values_are_counted() -> None:
    a, b = torch.tensor([0.0, 1.0, math.nan, math.inf, 2.0]), torch.tensor([-0.0, 1.0, math.nan, 1.0, 2.5])
    assert distance("F32", raw(a), "F32", raw(b)) == Distance(differing=3, largest=0.5, not_finite=1)


def test_other_dtypes_are_compared_by_value() -> None:
    a = torch.tensor([1.0, 2.0, math.nan, 3.0])
    b = torch.tensor([1.0, 2.0, math.nan, 3.25], dtype=torch.bfloat16)
    assert distance("F32", raw(a), "BF16", raw(b)) == Distance(differing=1, largest=0.25)
    assert distance("C64", raw(torch.tensor([3 + 4j])), "C64", raw(torch.tensor([0j]))) == Distance(1, 5.0)


def test_pieces_add_up() -> None:
    assert Distance(1, 0.5).plus(Distance(2, None, 2)).plus(Distance(0, 0.25)) == Distance(3, 0.5, 2)
