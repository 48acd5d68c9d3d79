"""When a launch began: before its process had loaded anything, or before its supervisor had. Free of torch."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

SUPERVISOR_VARIABLE = "RESUMABLE_TRAINER_SUPERVISOR"
"""Number of the supervisor's process, told to its children until one of them has opened a run."""


def launch_started() -> str | None:
    """When this process was started, or the supervisor whose first launch it is (ISO 8601, UTC).

    None where that is not told.
    """
    parent = os.getppid()
    # Whoever else has inherited the variable is no child of the supervisor's.
    is_first = os.environ.get(SUPERVISOR_VARIABLE) == str(parent)
    return process_started(parent if is_first else os.getpid())


def process_started(pid: int) -> str | None:
    """When a process was started (ISO 8601, UTC); None where that is not told."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    age = max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    started = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)
    return started.isoformat(timespec="milliseconds")
