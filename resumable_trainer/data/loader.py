"""A map-style DataLoader, as the user wrote it, resumable within an epoch.

The user's loader is read, not run: an inner DataLoader with the same dataset, collate function,
workers and memory settings is fed with the index lists that are still to come. Their order is the
user's sampler or batch sampler run to its end, with every generator it may draw from seeded from
(seed, salt, epoch). Before each sample the generators are seeded from (seed, salt, epoch, index): an
augmentation is the same in any worker, before and after a resume.

Cost: the index lists of one epoch; in the training process the seeding of each sample (7 us) and the
keeping of the global generators once per batch (70 us).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from resumable_trainer.data.order import mix
from resumable_trainer.data.randomness import (
    isolated_generators,
    own_generators,
    seed_all,
    seed_generators,
    seeded_for_a_while,
)
from resumable_trainer.data.sequences import num_samples
from resumable_trainer.data.shielding import WorkerStart, signals_held_back

if TYPE_CHECKING:
    from collections.abc import Iterator


class _SeededDataset(torch.utils.data.Dataset[Any]):
    """The user's dataset, with the generators seeded before each sample."""

    def __init__(self, dataset: Any, seed: int, salt: str) -> None:
        self._dataset, self._seed, self._salt = dataset, seed, salt
        self._generators = own_generators(dataset)

    def __getitem__(self, tagged: tuple[int, Any]) -> Any:
        """One sample, of a loader without automatic batches."""
        epoch, index = tagged
        self._seed_for(epoch, index)
        return self._dataset[index]

    def __getitems__(self, tagged: tuple[int, list[Any]]) -> Any:
        """The samples of one batch."""
        epoch, indices = tagged
        users = getattr(self._dataset, "__getitems__", None)
        if users:
            self._seed_for(epoch, *indices)
            return users(indices)
        samples = []
        for index in indices:
            self._seed_for(epoch, index)
            samples.append(self._dataset[index])
        return samples

    def _seed_for(self, epoch: int, *indices: Any) -> None:
        keys = (index if isinstance(index, int) else repr(index) for index in indices)
        value = mix(self._seed, self._salt, epoch, *keys)
        seed_all(value)
        if self._generators:
            seed_generators(self._generators, value)


class _Handed:
    """The batch sampler of the inner loader: hands out what was laid before it."""

    def __init__(self) -> None:
        self.lists: Iterator[tuple[int, Any]] = iter(())

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self.lists


