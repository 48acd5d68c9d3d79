"""The sources of a run's batches, kept from epoch to epoch, and what they remember across a resume."""

from __future__ import annotations

from typing import Any

import torch

from resumable_trainer.data.sources import Source, source_of

_MAX_SOURCES = 16


class Shelf:
    """Finds the source for data, the same one each time: its workers may be persistent.

    Args:
        seed: Seed of the run.
        remembers: Whether to remember what sources kept before their first epoch, for `begin_again`.
    """

    def __init__(self, seed: int, *, remembers: bool = False) -> None:
        self._seed, self._remembers = seed, remembers
        self._beginnings: dict[int, Any] = {}  # of sources before their first epoch, by number of the loop
        self._to_begin: dict[int, Any] = {}  # those that are to be as they were then
        self._kept: dict[Any, tuple[Any, Source]] = {}
        self._in_epoch: list[Source] = []  # by number of the loop over batches within the epoch
        self._restored: dict[int, Any] = {}  # states of before a resume, not yet given back

    def source(self, data: Any, *, salt: str, **settings: Any) -> Source:
        """The source of some data; made at the first call.

        Args:
            data: Whatever the user hands over.
            salt: "train" or "evaluating".
            settings: As for `source_of`.
        """
        if salt == "evaluating" and settings.get("batch_size") is None:
            settings["batch_size"] = _whole_size(data)
        key = (salt, _identity(data, settings.get("batch_size")), *sorted(settings.items()))
        if key not in self._kept:
            source = source_of(data, seed=self._seed, salt=salt, **settings)
            self._kept[key] = (data, source)  # the data too: while they live, nothing else has their id
            self._forget_oldest()
        self._kept[key] = self._kept.pop(key)  # the newest used last
        return self._kept[key][1]

    def _forget_oldest(self) -> None:
        """A script that makes its data anew each epoch must not keep all of them alive."""
        idle = [key for key, (_, source) in self._kept.items() if source not in self._in_epoch]
        if len(idle) > _MAX_SOURCES:
            self._kept.pop(idle[0])[1].close()

    def take_up(self, source: Source, number: int) -> None:
        """The epoch's loop `number` runs over this source; it gets back what it knew before a resume."""
        del self._in_epoch[number:]
        self._in_epoch.append(source)
        if number in self._to_begin:
            source.begin_again(self._to_begin.pop(number))
        elif self._remembers and number not in self._beginnings:
            self._beginnings[number] = source.beginning()
        state = self._restored.pop(number, None)
        if state is not None:
            source.restore(state)

    def state(self, *, under_way: int | None) -> list[list[Any]]:
        """[number of the loop, state] of every source that keeps its own place.

        Args:
            under_way: Number of the loop that is within its batches; the state of the others is that
                of a complete epoch.
        """
        captured = []
        for number, source in enumerate(self._in_epoch):
            state = source.capture(epoch_complete=number != under_way)
            if state is not None:
                captured.append([number, state])
        return captured

    def load_state(self, state: list[list[Any]]) -> None:
        """The way back of `state`; each source gets its own when its loop begins."""
        self._restored = {number: source for number, source in state}  # noqa: C416 - pairs are lists

    def begin_again(self) -> None:
        """End workers, and let each source be as it was before its first epoch when its loop begins."""
        self.close()
        self._to_begin = {number: state for number, state in self._beginnings.items() if state is not None}

    def close(self) -> None:
        """End workers and forget everything."""
        for _, source in self._kept.values():
            source.close()
        self._kept.clear()
        self._in_epoch.clear()


def _identity(data: Any, batch_size: int | None) -> Any:
    """Tensors are known by themselves: a tuple of them is often made anew each epoch."""
    if type(data) is tuple or (type(data) is list and batch_size is not None):
        return tuple(map(id, data))
    return id(data)


def _whole_size(data: Any) -> int | None:
    """Number of samples of tensors that are to be evaluated in one batch; None for other data."""
    first = data.tensors[0] if isinstance(data, torch.utils.data.TensorDataset) else data
    if type(data) is tuple and data:
        first = data[0]
    return max(1, len(first)) if isinstance(first, torch.Tensor) and first.ndim else None
