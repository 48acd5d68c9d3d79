"""Data that is no tensor and no DataLoader: sequences, iterables that keep their place, any iterable.

Each item is a batch. Global generators that an item draws from while it is made are seeded for it
from (seed, salt, epoch, its number), and are afterwards as they were: the training's own random
numbers do not depend on how the data are made. Cost: 30 us per batch, none for lists, tuples, ranges.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from resumable_trainer.data.order import mix
from resumable_trainer.data.randomness import each_apart, isolated_generators, own_generators
from resumable_trainer.data.stateless import Stateless, length

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class SequenceSource(Stateless):
    """A list, a range, anything with a length and items by index; the epoch does not change their order."""

    finds_place = True

    def __init__(self, data: Sequence[Any], *, seed: int, salt: str = "train") -> None:
        self._data, self._seed, self._salt = data, seed, salt

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """Items from number `start` on; none before it is made."""
        items = (self._data[index] for index in range(start, len(self._data)))
        if type(self._data) in (list, tuple, range):
            return items
        return each_apart(items, mix(self._seed, self._salt, epoch), *own_generators(self._data), first=start)

    def num_batches(self) -> int:
        """Number of items."""
        return len(self._data)

    def describe(self) -> str:
        """For the banner."""
        return f"{len(self._data)} batches ({type(self._data).__name__})"

    def fingerprint(self) -> dict[str, Any]:
        """What the order and content of the batches depend on."""
        return {"kind": type(self._data).__name__, "batches": len(self._data)}


class IterableSource(Stateless):
    """Any iterable: its place is found again by reading from its beginning."""

    def __init__(self, data: Iterable[Any], *, seed: int, salt: str = "train") -> None:
        self._data, self._seed, self._salt = data, seed, salt
        self.skip_cost: str | None = (
            f"{type(data).__name__} has no index and no state_dict(): a resume within an epoch reads and throws "
            "away every batch before its place"
        )

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches from number `start` on; those before it are read by this call and thrown away."""
        return self._after(self._opened(epoch, first=0), start)

    def _opened(self, epoch: int, *, first: int) -> Iterator[Any]:
        """The iterable's items, of which `first` were given before."""
        seed = mix(self._seed, self._salt, epoch)
        own = own_generators(self._data)
        with isolated_generators(*own, seed=seed):
            iterator = iter(self._data)
        return each_apart(iterator, seed, *own, first=first)

    def num_batches(self) -> int | None:
        """Its length, if it has one."""
        return length(self._data)

    def describe(self) -> str:
        """For the banner."""
        known = self.num_batches()
        return f"{type(self._data).__name__}{'' if known is None else f', {known} batches'}"

    def fingerprint(self) -> dict[str, Any]:
        """What the order and content of the batches depend on, as far as can be seen."""
        return {"kind": type(self._data).__name__}


class StatefulSource(IterableSource):
    """An iterable that keeps its own place: `state_dict()` and `load_state_dict()`."""

    def __init__(self, data: Any, *, seed: int, salt: str = "train") -> None:
        super().__init__(data, seed=seed, salt=salt)
        self.skip_cost = None
        self._stateful = data
        self._restored = False

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """What the iterable gives from where its state stands; skipped by reading if none was restored."""
        restored, self._restored = self._restored, False
        return self._opened(epoch, first=start) if restored else super().batches(epoch=epoch, start=start)

    def capture(self, *, epoch_complete: bool) -> object | None:
        """The iterable's state after the batches handed out so far."""
        state: object = self._stateful.state_dict()
        return state

    def restore(self, state: object) -> None:
        """Put the state back; the next iteration goes on from it."""
        self._stateful.load_state_dict(state)
        self._restored = True

    def beginning(self) -> object | None:
        """The iterable's state before the first epoch."""
        state: object = copy.deepcopy(self._stateful.state_dict())
        return state

    def begin_again(self, beginning: object) -> None:
        """The way back of `beginning`."""
        self.restore(copy.deepcopy(beginning))
