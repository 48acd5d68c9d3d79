"""A trial and the processes that it starts: none of them outlives the examination.

A trial is the head of a session of its own, so that all it starts can be ended together, and so that Ctrl-C
at a terminal reaches whoever examines, and not the script. Free of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_PR_SET_PDEATHSIG = 1
_ENDINGS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel for a signal when the parent ends, however it does; elsewhere than on Linux nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


class Family:
    """The trial under way, as the process that forks trials has it; told to end, that one ends it first."""

    def __init__(self) -> None:
        self.head = 0
        for number in _ENDINGS:
            signal.signal(number, self._end)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """While a trial is being forked: told to end just then, it is known whom to end."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def leave(self) -> None:
        """In the trial: be the head of a session, with signals as in any process."""
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def bury(self) -> int:
        """Wait for the trial, end what it has left behind, and give its exit code."""
        os.waitid(os.P_PID, self.head, os.WEXITED | os.WNOWAIT)
        with self.undisturbed():
            # Invariant: it is not reaped yet, so that its number is nobody else's.
            self._kill()
            _, status = os.waitpid(self.head, 0)
            self.head = 0
        return os.waitstatus_to_exitcode(status)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.head, signal.SIGKILL)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self.head:
            self._kill()
        os._exit(128 + number)
