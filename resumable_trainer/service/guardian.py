"""The supervisor's guardian: a small process that ends a training whose supervisor was killed.

A killed supervisor's training gets a SIGTERM (`process`), saves and leaves. One that hangs, or is still being set up,
does not follow it, and would hold the run for ever with nobody to end it. Run as a script of its own with nothing but
the standard library, so that it costs little memory, and nobody's child, so that the training stays the supervisor's
only one: it reads the number of each process that the supervisor starts (0 when that has ended) from standard input,
whose end means that the supervisor is gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_SECONDS = 600.0
"""Long enough for a batch and a snapshot: a training that saves is not to be killed."""


class Guardian:
    """The supervisor's end.

    Args:
        grace_seconds: How long a training has to save and leave once its supervisor is gone.
    """

    def __init__(self, grace_seconds: float = GRACE_SECONDS) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(grace_seconds)],
            cwd="/",  # it keeps no file system busy
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not meant for it
        )
        self._process.wait()

    def watch(self, pid: int) -> None:
        """A training was started; 0: it has ended. Best effort: without a guardian the run goes on all the same."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            os.write(self._process.stdin.fileno(), f"{pid}\n".encode())

    def close(self) -> None:
        """Nothing is left to guard; waits for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with self._process.stdout as told:
            told.read()  # nothing, until it has ended


def main(grace_seconds: float) -> None:
    """Wait for the supervisor's end, then for that of the training, and end what is left of it."""
    pid = 0
    while line := sys.stdin.buffer.readline():
        pid = int(line)
    if not pid:
        return
    with contextlib.suppress(ProcessLookupError):
        if sys.platform != "linux":  # there the kernel has told it
            os.kill(pid, signal.SIGTERM)
        _wait(pid, grace_seconds)
        os.killpg(pid, signal.SIGKILL)


def _wait(pid: int, seconds: float) -> None:
    if hasattr(os, "pidfd_open"):
        select.select([os.pidfd_open(pid)], [], [], seconds)
        return
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        os.kill(pid, 0)
        time.sleep(0.5)


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    main(float(sys.argv[1]))
