"""Rows of steps: the same bytes as the journal's own encoder gives, and sums in the order of the steps."""

from __future__ import annotations

from typing import Any

import pytest

from resumable_trainer.durable.journal import encode_row
from resumable_trainer.loop.rows import StepRows
from resumable_trainer.metrics.averages import RunningAverages

VALUES: list[dict[str, Any]] = [
    {"loss": 0.1},
    {"loss": -0.0, "n": 3},
    {"loss": 1e-300, "a%sb": 10**400, '"quoted"\n': 5e22},
    {"loss": float("nan"), "b": float("-inf")},
    {"größe": 1.5, "\0": 2},
    {"half \ud800 pair": 1.0},
]


def add(rows: StepRows, position: tuple[int, int, int], weight: int, values: dict[str, Any]) -> None:
    rows.positions.append(position)
    rows.weights.append(weight)
    rows.values += values.values()


def one_by_one(rows: list[dict[str, Any]]) -> bytes:
    lines = [
        encode_row({"row": "step", "step": step, "epoch": 2, "batch": step + 1, **values})
        for step, values in enumerate(rows)
    ]
    return b"".join(lines)


@pytest.mark.parametrize("values", VALUES, ids=range(len(VALUES)))
def test_rows_are_the_bytes_that_the_journal_gives_row_by_row(values: dict[str, Any]) -> None:
    rows = StepRows(tuple(values))
    for step in range(3):
        add(rows, (step, 2, step + 1), 10, values)
    assert rows.lines() == one_by_one([values] * 3)


def test_sums_have_the_bits_of_adding_row_after_row() -> None:
    numbers = [0.1, 0.7, 1e16, -1e16, 0.3]
    rows, together, alone = StepRows(("loss", "n")), RunningAverages(), RunningAverages()
    for step, number in enumerate(numbers):
        add(rows, (step, 0, step), step + 1, {"loss": number, "n": step})
        alone.add_column("loss", [number], [step + 1])
        alone.add_column("n", [step], [step + 1])
    rows.add_to(together)
    assert together.state_dict() == alone.state_dict()
    assert together.means()["loss"] != sum(numbers)
