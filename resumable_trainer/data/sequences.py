"""Data that is no tensor and no map-style DataLoader: sequences, stateful iterables, any iterable."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from resumable_trainer.data.order import mix

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class SequenceSource:
    """A list, a range, anything with a length and items by index: each item is a batch."""

    skip_cost: str | None = None

    def __init__(self, data: Sequence[Any]) -> None:
        self._data = data

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """Items from number `start` on; the epoch does not change their order."""
        return (self._data[index] for index in range(start, len(self._data)))

    def num_batches(self) -> int:
        """Number of items."""
        return len(self._data)

    def describe(self) -> str:
        """For the banner."""
        return f"{len(self._data)} batches ({type(self._data).__name__})"

    def fingerprint(self) -> dict[str, Any]:
        """What the order and content of the batches depend on."""
        return {"kind": type(self._data).__name__, "batches": len(self._data)}

    def capture(self, *, epoch_complete: bool) -> object | None:
        """Nothing: the position says it all."""
        return None

    def restore(self, state: object) -> None:
        """Nothing to do."""

    def weight(self, batch: Any) -> int:
        """Samples in a batch, as far as can be seen."""
        return num_samples(batch)

    def close(self) -> None:
        """Nothing to do."""


class StatefulSource:
    """An iterable that keeps its own place: `state_dict()` and `load_state_dict()`."""

    skip_cost: str | None = None

    def __init__(self, data: Any) -> None:
        self._data = data
        self._restored = False

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """What the iterable gives from where its state stands; skipped by iterating if none was restored."""
        restored, self._restored = self._restored, False
        return iter(self._data) if restored else itertools.islice(self._data, start, None)

    def num_batches(self) -> int | None:
        """Its length, if it has one."""
        return _length(self._data)

    def describe(self) -> str:
        """For the banner."""
        return f"{type(self._data).__name__}, which keeps its own place"

    def fingerprint(self) -> dict[str, Any]:
        """What the order and content of the batches depend on."""
        return {"kind": type(self._data).__name__}

    def capture(self, *, epoch_complete: bool) -> object | None:
        """The iterable's state after the batches handed out so far."""
        state: object = self._data.state_dict()
        return state

    def restore(self, state: object) -> None:
        """Put the state back; the next iteration goes on from it."""
        self._data.load_state_dict(state)
        self._restored = True

    def weight(self, batch: Any) -> int:
        """Samples in a batch, as far as can be seen."""
        return num_samples(batch)

    def close(self) -> None:
        """Nothing to do."""


class IterableSource:
    """Any other iterable, a DataLoader over an IterableDataset included: skipped by iterating."""

    def __init__(self, data: Iterable[Any], *, seed: int, salt: str) -> None:
        self._data, self._seed, self._salt = data, seed, salt
        self.skip_cost: str | None = (
            f"{type(data).__name__} has no index and no state_dict(): to find its place again, a resume within "
            "an epoch reads and throws away every batch before it"
        )

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches from number `start` on, after reading those before.

        Global generators are the caller's affair: it sets them after the skipped batches were drawn.
        """
        iterator = iter(self._seeded(epoch) if isinstance(self._data, DataLoader) else self._data)
        for _ in itertools.islice(iterator, start):
            pass
        return iterator

    def _seeded(self, epoch: int) -> Iterator[Any]:
        """A DataLoader's iterator, its workers' base seed drawn from (seed, epoch), nothing from the global one."""
        import torch

        assert isinstance(self._data, DataLoader)
        kept = self._data.generator
        self._data.generator = torch.Generator()
        self._data.generator.manual_seed(mix(self._seed, self._salt, epoch))
        try:
            return iter(self._data)
        finally:
            self._data.generator = kept

    def num_batches(self) -> int | None:
        """Its length, if it has one."""
        return _length(self._data)

    def describe(self) -> str:
        """For the banner."""
        return f"{type(self._data).__name__}, read from its beginning"

    def fingerprint(self) -> dict[str, Any]:
        """What the order and content of the batches depend on."""
        return {"kind": type(self._data).__name__}

    def capture(self, *, epoch_complete: bool) -> object | None:
        """Nothing: the position says how far to read."""
        return None

    def restore(self, state: object) -> None:
        """Nothing to do."""

    def weight(self, batch: Any) -> int:
        """Samples in a batch, as far as can be seen."""
        return num_samples(batch)

    def close(self) -> None:
        """Nothing to do."""


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def num_samples(batch: Any) -> int:
    """Length of the first dimension of the first tensor found in a batch; 1 if there is none."""
    for _ in range(4):
        shape = getattr(batch, "shape", None)
        if shape is not None:
            return int(shape[0]) if len(shape) else 1
        if isinstance(batch, dict) and batch:
            batch = next(iter(batch.values()))
        elif isinstance(batch, list | tuple) and batch:
            batch = batch[0]
        else:
            return 1
    return 1
