"""Notices: signals that ask the run to save, and leave.

SIGTERM and SIGINT: save at the next boundary and leave (75, 130). SIGUSR1: save and go on. A
second SIGINT or SIGTERM leaves at once; what is durable stays durable.

Policy: a handler sets a flag and calls the handler that stood there before, nothing else; saving
inside a handler deadlocks sooner or later. The loop polls the flag between batches of training and
of evaluation. While it waits for a batch of data that finds its place by position alone, the handler
breaks off the wait (`WaitBroken`): the state is that of the last boundary, and a batch may take longer
than the machine has left. Free of torch: the command line installs the handlers before torch is imported, as a
SIGTERM before that would kill at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from resumable_trainer.errors import ExitCode, ResumableTrainerError
from resumable_trainer.loop.journal_lines import ERROR, marked

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

_LEAVE = (signal.SIGTERM, signal.SIGINT)
_EXIT_CODES = {signal.SIGTERM: ExitCode.PREEMPTED, signal.SIGINT: ExitCode.INTERRUPTED}


class WaitBroken(BaseException):
    """Raised in the training thread by a notice while it waits for a batch; caught by the loop that waits."""


class Notices:
    """What has been asked of this process; `notices` is the one instance, as signals are per process."""

    def __init__(self) -> None:
        self.leave: signal.Signals | None = None
        self.save = False
        self.pending = False  # the one flag that the loop polls between batches
        self.source = ""  # who asks to leave, if it was no signal from outside
        self.deadline: float | None = None  # by the monotonic clock: when the machine goes
        self.waits = False  # the training thread waits for a batch, and may be broken off
        self.may_break: Callable[[], bool] = bool  # asked then; not while generators are being put back, say
        self._nudging = False
        self._previous: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()
        self._num_runs = 0

    def begin(self) -> None:
        """A run is opened; runs may be opened within each other."""
        if os.getpid() != self._pid:
            self._num_runs = 0  # those are the parent's
        self._num_runs += 1
        self.install()

    def end(self) -> None:
        """A run is closed; the handlers go with the last one."""
        self.waits = False
        self._num_runs -= 1
        if not self._num_runs:
            self._uninstall()

    def install(self) -> None:
        """Stand in for SIGTERM, SIGINT and SIGUSR1 until the last run ends; a second call changes nothing.

        A SIGINT that is ignored (a job in the background of a shell) stays ignored. Outside the main
        thread Python allows no handlers: then none are installed, and the run is not notified.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        for number in (*_LEAVE, signal.SIGUSR1):
            current = signal.getsignal(number)
            if current == self._handle or (number == signal.SIGINT and current == signal.SIG_IGN):
                continue
            self._previous[number] = current
            signal.signal(number, self._handle)

    def _uninstall(self) -> None:
        """Put back what stood there before, unless somebody has replaced ours since."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle and previous is not None:
                signal.signal(number, previous)
        self._previous.clear()

    def served(self) -> None:
        """A request to save has been met; the one to leave stays."""
        self.save = False
        self.pending = self.leave is not None

    def reset(self) -> None:
        """Forget everything asked (a run in a notebook cell was interrupted and has left)."""
        self.leave, self.save, self.pending = None, False, False
        self.source, self.deadline = "", None

    def ask(self, *, leave: bool, source: str, deadline: float | None) -> None:
        """Ask from another thread: to save, or to leave, as a signal would."""
        if not leave:
            self.save = self.pending = True
            return
        if self.leave is None:
            self.source, self.deadline, self.leave = source, deadline, signal.SIGTERM
            self.pending = True
        if self.waits and signal.getsignal(signal.SIGUSR1) == self._handle:
            self._nudging = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        if os.getpid() != self._pid:
            self._handle_in_child(name, frame)
            return
        if self._nudging and name == signal.SIGUSR1:
            self._nudging = False
            self._break_wait()
            return
        if name in _LEAVE and self.leave is not None and not self.source:
            _leave_now(name)
        if name in _LEAVE:
            self.leave, self.source = name, ""  # whoever asks again after this means: at once
        else:
            self.save = True
        self.pending = True
        previous = self._previous.get(name)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)
        if name in _LEAVE:
            self._break_wait()

    def _break_wait(self) -> None:
        if self.waits and self.may_break():
            self.waits = False
            raise WaitBroken

    def _handle_in_child(self, name: signal.Signals, frame: FrameType | None) -> None:
        """In a forked child that has set no handlers of its own.

        What was sent to the whole group is the trainer's. But a SIGTERM may be meant for this child
        alone (`Process.terminate()`, a pool that closes), and must end it, or whoever waits for its end waits
        for ever.
        """
        if name != signal.SIGTERM:
            return
        previous = self._previous.get(name)
        if callable(previous):
            previous(int(name), frame)
            return
        signal.signal(name, signal.SIG_DFL if previous is None else previous)
        os.kill(os.getpid(), name)


def _leave_now(name: signal.Signals) -> None:
    """Second request: no unwinding, no saving; a snapshot being written is swept at the next start."""
    line = f"\nresumable-trainer: second {name.name}, leaving at once; the last durable snapshot stands\n"
    os.write(2, line.encode())
    os._exit(_EXIT_CODES[name])


notices = Notices()

_previous_hook: Callable[..., Any] | None = None


def install_excepthook(on_failure: Callable[[], None] | None = None) -> None:
    """Let uncaught errors end the process as the table of exit codes says; idempotent.

    An error of ours prints its one line; anything else keeps its traceback and exits with 70.
    CPython exits with the code of a SystemExit that an excepthook raises.
    """
    global _previous_hook
    if _previous_hook is not None:
        return
    _previous_hook = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if on_failure is not None:
            on_failure()
        raise SystemExit(report_error(kind, error, traceback))

    sys.excepthook = hook


def report_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> int:
    """Show an uncaught error to a person; the exit code that it stands for."""
    if isinstance(error, ResumableTrainerError):
        print(marked(f"resumable-trainer: {error}", ERROR), file=sys.stderr)  # noqa: T201 - the last thing the process says
        return int(error.exit_code)
    if issubclass(kind, KeyboardInterrupt):
        return int(ExitCode.INTERRUPTED)
    show = _previous_hook if _previous_hook is not None else sys.__excepthook__
    show(kind, error, traceback)
    return int(ExitCode.FAILED)
