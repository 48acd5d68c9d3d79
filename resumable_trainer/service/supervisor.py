"""The supervisor: starts a training, and again when it ends before its time; ends it when it hangs. Free of torch.

It is for places without a service manager. The training is its child, in a process group of its own, and hears of
signals through it alone. Neither outlives the other unseen: the supervisor leaves only when its child has, and the
child is sent SIGTERM by the kernel when the supervisor dies (so that it saves, and leaves).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumable_trainer.service.budget import Budget, Ending
from resumable_trainer.service.liveness import Listener, Liveness

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_POLL_SECONDS = 0.1
_ABORT_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Watched:
    """What the supervisor asks about the training, by functions that read the run directory.

    Attributes:
        newest: Name of the newest durable snapshot; None before the first.
        error: What the last launch said of its failure; "" if nothing.
        ended: Notes how a child ended that may not have said so itself.
    """

    newest: Callable[[], str | None]
    error: Callable[[], str]
    ended: Callable[[Mapping[str, Any]], None]


class Supervisor:
    """Runs a command until it is done, or there is no use in it.

    Args:
        command: Gives the training's command line; told whether an earlier child was ready (had restored its state).
        watched: What is asked about it.
        budget: Decides about restarts.
        hang_seconds: How long the training may give no sign of life before it has learned a limit of its own.
        say: Shows a line to a person.
    """

    def __init__(
        self,
        command: Callable[[bool], Sequence[str]],
        *,
        watched: Watched,
        budget: Budget,
        hang_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self._command, self._watched, self._budget = command, watched, budget
        self._hang_seconds, self._say = hang_seconds, say
        self._child: subprocess.Popen[bytes] | None = None
        self._is_asked_to_leave = self._has_begun = False

    def run(self) -> int:
        """Supervise until the end; the exit code of the last child, 128 + n if it died by signal n."""
        listener = Listener()
        previous = {number: signal.signal(number, self._pass_on) for number in _PASSED}
        try:
            return self._run(listener)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            listener.close()

    def _run(self, listener: Listener) -> int:
        newest = self._watched.newest()
        while True:
            ending = self._one(listener)
            before, newest = newest, self._watched.newest()
            place = newest or "the beginning"
            decision = self._budget.after(ending, has_progressed=newest != before, place=place)
            if ending.kind == "final" or not self._may_go_on():
                return ending.exit_code
            if not decision.restart:
                self._say(f"giving up: {decision.reason}")
                return ending.exit_code
            wait = f" in {decision.wait_seconds:.0f} s" if decision.wait_seconds else ""
            self._say(f"{decision.reason}{wait}, from {place}")
            self._wait(decision.wait_seconds)
            if not self._may_go_on():
                return ending.exit_code

    def _may_go_on(self) -> bool:
        return not self._is_asked_to_leave

    def _one(self, listener: Listener) -> Ending:
        """One life of the child."""
        microseconds = str(int(self._hang_seconds * 1_000_000))
        environment = {**os.environ, "NOTIFY_SOCKET": listener.address, "WATCHDOG_USEC": microseconds}
        environment.pop("WATCHDOG_PID", None)
        with _signals_held():  # one that comes now is passed on to the child as soon as there is one
            self._child = subprocess.Popen(  # noqa: S603 - our own command line
                self._command(self._has_begun), env=environment, process_group=0, preexec_fn=_begin_child(os.getpid())
            )
        child, hung = self._child, False
        liveness = Liveness(self._hang_seconds, time.monotonic())
        while child.poll() is None:
            listener.receive(child.pid, liveness, _POLL_SECONDS)
            if time.monotonic() > liveness.deadline() and child.poll() is None:
                hung = True
                self._say(
                    f"no sign of life for {liveness.limit_seconds:.0f} s (last: {liveness.status or 'none'});"
                    " ending it, the stacks of its threads follow"
                )
                self._end_hung(child)
        self._has_begun |= liveness.is_ready
        code = child.returncode
        if hung or code < 0:
            _kill_group(child.pid)  # workers that it has left
        self._note_ended(code, hung=hung)
        return Ending(code, hung, self._watched.error() if code > 0 and not hung else "")

    def _end_hung(self, child: subprocess.Popen[bytes]) -> None:
        """SIGABRT, upon which the stacks of all threads are shown; SIGKILL for the rest."""
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGCONT)
            child.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_ABORT_SECONDS)
        _kill_group(child.pid)
        child.wait()

    def _note_ended(self, code: int, *, hung: bool) -> None:
        fields: dict[str, Any] = {"by": "supervisor", "result": "hang" if hung else "signal" if code < 0 else "exit"}
        fields["signal" if code < 0 else "code"] = abs(code)
        self._watched.ended(fields)

    def _pass_on(self, number: int, frame: object) -> None:
        name = signal.Signals(number)
        if name is not signal.SIGUSR1:
            self._is_asked_to_leave = True
        if name is signal.SIGHUP:
            name = signal.SIGTERM  # the terminal is gone: save, and leave
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(name)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._may_go_on() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))


_PASSED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class _signals_held(contextlib.AbstractContextManager[None]):  # noqa: N801 - used like a function
    def __enter__(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED)

    def __exit__(self, *exception: object) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED)


def _begin_child(parent: int) -> Callable[[], None]:
    """In the child, before its program: signals as usual, and SIGTERM when the supervisor dies (Linux)."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None

    def begin() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED)
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(int(signal.SIGTERM) + 128)

    return begin


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
