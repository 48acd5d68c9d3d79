"""The inner DataLoader that works for the user's: made, started, and ended with all its workers."""

from __future__ import annotations

import atexit
import os
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from resumable_trainer.data.shielding import WorkerStart, signals_held_back, start_method
from resumable_trainer.data.stateless import length

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_live: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # iterators with workers -> our process


def inner_loader(
    loader: DataLoader[Any], dataset: Any, feed: Mapping[str, Any], *, persistent_workers: bool
) -> DataLoader[Any]:
    """A loader like the user's, but for its dataset, its samplers and its source of seeds.

    Args:
        loader: The user's loader.
        dataset: What takes the place of its dataset.
        feed: Arguments that take the place of its samplers.
        persistent_workers: Whether workers outlive the epoch.
    """
    with warnings.catch_warnings():
        # The user's own loader has said it, once is enough.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        return DataLoader(
            dataset,
            **feed,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory and torch.accelerator.is_available(),
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=persistent_workers,
        )


def started(inner: DataLoader[Any], *, users: Any, base_seed: int) -> Iterator[Any]:
    """The iterator of one epoch, its workers (if any) made, shielded, and at work.

    Args:
        inner: From `inner_loader`.
        users: The user's `worker_init_fn`.
        base_seed: What workers are seeded from; nothing is drawn from the global generators.
    """
    inner.generator.manual_seed(base_seed)
    if not inner.num_workers:
        return iter(inner)
    inner.worker_init_fn = WorkerStart.for_loader(inner, users)
    with warnings.catch_warnings(), signals_held_back(start_method=start_method(inner)):
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        iterator = iter(inner)
    _live[iterator] = os.getpid()
    return iterator


def end_workers(iterator: Any) -> None:
    """End the workers and the pinning thread of an iterator now, not when the garbage collector comes by."""
    end = getattr(iterator, "_shutdown_workers", None)
    if end is not None:
        end()


def abandon_workers(iterator: Any) -> None:
    """Kill the workers of an iterator whose batches nobody will want: the wait for one was broken off.

    Torch's own way waits five seconds for each worker that is within a load, and five more after its SIGTERM:
    the time that a notice leaves may be over before the state is saved. A worker killed at any instant
    may hold a queue's lock, so nothing is put into a queue any more, either.
    """
    if getattr(iterator, "_shutdown", True):
        return
    iterator._shutdown = True  # torch's own way has nothing left to do
    if iterator._worker_pids_set:  # else torch's handler of SIGCHLD takes their end for a crash
        signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
        iterator._worker_pids_set = False
    if hasattr(iterator, "_pin_memory_thread_done_event"):
        iterator._pin_memory_thread_done_event.set()  # a daemon, which looks at it every five seconds
    for queue in [iterator._worker_result_queue, *iterator._index_queues]:
        queue.cancel_join_thread()
    for worker in iterator._workers:
        worker.kill()
    for worker in iterator._workers:
        worker.join()


@atexit.register
def _end_all() -> None:
    """End what an exception on its way out of the program still holds.

    Invariant: runs before multiprocessing's own exit function, which sends a single SIGTERM (a
    shielded worker ignores it) and then waits without end. Later registered, earlier called.
    """
    for iterator, process in list(_live.items()):
        if process == os.getpid():
            end_workers(iterator)


def describe(loader: DataLoader[Any], num_batches: int | None) -> str:
    """A loader in a few words, for the banner."""
    samples = length(loader.dataset)
    parts = [] if samples is None else [f"{samples} samples"]
    size = f"of {loader.batch_size}" if loader.batch_size else ""
    parts.append(f"{'batches' if num_batches is None else f'{num_batches} batches'} {size}".rstrip())
    if loader.num_workers:
        parts.append(f"{loader.num_workers} workers")
    return ", ".join(parts)
