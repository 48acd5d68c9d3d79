"""Rows of training steps on their way to the metric journal: collected step by step, written together.

One row per step is what every step pays for, so that a step only appends to lists. Rows with the same names differ in
numbers alone: they are formatted in one go, into the bytes that the journal's own encoder would give.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import chain
from math import isfinite
from operator import add
from typing import TYPE_CHECKING

from resumable_trainer.durable.journal import encode_row
from resumable_trainer.loop.scalars import read_list

if TYPE_CHECKING:
    from resumable_trainer.loop.scalars import PendingScalar
    from resumable_trainer.metrics.averages import RunningAverages

_POSITION = ("step", "epoch", "batch")


class StepRows:
    """Rows that all hold the same names, in the order of their steps.

    Args:
        names: Names of the values.

    Attributes:
        positions: Step, epoch and batch of each row.
        weights: Samples of each row's batch.
        values: Row after row, in the order of the names; device tensors are read later.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.positions: list[tuple[int, int, int]] = []
        self.weights: list[int] = []
        self.values: list[PendingScalar] = []

    def __len__(self) -> int:
        return len(self.weights)

    def waits_for_device(self) -> bool:
        """Whether a value is still on a device."""
        return not all(type(value) is float or type(value) is int for value in self.values)

    def read(self) -> None:
        """Turn values that are on devices into numbers, once, before what follows; waits for the devices."""
        read_list(self.values)

    def add_to(self, averages: RunningAverages) -> None:
        """Add all rows to running averages, one after the other: sums have the bits of that order."""
        numbers, width = self.values, len(self.names)
        for place, name in enumerate(self.names):
            averages.add_column(name, numbers[place::width], self.weights)  # type: ignore[arg-type] # read

    def lines(self) -> bytes:
        """The rows as lines of the journal."""
        numbers, width = self.values, len(self.names)
        try:
            if all(map(isfinite, numbers)):
                rows = zip(*[iter(numbers)] * width, strict=True)
                cells = tuple(chain.from_iterable(map(add, self.positions, rows)))
                return (_template(self.names) * len(self) % cells).encode()
        except (UnicodeEncodeError, OverflowError):  # half a surrogate pair in a name; an int that is no float
            pass
        return b"".join(
            encode_row(
                {
                    "row": "step",
                    **dict(zip(_POSITION, position, strict=True)),
                    **dict(zip(self.names, numbers[number * width :], strict=False)),
                }
            )
            for number, position in enumerate(self.positions)
        )


@lru_cache(maxsize=100)
def _template(names: tuple[str, ...]) -> str:
    """A line with a place for each number; `%s` gives floats and ints as JSON has them."""
    fields = "".join(f",{json.dumps(name, ensure_ascii=False)}:\0" for name in (*_POSITION, *names))
    text = '{"row":"step"' + fields + "}\n"
    return text.replace("%", "%%").replace("\0", "%s")