class LoaderSource:
    """Batches of a map-style DataLoader.

    Args:
        loader: The user's loader; not changed.
        seed: Seed of the run.
        salt: Keeps apart what training and evaluation draw.
    """

    skip_cost: str | None = None

    def __init__(self, loader: DataLoader[Any], *, seed: int, salt: str = "train") -> None:
        self._loader, self._seed, self._salt = loader, seed, salt
        self._handed = _Handed()
        self._base_seed = torch.Generator()
        self._inner = self._make_inner()
        self._samplers = _chain(loader)
        self._before: list[dict[str, Any]] = []  # samplers' own state as the epoch under way began
        self._counters: list[set[str]] = [set() for _ in self._samplers]

    def _make_inner(self) -> DataLoader[Any]:
        loader = self._loader
        feed: dict[str, Any] = {"batch_sampler": self._handed}
        if loader.batch_sampler is None:
            feed = {"batch_size": None, "sampler": self._handed}
        return DataLoader(
            _SeededDataset(loader.dataset, self._seed, self._salt),
            **feed,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=WorkerStart(loader.worker_init_fn) if loader.num_workers else None,
            multiprocessing_context=loader.multiprocessing_context,
            generator=self._base_seed,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            in_order=getattr(loader, "in_order", True),
        )

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches from number `start` of the epoch on; no sample before them is loaded."""
        lists = self._order(epoch)
        for _ in range(start):
            if next(lists, None) is None:
                break
        self._handed.lists = ((epoch, indices) for indices in lists)
        self._base_seed.manual_seed(mix(self._seed, self._salt, epoch, "workers"))
        with isolated_generators(), signals_held_back():
            iterator = iter(self._inner)
        return self._in_workers(iterator) if self._loader.num_workers else self._here(iterator)

    def _in_workers(self, iterator: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from iterator
        finally:
            if not self._loader.persistent_workers:
                _shut_down(iterator)

    def _here(self, iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            with isolated_generators():
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def _order(self, epoch: int) -> Iterator[Any]:
        """Index lists (single indices without automatic batches) of an epoch, from its beginning."""
        self._before = [_plain_attributes(sampler) for sampler in self._samplers]
        for sampler, before in zip(self._samplers, self._before, strict=True):
            if _is_stateful(sampler):
                before["state_dict"] = sampler.state_dict()
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)
        if _length(self._samplers[0]) is None:
            return self._drawn_lazily(epoch)
        with isolated_generators(), seeded_for_a_while(self._generators(), self._epoch_seed(epoch)):
            seed_all(self._epoch_seed(epoch))
            return iter(list(self._samplers[0]))

    def _drawn_lazily(self, epoch: int) -> Iterator[Any]:
        """For a sampler that may never end: drawn list by list, its generators swapped in each time."""
        seed = self._epoch_seed(epoch)
        with contextlib.ExitStack() as stack:
            stack.enter_context(seeded_for_a_while(self._generators(), seed))
            state: Any = None
            iterator: Iterator[Any] | None = None
            while True:
                with isolated_generators():
                    if state is None:
                        seed_all(seed)
                    else:
                        _restore_globals(state)
                    try:
                        if iterator is None:
                            iterator = iter(self._samplers[0])
                        indices = next(iterator)
                    except StopIteration:
                        return
                    state = _keep_globals()
                yield indices

    def _generators(self) -> list[Any]:
        return own_generators(self._loader, *self._samplers)

    def _epoch_seed(self, epoch: int) -> int:
        return mix(self._seed, self._salt, epoch)

    def num_batches(self) -> int | None:
        """Batches per epoch; None if the sampler has no length."""
        return _length(self._loader)

    def describe(self) -> str:
        """For the banner."""
        samples, batches = _length(self._loader.dataset), self.num_batches()
        workers = f", {self._loader.num_workers} workers" if self._loader.num_workers else ""
        return f"{samples} samples, {batches} batches of {self._loader.batch_size or 'any size'}{workers}"

    def fingerprint(self) -> dict[str, Any]:
        """What the order and content of the batches depend on; not the number of workers."""
        return {
            "dataset": type(self._loader.dataset).__qualname__,
            "samples": _length(self._loader.dataset),
            "batch_size": self._loader.batch_size,
            "drop_last": self._loader.drop_last,
            "samplers": [type(sampler).__qualname__ for sampler in self._samplers],
        }

    def capture(self, *, epoch_complete: bool) -> object | None:
        """What the samplers themselves keep: their state_dict, and counters that iterating moves.

        Within an epoch, as it was when the epoch began: the order is drawn again from there.
        """
        now = [_plain_attributes(sampler) for sampler in self._samplers]
        for before, after, counters in zip(self._before, now, self._counters, strict=False):
            counters.update(name for name, value in after.items() if before.get(name, value) != value)
        kept = now if epoch_complete or not self._before else self._before
        states: list[dict[str, Any]] = []
        for sampler, values, counters in zip(self._samplers, kept, self._counters, strict=True):
            state = {name: values[name] for name in sorted(counters) if name in values}
            if _is_stateful(sampler):
                fresh = epoch_complete or "state_dict" not in values
                state["state_dict"] = sampler.state_dict() if fresh else values["state_dict"]
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

    def weight(self, batch: Any) -> int:
        """Samples in a batch, as far as can be seen."""
        return num_samples(batch)

    def close(self) -> None:
        """End persistent workers."""
        iterator = getattr(self._inner, "_iterator", None)
        if iterator is not None:
            _shut_down(iterator)
            self._inner._iterator = None


def _chain(loader: DataLoader[Any]) -> list[Any]:
    """The batch sampler (or sampler) of a loader and the samplers inside it."""
    found: list[Any] = []
    sampler: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    while sampler is not None and len(found) < 5:
        found.append(sampler)
        sampler = getattr(sampler, "sampler", None)
    return found


def _is_stateful(sampler: Any) -> bool:
    return callable(getattr(sampler, "state_dict", None)) and callable(getattr(sampler, "load_state_dict", None))


def _plain_attributes(sampler: Any) -> dict[str, Any]:
    values = getattr(sampler, "__dict__", {})
    return {name: value for name, value in values.items() if type(value) in (int, float, bool, str)}


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _keep_globals() -> Any:
    import random

    import numpy as np

    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()


def _restore_globals(state: Any) -> None:
    import random

    import numpy as np

    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.default_generator.set_state(state[2])


def _shut_down(iterator: Any) -> None:
    """End the workers now, not when the garbage collector comes by."""
    end = getattr(iterator, "_shutdown_workers", None)
    if end is not None:
        end()
