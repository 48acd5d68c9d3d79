"""Priority and place of who writes in the background: training goes first where both want the same core.

Policy of the thread: `nice` 10, which leaves the writer about a tenth of a contended core. At 19 steps were hardly
disturbed at all, but data-loading workers on every core could have kept a snapshot from the disk for a minute, and no
unprivileged process may take it back when somebody begins to wait for the snapshot, as before a preemption. Mean step
of 5 ms while 0.6 GB were written on two busy cores: 1.8 x idle without it, 1.15 x at 10, 1.07 x at 19.

Policy of the scribe: it runs where the disk interrupts. A small snapshot comes with twenty interrupts within 3 ms, and
each stops whoever computes on that core: steps of 0.25 ms took 0.39 ms as long. The scheduler does not know that, but
gives the training another core once the writer is there. Large ones are written without: there the bytes are the cost.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path

_NICE = 10
_NEARLY_ALL = 0.9  # of a disk's interrupts


def yield_to_training() -> None:
    """Lower the priority of the calling thread, for as long as it lives; nothing where that is not to be had.

    Only Linux counts priorities by thread.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            if os.getpriority(os.PRIO_PROCESS, thread) < _NICE:
                os.setpriority(os.PRIO_PROCESS, thread, _NICE)


def move_to_core_of_disk(directory: Path, *, system: Path = Path("/")) -> None:
    """Let this process run where the disk interrupts, if that is one core of several; nothing if that is not known.

    For Linux, as the scribe is.

    Args:
        directory: On the disk.
        system: Where `sys` is found.
    """
    with contextlib.suppress(OSError, ValueError):
        core, mine = _core_of_disk(os.stat(directory).st_dev, system / "sys"), os.sched_getaffinity(0)
        if core in mine and len(mine) > 1:
            os.sched_setaffinity(0, {core})


def move_anywhere(process: int) -> None:
    """Let another process run wherever the caller may."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(process, os.sched_getaffinity(0))


def _core_of_disk(device: int, system: Path) -> int | None:
    """The core that has served nearly all interrupts of a block device so far; None if there is none such.

    A disk with a queue for each core interrupts whoever has asked; a virtual one often has one queue, and one core.
    """
    node = (system / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}").resolve(strict=True)
    lists = [above / "msi_irqs" for above in node.parents]
    numbers = next((sorted(each.iterdir()) for each in lists if each.is_dir()), [])
    texts = [(system / "kernel" / "irq" / number.name / "per_cpu_count").read_text() for number in numbers]
    counts = [[int(count) for count in text.split(",")] for text in texts]
    by_core = [sum(of_core) for of_core in zip(*counts, strict=True)]
    most = max(by_core, default=0)
    return by_core.index(most) if most > _NEARLY_ALL * sum(by_core) else None
