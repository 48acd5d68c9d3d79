"""Data-loader workers, shielded from signals that are meant for the trainer.

Ctrl-C goes to the whole process group, and some service managers signal every process of a unit:
a worker that dies of it takes the trainer's chance to save with it. So workers ignore SIGINT and
SIGUSR1, and the first SIGTERM; the second ends them, so that DataLoader's and multiprocessing's own
`terminate()` still work on a worker that hangs. A worker whose trainer was killed leaves by itself
(torch's workers look for their parent every few seconds).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_SHIELDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Signals wait while workers are made: a child inherits the mask until it has its own handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class WorkerStart:
    """A `worker_init_fn` that shields the worker and then calls the user's; picklable if that is."""

    users: Callable[[int], None] | None
    _seen: list[int] = field(default_factory=list)

    def __call__(self, worker: int) -> None:
        """Called in the worker before it fetches anything."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SHIELDED)
        if self.users is not None:
            self.users(worker)

    def _on_term(self, number: int, frame: FrameType | None) -> Any:
        if self._seen:
            os._exit(128 + number)
        self._seen.append(number)
