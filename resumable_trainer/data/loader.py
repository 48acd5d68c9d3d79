"""A DataLoader as the user wrote it, resumable within an epoch.

The user's loader is read, not run: an inner DataLoader with the same dataset, collate function,
workers and memory settings is fed with the index lists that are still to come (see `samplers.py`).
Before each sample the generators are seeded from (seed, salt, epoch, index): an augmentation is the
same in any worker, before and after a resume. Batches always come in order (`in_order=False` would
hand them out as workers happen to finish).

Cost in the training process: 9 us for each sample, 40 us for each batch. Workers pay only the 9 us.
A loader that does no more than gather rows of a TensorDataset, or of a Subset of one, is replaced by
gathering: the same batches, without the cost.
"""

from __future__ import annotations

import operator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset, TensorDataset
from torch.utils.data._utils.collate import default_collate

from resumable_trainer.data.gather import content, gathered
from resumable_trainer.data.inner import abandon_workers, describe, end_workers, inner_loader, started
from resumable_trainer.data.order import mix
from resumable_trainer.data.randomness import (
    each_apart,
    generators_of_dataset,
    isolated_generators,
    seed_all,
    seed_generators,
)
from resumable_trainer.data.samplers import SamplerOrder
from resumable_trainer.data.stateless import Stateless, length

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = 1024  # batches whose row numbers become a tensor at once


class SeededDataset(Dataset[Any]):
    """The user's dataset, with the generators seeded before each sample.

    Indices come with the seed of their epoch, since persistent workers outlive it.
    """

    def __init__(self, dataset: Any) -> None:
        self.users_dataset = dataset

    def __getitem__(self, task: tuple[int, Any]) -> Any:
        """One sample, of a loader without automatic batches."""
        epoch_seed, index = task
        return self._sample(epoch_seed, index, generators_of_dataset(self.users_dataset))

    def __getitems__(self, task: tuple[int, list[Any]]) -> Any:
        """The samples of one batch."""
        epoch_seed, indices = task
        # Looked up for each batch: a worker_init_fn or the dataset itself may make new ones.
        generators = generators_of_dataset(self.users_dataset)
        if _gets_batches(self.users_dataset):
            _seed(mix(epoch_seed, *map(_key, indices)), generators)
            return self.users_dataset.__getitems__(indices)
        return [self._sample(epoch_seed, index, generators) for index in indices]

    def _sample(self, epoch_seed: int, index: Any, generators: list[Any]) -> Any:
        _seed(mix(epoch_seed, _key(index)), generators)
        return self.users_dataset[index]


def _seed(value: int, generators: list[Any]) -> None:
    seed_all(value)
    seed_generators(generators, value)


def _key(index: Any) -> int | str:
    """An index as part of a seed: NumPy's and torch's integers count as Python's."""
    if isinstance(index, str):
        return index
    try:
        return operator.index(index)
    except TypeError:
        return repr(index)


def _gets_batches(dataset: Any) -> bool:
    """Whether whole batches are fetched by the dataset's own `__getitems__`.

    A Subset has one that only passes on what the inner dataset has; where that has none, samples are
    fetched and seeded one by one, so that batches of another make-up get the same samples.
    """
    if type(dataset) is Subset:
        return _gets_batches(dataset.dataset)
    return bool(getattr(dataset, "__getitems__", None))


class _Tasks:
    """The sampler of an inner loader: hands out what was laid before it."""

    def __init__(self) -> None:
        self.waiting: Iterator[tuple[int, Any]] = iter(())

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self.waiting


