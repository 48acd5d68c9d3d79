"""The process of one arm: `python -m benchmarks.worker MODULE:FUNCTION SETTINGS THREADS FD_IN FD_OUT`.

The function runs its training as it always would, and calls `laps()` at the beginning of each epoch. There the process
waits until it is asked for a turn: one epoch that is not timed (a snapshot of the epoch before may still be on its way
to the disk, and caches are another arm's), then the epochs that are. Whatever happens from the beginning of one epoch
to the beginning of the next counts.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from typing import Any, Literal


class Laps:
    """Called at the beginning of each epoch.

    Args:
        asked: File descriptor on which turns are asked for.
        tell: File descriptor on which is answered.
    """

    def __init__(self, asked: int, tell: int) -> None:
        self._asked, self._tell = os.fdopen(asked), os.fdopen(tell, "w")
        self._phase: Literal["warmup", "untimed", "timed"] = "warmup"
        self._calls_left = 1  # until the phase is over
        self._epochs = 1
        self._started = 0.0
        self._info: dict[str, Any] = {}

    def plan(self, *, epochs: int, warmup: int = 1, **info: Any) -> None:
        """How many epochs a turn has, and how many come before the first turn; `info` is told when ready."""
        self._epochs, self._calls_left, self._info = epochs, warmup + 1, info

    def __call__(self) -> None:
        """Count, and wait for a turn where one has ended."""
        now = time.perf_counter()
        self._calls_left -= 1
        if self._calls_left:
            return
        if self._phase == "untimed":
            self._phase, self._calls_left = "timed", self._epochs
            self._started = time.perf_counter()
            return
        self.turn((now - self._started) / self._epochs if self._phase == "timed" else self._info)
        self._phase, self._calls_left = "untimed", 1

    def turn(self, found: Any) -> None:
        """Tell what was found, and wait until the next turn is asked for."""
        self._tell.write(json.dumps(found) + "\n")
        self._tell.flush()
        if not self._asked.readline():
            os._exit(0)  # who asked is gone
        gc.collect()


def main() -> None:
    """Pin the threads, then do what was asked."""
    target, settings, threads, asked, tell = sys.argv[1:]
    import torch

    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    module, _, name = target.partition(":")
    laps = Laps(int(asked), int(tell))
    getattr(importlib.import_module(f"benchmarks.{module}"), name)(laps, **json.loads(settings))


if __name__ == "__main__":
    main()
