"""The supervisor: starts a training, and starts it again until it is through or there is no use in it.

Policy: what is restarted is said by the exit code (`budget`), when it hangs by its own words (`liveness`).
Signals pass through. A SIGTERM or SIGINT to the supervisor ends it: with the child's exit code once the
child has saved. A SIGHUP (the terminal has gone) is passed on as a SIGTERM, as a training has no handler for
it. The supervisor's exit code is the last child's. Of a child that died of signal n it is 128 + n, as a
shell has it: a service manager sees a failure. One that died of the SIGTERM passed on, before its handlers
stood, counts as preempted (75): nothing was lost, and it may be run again.

It may be stopped together with its child (Ctrl-Z, `scontrol suspend`, a frozen container or machine): time in which
it did not run itself is not held against the child.

Cost: it sleeps until a signal or a word of the child wakes it, and looks at the clock once a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from resumable_trainer.errors import ExitCode
from resumable_trainer.loop import launch
from resumable_trainer.loop.started import SUPERVISOR_VARIABLE
from resumable_trainer.service import progress
from resumable_trainer.service.budget import Decision, Ending, Limits, Spent, decide
from resumable_trainer.service.guardian import Guardian
from resumable_trainer.service.liveness import DEFAULT_LIMIT_SECONDS, Ear, Liveness
from resumable_trainer.service.process import Child
from resumable_trainer.service.progress import Standing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import FrameType

    from resumable_trainer.service.hooks import Hooks

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
_LEAVE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ABORT_GRACE_SECONDS = 10.0
_LOOK_SECONDS = 1.0
_STOPPED_SECONDS = 0.5  # woken later than this, it was not running


@dataclass(frozen=True)
class Training:
    """What is supervised.

    Attributes:
        first: Command line of the first start, which may go back (`--from`) or begin anew (`--fresh`).
        again: Command line of all further ones.
        directories: Gives the run directories known to belong to it.
    """

    first: Sequence[str]
    again: Sequence[str]
    directories: Callable[[], list[Path]]


class Supervisor:
    """Starts a training again and again.

    Args:
        training: What to start.
        limits: How often.
        hang_timeout: Seconds without a sign of life after which a child is ended, until it has learned a better
            limit; None: half an hour from its first sign of life on.
        hooks: Tells people.
        say: Shows a line to a person.
    """

    def __init__(
        self,
        training: Training,
        *,
        limits: Limits,
        hang_timeout: float | None = None,
        hooks: Hooks | None = None,
        say: Callable[[str], None],
    ) -> None:
        self._training, self._limits, self._hang_timeout = training, limits, hang_timeout
        self._hooks, self._say = hooks, say
        self._spent = Spent()
        self._child: Child | None = None
        self._has_begun = self._has_opened = False
        self._leaving: int | None = None
        self._unsent: list[int] = []
        self._ear = Ear()
        self._wake_read = self._wake_write = -1

    def run(self) -> int:
        """Supervise until there is nothing left to start; the exit code."""
        with self._listening(), contextlib.closing(Guardian()) as guardian:
            while True:
                ending = self._one(guardian)
                self._spent = self._spent.after(ending)
                decision = decide(self._limits, self._spent, ending)
                if decision.wait_seconds is None or self._leaving is not None:
                    return self._end(ending, decision)
                self._say(self._line(ending, decision.wait_seconds))
                if not self._sleep(decision.wait_seconds):
                    return self._end(ending, decision)

    # -- one child --------------------------------------------------------------------------------

    def _one(self, guardian: Guardian) -> Ending:
        self._unsent.clear()
        before = Standing.of(self._training.directories())
        argv = self._training.again if self._has_begun else self._training.first
        self._child = child = Child(argv, self._environment())
        guardian.watch(child.pid)
        for number in self._unsent:  # asked for while it was being started
            child.send(number)
        liveness = Liveness(self._hang_timeout if self._ear.address else None, time.monotonic())
        hung = self._watch(child, liveness)
        if hung:
            child.abort(_ABORT_GRACE_SECONDS)
        code = child.reap()
        guardian.watch(0)
        self._child = None
        ending = self._judge(child.pid, code, hung=hung, before=before)
        return replace(ending, error=ending.error or liveness.failure) if code > 0 else ending

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ}
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", SUPERVISOR_VARIABLE):
            environment.pop(name, None)  # those of whoever watches the supervisor
        if not self._has_opened:
            environment[SUPERVISOR_VARIABLE] = str(os.getpid())  # the run's time begins with it
        if self._ear.address is not None:
            limit = self._hang_timeout or DEFAULT_LIMIT_SECONDS
            environment |= {"NOTIFY_SOCKET": self._ear.address, "WATCHDOG_USEC": str(int(limit * 1e6))}
        return environment

    def _watch(self, child: Child, liveness: Liveness) -> bool:
        """Wait until the child has ended, or hangs; whether it hangs."""
        while True:
            has_ended = child.has_ended  # asked first: its last words are heard all the same
            for message in self._ear.messages(child.pid):
                liveness.hear(message, time.monotonic())
            if has_ended:
                return False
            now = time.monotonic()
            if liveness.is_over(now):
                limit = liveness.limit_seconds or 0.0
                self._say(f"no sign of life for {limit:.3g} s ({liveness.status or 'no status'}): it is ended")
                return True
            seconds = None if liveness.deadline is None else min(liveness.deadline - now, _LOOK_SECONDS)
            self._wait(seconds)
            if seconds is not None and (late := time.monotonic() - now - seconds) > _STOPPED_SECONDS:
                liveness.excuse(late)

    def _judge(self, pid: int, code: int, *, hung: bool, before: Standing) -> Ending:
        directories = self._training.directories()
        after = Standing.of(directories)
        mine = progress.runs_of(pid, directories)
        baseline = before
        if not self._has_begun and self._training.first != self._training.again:
            # It went back: what it has saved is progress, whatever was there before.
            new = [path for path in mine if progress.last_of(path, ("committed",))]
            baseline = Standing({path: order for path, order in before.durable.items() if path not in new}, {})
        self._has_opened |= bool(mine)
        self._has_begun |= any(map(progress.has_begun, mine))
        for directory in mine:  # also if it has said that it is through: it cannot tell when it is gone
            launch.note_ended(directory, unless=("ended",), by="supervisor", **_result(code, hung=hung))
        error = next(filter(None, map(progress.error_in, mine)), "") if code > 0 else ""
        has_opened = any(after.generations.values())
        ending = Ending(code, after.is_further_than(baseline), after.step, error, hung, has_opened)
        if hung or code < 0:
            self._tell("failing", {"reason": str(ending), "step": after.step, **_result(code, hung=hung)}, mine)
        return ending

    def _tell(self, word: str, fields: dict[str, Any], directories: Sequence[Path] = ()) -> None:
        if self._hooks is not None:
            known = [*directories, *self._training.directories()]
            self._hooks.tell(word, known[0] if known else None, fields)

    # -- what follows -----------------------------------------------------------------------------

    def _line(self, ending: Ending, wait: float) -> str:
        step = "no snapshot yet" if ending.step is None else f"step {ending.step}"
        spent = self._spent
        return (
            f"restart {spent.restarts} in {wait:.3g} s: {ending}; safe on disk: {step}"
            f" ({spent.preemptions} preemptions, {spent.failures} failures)"
        )

    def _end(self, ending: Ending, decision: Decision) -> int:
        if decision.reason and self._leaving is None:
            self._say(f"gave up: {decision.reason}")
            self._tell("failing", {"reason": f"gave up: {decision.reason}", "step": ending.step})
        if ending.code >= 0:
            return ending.code
        if self._leaving is not None and -ending.code == signal.SIGTERM:
            return int(ExitCode.PREEMPTED)
        return 128 - ending.code

    # -- signals ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = {number: signal.getsignal(number) for number in (*_PASSED_ON, signal.SIGCHLD)}
        wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        try:
            for number, handler in before.items():
                if handler != signal.SIG_IGN or number == signal.SIGCHLD:
                    signal.signal(number, self._handle)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            signal.set_wakeup_fd(wakeup)
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._ear.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGCHLD:
            return  # it has woken the loop
        passed = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
        if number in _LEAVE:
            self._leaving = passed
        if self._child is not None:
            self._child.send(passed)
        else:
            self._unsent.append(passed)

    def _wait(self, seconds: float | None) -> None:
        """Until a signal, a word of the child, or so long."""
        readable = [number for number in (self._wake_read, self._ear.fileno()) if number >= 0]
        select.select(readable, [], [], None if seconds is None else max(0.0, seconds))
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _sleep(self, seconds: float) -> bool:
        """Wait before a restart; False if asked to leave meanwhile."""
        deadline = time.monotonic() + seconds
        while self._leaving is None and time.monotonic() < deadline:
            select.select([self._wake_read], [], [], max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        return self._leaving is None


def _result(code: int, *, hung: bool) -> dict[str, Any]:
    result = "hang" if hung else "signal" if code < 0 else "exit"
    return {"result": result, **({"signal": _signal_name(-code)} if code < 0 else {"code": code})}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
