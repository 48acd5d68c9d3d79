"""From whatever the user has to a source of batches: the one place that tells kinds of data apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from resumable_trainer.data.gather import TensorSource
from resumable_trainer.data.loader import GatheringSource, LoaderSource, StreamSource, only_gathers
from resumable_trainer.data.samplers import is_stateful
from resumable_trainer.data.sequences import IterableSource, SequenceSource, StatefulSource
from resumable_trainer.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Source(Protocol):
    """Batches of one kind of data."""

    skip_cost: str | None
    passed_over: Callable[[], object]
    finds_place: bool

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches from number `start` of the epoch on."""

    def weighed(self, *, epoch: int, start: int = 0) -> Iterator[tuple[Any, int]]:
        """The same, each with its weight."""

    def num_batches(self) -> int | None:
        """Batches per epoch; None if that cannot be known."""

    def describe(self) -> str:
        """For the banner."""

    def fingerprint(self) -> dict[str, Any]:
        """What the order and content of the batches depend on, as plain values."""

    def capture(self, *, epoch_complete: bool) -> object | None:
        """State that finds the place again; None where the position alone does."""

    def restore(self, state: object) -> None:
        """The way back of `capture`, before `batches` is called."""

    def beginning(self) -> object | None:
        """All that it keeps before its first epoch; None if it keeps nothing."""

    def begin_again(self, beginning: object) -> None:
        """The way back of `beginning`, in the same process."""

    def weight(self, batch: Any) -> int:
        """Samples in a batch; 1 where that cannot be seen."""

    def close(self) -> None:
        """End workers and release what is held."""


def source_of(
    data: Any,
    *,
    seed: int,
    batch_size: int | None = None,
    shuffle: bool = False,
    drop_last: bool = False,
    salt: str = "train",
) -> Source:
    """The source for some data.

    Args:
        data: A DataLoader; tensors (one, a tuple or list of them, a TensorDataset); a sequence; an
            iterable with `state_dict()`; any other iterable.
        seed: Seed of the run.
        batch_size: Samples per batch; for tensors, and only for them.
        shuffle: Whether each epoch has an order of its own; for tensors.
        drop_last: Whether a short last batch is left out; for tensors.
        salt: Keeps apart what training and evaluation draw.

    Raises:
        SettingsError: Data that gives no batches, or settings that do not go with it.
    """
    tensors = _tensors_of(data, batch_size)
    if tensors is not None:
        if batch_size is None:
            raise SettingsError("data: tensors need a batch_size", hint="run.batches((x, y), batch_size=10)")
        bare = isinstance(data, torch.Tensor)
        return TensorSource(
            tensors, seed=seed, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, salt=salt, bare=bare
        )
    _refuse_samples(data)
    if batch_size is not None or shuffle or drop_last:
        raise SettingsError(
            f"data: batch_size, shuffle and drop_last are for tensors; {type(data).__name__} makes its own batches",
            hint="set them where it is made",
        )
    return _batched(data, seed=seed, salt=salt)


def _batched(data: Any, *, seed: int, salt: str) -> Source:
    if is_stateful(data) and is_stateful(getattr(data, "base_dataloader", data)):
        return StatefulSource(data, seed=seed, salt=salt)  # Accelerate's is in name alone unless what it wraps is, too
    if isinstance(data, DataLoader) and type(data).__iter__ is DataLoader.__iter__:
        return _of_loader(data, seed=seed, salt=salt)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, DataLoader):
        return SequenceSource(data, seed=seed, salt=salt)
    if hasattr(data, "__iter__"):
        return IterableSource(data, seed=seed, salt=salt)
    raise SettingsError(f"data: {type(data).__name__} cannot be iterated over")


def _refuse_samples(data: Any) -> None:
    """Data that could be iterated over, but would give something other than batches."""
    name = type(data).__name__
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise SettingsError(
            f"data: {name} is a dataset, which gives samples and no batches",
            hint="wrap it: DataLoader(dataset, batch_size=..., shuffle=True)",
        )
    if any(isinstance(item, np.ndarray) for item in (data if type(data) is tuple else [data])):
        raise SettingsError("data: NumPy arrays are no tensors", hint="torch.from_numpy(array) shares their memory")
    if isinstance(data, Mapping | str | bytes):
        raise SettingsError(f"data: {name} gives no batches", hint="make a list of batches, or a DataLoader, of it")


def _of_loader(loader: DataLoader[Any], *, seed: int, salt: str) -> Source:
    if isinstance(loader.dataset, IterableDataset):
        return StreamSource(loader, seed=seed, salt=salt)
    kind = GatheringSource if only_gathers(loader) else LoaderSource
    return kind(loader, seed=seed, salt=salt)


def _tensors_of(data: Any, batch_size: int | None) -> list[torch.Tensor] | None:
    """The tensors to gather from; a list without batch_size is a sequence of ready batches."""
    if isinstance(data, torch.Tensor):
        return [data]
    if type(data) is TensorDataset:
        return list(data.tensors)
    if (
        (type(data) is tuple or (type(data) is list and batch_size is not None))
        and data
        and all(isinstance(item, torch.Tensor) for item in data)
    ):
        return list(data)
    return None
