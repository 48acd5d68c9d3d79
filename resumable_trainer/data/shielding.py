"""Data-loader workers, shielded from signals that are meant for the trainer.

Ctrl-C goes to the whole process group, and some service managers signal every process of a unit: a
worker that dies of it takes the trainer's chance to save with it. So workers ignore SIGINT and
SIGUSR1, and the first SIGTERM; the second ends them, so that DataLoader's and multiprocessing's own
`terminate()` still work, the two together, on a worker that hangs.

A worker whose trainer was killed must not stay. On Linux the kernel kills it at once; elsewhere it
leaves when torch's watchdog looks for the parent, every five seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

import torch.multiprocessing
from torch.utils.data import get_worker_info

from resumable_trainer.data.randomness import generators_of_dataset, seed_generators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from torch.utils.data import DataLoader

_SHIELDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


def start_method(loader: DataLoader[object]) -> str:
    """How a loader's workers come to be: "fork", "spawn" or "forkserver"."""
    method: str = (loader.multiprocessing_context or torch.multiprocessing).get_start_method()
    return method


@contextlib.contextmanager
def signals_held_back(*, start_method: str) -> Iterator[None]:
    """Signals wait while workers are made: a child inherits the mask until it has its own handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
    if start_method != "fork":
        # Started here, the tracker inherits the mask for good; starting it unblocks signals behind our back.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class WorkerStart:
    """A `worker_init_fn` that shields the worker and then calls the user's; picklable if that is.

    Attributes:
        users: The user's `worker_init_fn`.
        parent: Process that the worker is a child of; None if that is not the trainer (forkserver).
        with_parent: Whether the kernel may end the worker with the thread that made it.
    """

    users: Callable[[int], None] | None
    parent: int | None
    with_parent: bool
    _seen: list[int] = field(default_factory=list)

    @classmethod
    def for_loader(cls, loader: DataLoader[object], users: Callable[[int], None] | None) -> WorkerStart:
        """For workers that this thread is about to make."""
        parent = None if start_method(loader) == "forkserver" else os.getpid()
        return cls(users, parent, with_parent=threading.current_thread() is threading.main_thread())

    def __call__(self, worker: int) -> None:
        """Called in the worker before it fetches anything."""
        self._shield()
        if self.with_parent:
            self._end_with_parent()
        info = get_worker_info()
        assert info is not None
        users_dataset = getattr(info.dataset, "users_dataset", info.dataset)
        object.__setattr__(info, "dataset", users_dataset)  # what the user's function expects to find there
        seed_generators(generators_of_dataset(users_dataset), info.seed)
        if self.users is not None:
            self.users(worker)

    def _shield(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SHIELDED)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        if self._seen:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)  # die of it: the trainer sees the true reason
        self._seen.append(number)

    def _end_with_parent(self) -> None:
        """Torch's watchdog alone is not enough: it waits behind a fetch, and behind a full result queue for ever."""
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            # Crash here: a parent killed before that call is noticed by this one.
            if self.parent is not None and os.getppid() != self.parent:
                os._exit(1)
