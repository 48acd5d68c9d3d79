"""One child of the supervisor: started so that neither outlives the other unseen, and ended with all that is its.

Policy: the child leads a process group, so that its workers can be ended with it; the kernel sends it a
SIGTERM when the supervisor dies (PR_SET_PDEATHSIG, Linux), so that it saves and leaves; one that does not follow it is
ended by the `guardian`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.02


class Child:
    """A started training.

    Args:
        argv: Its command line.
        env: Its environment.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - the user's own command
            argv, env=dict(env), process_group=0, preexec_fn=_dies_with(os.getpid())
        )
        self.pid = self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it has; it is not reaped yet, so that its number stays its own."""
        if self._process.returncode is not None:
            return True
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, flags) is not None

    def send(self, number: int) -> None:
        """A signal to the child alone."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def reap(self) -> int:
        """End what is left of its group, and give its exit code; negative: the signal that it died of."""
        self._send_group(signal.SIGKILL)
        return self._process.wait()

    def abort(self, grace_seconds: float) -> None:
        """End a child that hangs: SIGABRT shows the stacks of its threads, then those of its workers.

        One that was stopped gets it only when it is continued.
        """
        self.send(signal.SIGABRT)
        self.send(signal.SIGCONT)
        self._wait(grace_seconds)
        self.send(signal.SIGKILL)
        self._wait(grace_seconds)
        self._send_group(signal.SIGABRT)
        self._send_group(signal.SIGCONT)
        time.sleep(_LOOK_SECONDS * 10)  # for the workers' stacks: nobody reaps them that could tell

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.has_ended and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)

    def _send_group(self, number: int) -> None:
        # Invariant: the leader is not reaped yet, so the group's number cannot be somebody else's.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)


def _dies_with(parent: int) -> Callable[[], None] | None:
    """What the child does before it becomes the command: nothing but two system calls."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: after the fork nothing is to be loaded
    getppid, leave = os.getppid, os._exit

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if getppid() != parent:  # it died before it could be asked to tell
            leave(0)

    return prepare
