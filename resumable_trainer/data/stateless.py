"""What most sources share: the position alone finds the place again, and nothing is held open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any


class Stateless:
    """The part of a source that has nothing to remember and nothing to release."""

    skip_cost: str | None = None
    passed_over: Callable[[], object] = bool
    """Told each batch that is read and thrown away on the way to a place: that may take as long as an epoch."""

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches from number `start` of the epoch on."""
        raise NotImplementedError

    finds_place = False
    """Whether a place in the data is found by its position alone, wherever the reading of it was broken off."""

    def capture(self, *, epoch_complete: bool) -> object | None:
        """Nothing: the position says it all."""
        return None

    def restore(self, state: object) -> None:
        """Nothing to do."""

    def beginning(self) -> object | None:
        """Nothing: it begins anew each time."""
        return None

    def begin_again(self, beginning: object) -> None:
        """Nothing to do."""

    def weight(self, batch: Any) -> int:
        """Samples in a batch, as far as can be seen."""
        return num_samples(batch)

    def weighed(self, *, epoch: int, start: int = 0) -> Iterator[tuple[Any, int]]:
        """Batches from number `start` of the epoch on, each with its weight."""
        return ((batch, self.weight(batch)) for batch in self.batches(epoch=epoch, start=start))

    def close(self) -> None:
        """Nothing to do."""

    def _after(self, batches: Iterator[Any], number: int) -> Iterator[Any]:
        """The same without the first `number` of them, which are read by this call and thrown away."""
        for _ in islice(batches, number):
            self.passed_over()
        return batches


def num_samples(batch: Any) -> int:
    """Samples in a batch of any shape.

    Returns:
        The first dimension of the first tensor or array found; where there is none, the length of a
        list; 1 where nothing can be seen.
    """
    found = _first_dimension(batch)
    if found is not None:
        return found
    return len(batch) if isinstance(batch, list) else 1


def _first_dimension(batch: Any) -> int | None:
    shape = getattr(batch, "shape", None)
    if isinstance(shape, tuple):
        return int(shape[0]) if shape else None
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, list | tuple):
        return None
    for item in batch:
        found = _first_dimension(item)
        if found is not None:
            return found
    return None


def length(data: Any) -> int | None:
    """The length of something; None if it has none."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None
