"""Batches of tensors, gathered whole with `index_select`, never one sample at a time.

Cost: one kernel per tensor and batch, and 0.1 us around them: the loop over the batches of an epoch
runs inside `zip` and `map`. Against a DataLoader over a TensorDataset, which fetches sample by sample,
that is an order of magnitude less.
"""

from __future__ import annotations

from itertools import chain, repeat
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from resumable_trainer.data.order import permutation
from resumable_trainer.data.stateless import Stateless
from resumable_trainer.durable.digest import Digest
from resumable_trainer.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_BLOCK = 1024  # batches whose index views are made at once: an epoch of millions of batches starts at once, too
_DIGEST_ROWS = 64
# torch 2.13 has no index_select for these in one dimension, and 2.8 no other way: the same bits as signed numbers.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def gathered(
    tensors: Sequence[torch.Tensor], rows: torch.Tensor, sizes: int | list[int]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Rows of tensors, batch by batch.

    Args:
        tensors: Tensors of shape [n, ...], on any devices.
        rows: int64 tensor of row numbers, on the CPU: all batches, one after the other.
        sizes: Rows of each batch; an int for equal ones (the last may be shorter).

    Returns:
        For each batch a tuple of new tensors, each on the device of the one that it comes from.
    """
    chunks = {device: torch.split(rows.to(device), sizes) for device in {tensor.device for tensor in tensors}}
    return zip(*(_rows_of(tensor, chunks[tensor.device]) for tensor in tensors), strict=True)


def _rows_of(tensor: torch.Tensor, chunks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    if (signed := _SIGNED.get(tensor.dtype)) is not None:
        return (each.view(tensor.dtype) for each in map(tensor.view(signed).index_select, repeat(0), chunks))
    return map(tensor.index_select, repeat(0), chunks)


class TensorSource(Stateless):
    """Batches of tensors that share their first dimension.

    Every batch is a copy, shuffled or not: a loop may change it in place without changing the data.

    Args:
        tensors: One or more tensors of shape [n, ...], on any device.
        seed: Seed of the run.
        batch_size: Samples per batch.
        shuffle: Whether each epoch has an order of its own.
        drop_last: Whether a short last batch is left out.
        salt: Keeps apart what training and evaluation draw.
        bare: Whether a batch is the (only) tensor itself and not a tuple.

    Raises:
        SettingsError: No tensors, different lengths, no data, an illegal batch size.
    """

    finds_place = True

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        seed: int,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        salt: str = "train",
        bare: bool = False,
    ) -> None:
        _check(tensors, batch_size)
        self._tensors = list(tensors)
        self._num_samples = len(tensors[0])
        self._seed, self._salt = seed, salt
        self._batch_size, self._shuffle, self._drop_last = batch_size, shuffle, drop_last
        self._wrap: Callable[[Any], Any] | None = itemgetter(0) if bare else None

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches from number `start` of the epoch on."""
        end = self.num_batches() * self._batch_size  # beyond the last sample if that batch is short
        order = self._order(epoch)[start * self._batch_size : end]
        if not len(order):
            return  # split would give one empty batch
        for block in torch.split(order, _BLOCK * self._batch_size):
            batches = gathered(self._tensors, block, self._batch_size)
            yield from map(self._wrap, batches) if self._wrap else batches

    def weighed(self, *, epoch: int, start: int = 0) -> Iterator[tuple[Any, int]]:
        """Batches from number `start` of the epoch on, each with its number of samples."""
        end = min(self.num_batches() * self._batch_size, self._num_samples)
        full, rest = divmod(end - start * self._batch_size, self._batch_size)
        return zip(self.batches(epoch=epoch, start=start), chain(repeat(self._batch_size, full), (rest,)), strict=False)

    def _order(self, epoch: int) -> torch.Tensor:
        if self._shuffle:
            return permutation(self._num_samples, seed=self._seed, epoch=epoch, salt=self._salt)
        return torch.arange(self._num_samples)

    def num_batches(self) -> int:
        """Batches per epoch."""
        if self._drop_last:
            return self._num_samples // self._batch_size
        return -(-self._num_samples // self._batch_size)

    def describe(self) -> str:
        """For the banner."""
        return f"{self._num_samples} samples, {self.num_batches()} batches of {self._batch_size}"

    def fingerprint(self) -> dict[str, Any]:
        """What the order and content of the batches depend on."""
        return {
            "samples": self._num_samples,
            "batch_size": self._batch_size,
            "shuffle": self._shuffle,
            "drop_last": self._drop_last,
            **content(self._tensors),
        }


def content(tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Shapes, dtypes and a digest of up to 64 rows: enough to tell another data set, cheap for any size."""
    digest = Digest()
    count = len(tensors[0])
    # Rising already, so that this drops repetitions (np.unique would import masked arrays, which takes longer).
    places = dict.fromkeys(np.linspace(0, count - 1, min(count, _DIGEST_ROWS)).astype(np.int64).tolist())
    rows = torch.tensor(list(places), dtype=torch.int64, device="cpu")
    for tensor in tensors:
        ((picked,),) = gathered([tensor.detach()], rows, len(rows))
        digest.update(picked.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {
        "shapes": [list(tensor.shape[1:]) for tensor in tensors],
        "dtypes": [str(tensor.dtype) for tensor in tensors],
        "content": digest.value().digest[:16],
    }


def _check(tensors: Sequence[torch.Tensor], batch_size: object) -> None:
    problems = []
    lengths = [tensor.shape[0] if tensor.ndim else None for tensor in tensors]
    if not tensors:
        problems.append("there are no tensors")
    elif None in lengths:
        problems.append("a tensor of no dimensions has no samples")
    elif len(set(lengths)) > 1:
        problems.append(f"tensors have {lengths} samples, they must have the same number")
    elif lengths[0] == 0:
        problems.append("there are no samples")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        problems.append(f"batch_size is {batch_size!r}, tensors need an int of at least 1")
    if problems:
        raise SettingsError(f"data: {'; '.join(problems)}", found=problems)
