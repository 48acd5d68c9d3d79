"""Batches of tensors, gathered whole with `index_select`, never one sample at a time.

Cost: one kernel per tensor and batch. Against a DataLoader over a TensorDataset, which fetches
sample by sample, that is an order of magnitude less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data._utils.collate import default_collate

from resumable_trainer.data.order import permutation
from resumable_trainer.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class TensorSource:
    """Batches of tensors that share their first dimension.

    Args:
        tensors: One or more tensors of shape [n, ...], on any device.
        seed: Seed of the run.
        batch_size: Samples per batch.
        shuffle: Whether each epoch has an order of its own.
        drop_last: Whether a short last batch is left out.
        salt: Keeps apart what training and evaluation draw.
        wrap: Makes a batch of the gathered tensors; `tuple` by default.

    Raises:
        SettingsError: No tensors, different lengths, no data, an illegal batch size.
    """

    skip_cost: str | None = None

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        seed: int,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        salt: str = "train",
        wrap: Callable[[Sequence[torch.Tensor]], Any] = tuple,
    ) -> None:
        _check(tensors, batch_size)
        self._tensors = list(tensors)
        self._num_samples = len(tensors[0])
        self._seed, self._salt = seed, salt
        self._batch_size, self._shuffle, self._drop_last = batch_size, shuffle, drop_last
        self._wrap = wrap

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches from number `start` of the epoch on."""
        if self._shuffle:
            return self._gathered(epoch, start)
        return self._sliced(start)

    def _gathered(self, epoch: int, start: int) -> Iterator[Any]:
        order = permutation(self._num_samples, seed=self._seed, epoch=epoch, salt=self._salt)
        devices = {tensor.device for tensor in self._tensors}
        orders = {device: order.to(device) for device in devices}
        plan = [(tensor.index_select, orders[tensor.device]) for tensor in self._tensors]
        wrap, size = self._wrap, self._batch_size
        for begin in range(start * size, self._end(), size):
            yield wrap([select(0, indices[begin : begin + size]) for select, indices in plan])

    def _sliced(self, start: int) -> Iterator[Any]:
        """In order. Copies: a loop that changes a batch in place must not change the data."""
        wrap, size = self._wrap, self._batch_size
        for begin in range(start * size, self._end(), size):
            yield wrap([tensor[begin : begin + size].clone() for tensor in self._tensors])

    def _end(self) -> int:
        return self.num_batches() * self._batch_size if self._drop_last else self._num_samples

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
            "shapes": [list(tensor.shape[1:]) for tensor in self._tensors],
            "dtypes": [str(tensor.dtype) for tensor in self._tensors],
            "content": _content_digest(self._tensors),
        }

    def capture(self, *, epoch_complete: bool) -> object | None:
        """Nothing: the order is a function of (seed, epoch)."""
        return None

    def restore(self, state: object) -> None:
        """Nothing to do."""

    def weight(self, batch: Any) -> int:
        """Samples in a batch."""
        return len(batch if isinstance(batch, torch.Tensor) else batch[0])

    def close(self) -> None:
        """Nothing to do."""


_DIGEST_ROWS = 64


def _content_digest(tensors: Sequence[torch.Tensor]) -> str:
    """Digest of rows spread over the data: enough to tell another data set, cheap for any size."""
    import numpy as np

    from resumable_trainer.durable.digest import Digest

    digest = Digest()
    count = len(tensors[0])
    rows = np.unique(np.linspace(0, count - 1, min(count, _DIGEST_ROWS)).astype(np.int64))
    for tensor in tensors:
        picked = tensor.detach().index_select(0, torch.from_numpy(rows).to(tensor.device))
        digest.update(picked.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.value().digest[:16]


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


def from_loader(loader: DataLoader[Any], *, seed: int, salt: str) -> TensorSource | None:
    """A DataLoader that only does what gathering does, done by gathering; None for any other one.

    The batches are the same to the bit; they come as lists, as from the default collate function.
    """
    plain = (
        type(loader) is DataLoader
        and type(loader.dataset) is TensorDataset
        and loader.num_workers == 0
        and loader.collate_fn is default_collate
        and loader.batch_size is not None
        and type(loader.sampler) in (RandomSampler, SequentialSampler)
        and not loader.pin_memory
    )
    if not plain or not len(loader.dataset) or _draws_unusually(loader.sampler):  # type: ignore[arg-type]
        return None
    return TensorSource(
        loader.dataset.tensors,  # type: ignore[attr-defined]
        seed=seed,
        batch_size=loader.batch_size,  # type: ignore[arg-type]
        shuffle=type(loader.sampler) is RandomSampler,
        drop_last=loader.drop_last,
        salt=salt,
        wrap=list,
    )


def _draws_unusually(sampler: object) -> bool:
    """A RandomSampler with replacement, or of another number of samples than there are."""
    if not isinstance(sampler, RandomSampler):
        return False
    return sampler.replacement or sampler.num_samples != len(sampler.data_source)