class LoaderSource(Stateless):
    """Batches of a map-style DataLoader.

    Args:
        loader: The user's loader; not changed.
        seed: Seed of the run.
        salt: Keeps apart what training and evaluation draw.
    """

    finds_place = True

    def __init__(self, loader: DataLoader[Any], *, seed: int, salt: str = "train") -> None:
        self._loader, self._seed, self._salt = loader, seed, salt
        self._order = SamplerOrder(loader, seed=seed, salt=salt)
        self._tasks = _Tasks()
        self._broken_off: Iterator[Any] | None = None
        feed: dict[str, Any] = {"batch_sampler": self._tasks}
        if loader.batch_sampler is None:
            feed = {"batch_size": None, "sampler": self._tasks}
        # One inner loader for all epochs, so that persistent workers persist.
        self._inner = inner_loader(
            loader, SeededDataset(loader.dataset), feed, persistent_workers=loader.persistent_workers
        )

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches from number `start` of the epoch on; no sample before them is loaded."""
        epoch_seed = mix(self._seed, self._salt, epoch)
        lists = chain.from_iterable(self._order.blocks(epoch, start))
        self._tasks.waiting = ((epoch_seed, indices) for indices in lists)
        iterator = started(self._inner, users=self._loader.worker_init_fn, base_seed=epoch_seed)
        return self._from_workers(iterator) if self._loader.num_workers else self._from_here(iterator, epoch_seed)

    def _from_workers(self, iterator: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from iterator
        except (Exception, GeneratorExit):
            self._end(iterator)
            raise
        except BaseException:
            # A notice has broken off the wait: the state is saved first, then they are killed.
            self._broken_off = iterator
            raise
        self._end(iterator)

    def _end(self, iterator: Iterator[Any]) -> None:
        if not self._loader.persistent_workers:
            end_workers(iterator)

    def _from_here(self, iterator: Iterator[Any], epoch_seed: int) -> Iterator[Any]:
        while True:
            # Invariant: what samples and the collate function draw here moves no generator of the
            # training's, or 0 and 2 workers would differ.
            with isolated_generators(*generators_of_dataset(self._loader.dataset), seed=epoch_seed):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def num_batches(self) -> int | None:
        """Batches per epoch; None if the sampler has no length."""
        return self._order.num_batches()

    def describe(self) -> str:
        """For the banner."""
        return describe(self._loader, self.num_batches())

    def fingerprint(self) -> dict[str, Any]:
        """What the order and content of the batches depend on; not the number of workers."""
        dataset = self._loader.dataset
        facts = {
            "dataset": type(dataset).__qualname__,
            "samples": length(dataset),
            "batch_size": self._loader.batch_size,
            "drop_last": self._loader.drop_last,
            "samplers": self._order.names(),
        }
        whole = _whole(dataset)
        return {**facts, **content(whole.tensors)} if type(whole) is TensorDataset else facts

    def capture(self, *, epoch_complete: bool) -> object | None:
        """What the samplers themselves remember; None if nothing."""
        return self._order.capture(epoch_complete=epoch_complete)

    def restore(self, state: object) -> None:
        """The way back of `capture`."""
        self._order.restore(state)

    def beginning(self) -> object | None:
        """What the samplers keep before the first epoch."""
        return self._order.beginning()

    def begin_again(self, beginning: object) -> None:
        """The way back of `beginning`."""
        self._order.begin_again(beginning)

    def close(self) -> None:
        """End persistent workers, and those of a wait that was broken off."""
        broken_off, self._broken_off = self._broken_off, None
        abandon_workers(broken_off)
        iterator, self._inner._iterator = self._inner._iterator, None
        end_workers(iterator)


class GatheringSource(LoaderSource):
    """Batches of a DataLoader that does no more than gather rows of a TensorDataset or a Subset of one."""

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches from number `start` of the epoch on: the same bytes, and lists as from default_collate."""
        return self._gathered(self._order.blocks(epoch, start))

    def _gathered(self, blocks: Iterator[list[list[int]]]) -> Iterator[Any]:
        tensors = _whole(self._loader.dataset).tensors
        finish = _pinned if self._inner.pin_memory else list
        for block in blocks:
            lists = iter(block)
            while some := list(islice(lists, _BLOCK)):
                rows = _rows(self._loader.dataset, torch.tensor(list(chain.from_iterable(some))))
                yield from map(finish, gathered(tensors, rows, [len(indices) for indices in some]))


def only_gathers(loader: DataLoader[Any]) -> bool:
    """Whether gathering can stand in for a loader."""
    return (
        type(_whole(loader.dataset)) is TensorDataset
        and loader.num_workers == 0
        and loader.collate_fn is default_collate
        and type(loader.batch_sampler) is BatchSampler
        and len(loader.dataset) > 0  # type: ignore[arg-type]
    )


def _whole(dataset: Any) -> Any:
    """The dataset under a Subset, a Subset of a Subset (random_split makes them), and so on."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def _rows(dataset: Any, indices: torch.Tensor) -> torch.Tensor:
    """Row numbers of a TensorDataset that indices of a dataset over it stand for; -1 is understood, too."""
    indices = torch.where(indices < 0, indices + len(dataset), indices)
    if type(dataset) is Subset:
        return _rows(dataset.dataset, torch.tensor(list(dataset.indices))[indices])
    return indices


def _pinned(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [tensor.pin_memory() if tensor.device.type == "cpu" else tensor for tensor in tensors]


class StreamSource(Stateless):
    """Batches of a DataLoader over an IterableDataset, which can only be read from its beginning.

    Its workers are made anew for each epoch, even if the loader asks for persistent ones: a stream
    that goes on where the last epoch left it could not be found again.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int, salt: str = "train") -> None:
        self._loader, self._seed, self._salt = loader, seed, salt
        feed = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        self._inner = inner_loader(loader, loader.dataset, feed, persistent_workers=False)
        self.skip_cost = (
            f"{type(loader.dataset).__name__} can only be read from its beginning: a resume within an epoch "
            "reads and throws away every batch before its place"
        )

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches from number `start` of the epoch on, after reading those before."""
        epoch_seed = mix(self._seed, self._salt, epoch)
        generators = generators_of_dataset(self._loader.dataset)
        with isolated_generators(*generators, seed=epoch_seed):
            iterator = started(self._inner, users=self._loader.worker_init_fn, base_seed=epoch_seed)
        return self._after(self._read(iterator, epoch_seed, generators), start)

    def _read(self, iterator: Iterator[Any], epoch_seed: int, generators: list[Any]) -> Iterator[Any]:
        try:
            if self._loader.num_workers:
                yield from iterator
            else:
                yield from each_apart(iterator, epoch_seed, *generators)
        except (Exception, GeneratorExit):
            raise
        except BaseException:
            abandon_workers(iterator)
            raise
        finally:
            end_workers(iterator)

    def num_batches(self) -> int | None:
        """Batches per epoch as the loader estimates them; None if the dataset has no length."""
        return length(self._loader)

    def describe(self) -> str:
        """For the banner."""
        return f"{describe(self._loader, self.num_batches())}, read from the beginning"

    def fingerprint(self) -> dict[str, Any]:
        """What the content of the batches depends on; here the number of workers, too: each reads its share."""
        return {
            "dataset": type(self._loader.dataset).__qualname__,
            "samples": length(self._loader.dataset),
            "batch_size": self._loader.batch_size,
            "drop_last": self._loader.drop_last,
            "workers": self._loader.num_workers,
        }
