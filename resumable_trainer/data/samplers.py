"""The order in which a DataLoader's samplers hand out indices, as a pure function of (seed, epoch).

The samplers are the user's and run as they are, inside generators seeded for the epoch: the global
ones and those that the samplers and the loader keep. A sampler with a length runs to its end when
the epoch begins; one without is asked for a few lists at a time, since it may never end. Each such
block of lists is drawn from a seed of its own, so that finding the place again needs no saved
generator; afterwards all generators are as they were.

What a sampler itself remembers from epoch to epoch (its `state_dict()`, counters that iterating
moves) is captured as it was when the epoch began: the order is drawn again from there.
"""

from __future__ import annotations

import copy
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any

from resumable_trainer.data.order import mix
from resumable_trainer.data.randomness import isolated_generators, own_generators
from resumable_trainer.data.stateless import length

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.data import DataLoader

_LISTS_AHEAD = 32  # of a sampler without length; keeping the generators costs 30 us, once for so many


class SamplerOrder:
    """Index lists of a map-style DataLoader, epoch by epoch.

    Args:
        loader: The user's loader; its samplers are iterated over, nothing is loaded.
        seed: Seed of the run.
        salt: Keeps apart what training and evaluation draw.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int, salt: str) -> None:
        self._loader, self._seed, self._salt = loader, seed, salt
        self._samplers = _nested(loader)
        self._before: list[dict[str, Any]] = []  # samplers' own state as the epoch under way began
        self._counters: list[set[str]] = [set() for _ in self._samplers]

    def blocks(self, epoch: int, start: int) -> Iterator[list[Any]]:
        """Lists of index lists (of single indices without automatic batches), from list number `start` on.

        The first block is drawn at the call, which is when the epoch begins.
        """
        self._begin(epoch)
        blocks = self._drawn(epoch)
        first = next(blocks, [])
        return _without_first(chain([first], blocks), start)

    def _begin(self, epoch: int) -> None:
        self._before = [_plain_attributes(sampler) for sampler in self._samplers]
        for sampler, before in zip(self._samplers, self._before, strict=True):
            if is_stateful(sampler):
                before["state_dict"] = copy.deepcopy(sampler.state_dict())  # it may show live lists
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)

    def _drawn(self, epoch: int) -> Iterator[list[Any]]:
        outer = self._samplers[0]
        known = length(outer)
        size = _LISTS_AHEAD if known is None else known + 1  # one more: its end is seen in the same block
        lists: Iterator[Any] | None = None
        for number in count():
            seed = mix(self._seed, self._salt, epoch, "order", number)
            with isolated_generators(*own_generators(self._loader, *self._samplers), seed=seed):
                lists = iter(outer) if lists is None else lists
                block = list(islice(lists, size))
            yield block
            if len(block) < size:
                return

    def num_batches(self) -> int | None:
        """Index lists per epoch; None if the sampler has no length."""
        return length(self._samplers[0])

    def names(self) -> list[str]:
        """Classes of the samplers, outermost first."""
        return [type(sampler).__qualname__ for sampler in self._samplers]

    def capture(self, *, epoch_complete: bool) -> object | None:
        """What the samplers themselves remember, None if nothing."""
        now = [_plain_attributes(sampler) for sampler in self._samplers]
        for before, after, counters in zip(self._before, now, self._counters, strict=False):
            counters.update(name for name, value in after.items() if before.get(name, value) != value)
        kept = now if epoch_complete or not self._before else self._before
        states: list[dict[str, Any]] = []
        for sampler, values, counters in zip(self._samplers, kept, self._counters, strict=True):
            state = {name: values[name] for name in sorted(counters) if name in values}
            if is_stateful(sampler):
                state["state_dict"] = (
                    values["state_dict"] if "state_dict" in values else copy.deepcopy(sampler.state_dict())
                )
            states.append(state)
        return states if any(states) else None

    def restore(self, state: object) -> None:
        """The way back of `capture`."""
        assert isinstance(state, list)
        for sampler, values, counters in zip(self._samplers, state, self._counters, strict=True):
            for name, value in values.items():
                if name == "state_dict":
                    sampler.load_state_dict(value)
                else:
                    setattr(sampler, name, value)
                    counters.add(name)

    def beginning(self) -> object:
        """All that the samplers keep, before they have been iterated over: which of it will move is not known yet."""
        return [
            {
                **_plain_attributes(sampler),
                **({"state_dict": copy.deepcopy(sampler.state_dict())} if is_stateful(sampler) else {}),
            }
            for sampler in self._samplers
        ]

    def begin_again(self, beginning: object) -> None:
        """The way back of `beginning`."""
        assert isinstance(beginning, list)
        for sampler, values in zip(self._samplers, copy.deepcopy(beginning), strict=True):
            for name, value in values.items():
                if name == "state_dict":
                    sampler.load_state_dict(value)
                elif getattr(sampler, name, value) != value:
                    setattr(sampler, name, value)


def _nested(loader: DataLoader[Any]) -> list[Any]:
    """The batch sampler (or sampler) of a loader and the samplers inside it."""
    found: list[Any] = []
    sampler: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    while sampler is not None and not any(sampler is other for other in found):
        found.append(sampler)
        sampler = getattr(sampler, "sampler", None)
    return found


def _without_first(blocks: Iterator[list[Any]], number: int) -> Iterator[list[Any]]:
    for block in blocks:
        if number < len(block):
            yield block[number:] if number else block
        number = max(0, number - len(block))


def is_stateful(thing: Any) -> bool:
    """Whether something saves and loads its own state."""
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def _plain_attributes(sampler: Any) -> dict[str, Any]:
    values = getattr(sampler, "__dict__", {})
    return {name: value for name, value in values.items() if type(value) in (int, float, bool, str)}
