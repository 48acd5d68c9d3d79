"""`--on-event COMMAND`: people are told what becomes of a run, by a command of their own.

Policy: a hook never harms or delays the run. It runs in a session of its own, in order, one at a time, with a
time limit; what it prints is dropped; that it fails is said once. The thread that runs hooks lives only
while there are some: a fork (of data-loader workers) usually meets none. At exit, hooks under way get a few
seconds. The command is not recorded with the run: it belongs to the start, as `--strict` does, and a run
directory from elsewhere brings none.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from resumable_trainer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_WORDS = {
    "training": "started",
    "preempted": "preempted",
    "interrupted": "preempted",
    "failed": "failing",
    "not_saved": "failing",
    "quarantined": "quarantined",
    "diverged": "diverged",
}
_FIELDS = ("step", "epoch", "batch", "signal", "snapshot", "error", "reason", "action", "outcome", "result", "code")
_MAX_WAITING = 100
LIMIT_SECONDS = 60.0
AT_EXIT_SECONDS = 5.0


def word_for(event: Mapping[str, Any]) -> str | None:
    """What people are told an event of a run is; None if they are not told."""
    if event["event"] == "finished":
        return "stopped_early" if event.get("outcome") == "stopped_early" else "finished"
    return _WORDS.get(event["event"])


class Hooks:
    """Runs one command for each event that people want to know of.

    Args:
        command: Split as a shell would; no shell runs it unless it names one.
        limit_seconds: A hook is killed after so long.
        at_exit_seconds: How long the process waits for hooks before it ends.

    Raises:
        UsageError: The command cannot be split, or is empty.
    """

    def __init__(
        self, command: str, *, limit_seconds: float = LIMIT_SECONDS, at_exit_seconds: float = AT_EXIT_SECONDS
    ) -> None:
        try:
            self._argv = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"--on-event {command!r} cannot be split into words: {error}") from error
        if not self._argv:
            raise UsageError("--on-event: the command is empty")
        self._limit_seconds, self._at_exit_seconds = limit_seconds, at_exit_seconds
        self._waiting: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._running: subprocess.Popen[bytes] | None = None
        self._has_complained = False
        self._pid = os.getpid()
        atexit.register(self.close)

    def noted(self, directory: Path, event: Mapping[str, Any]) -> None:
        """An event was noted in a run's journal."""
        word = word_for(event)
        if word is not None:
            self.tell(word, directory, event)

    def tell(self, word: str, directory: Path | None, fields: Mapping[str, Any]) -> None:
        """Run the command for an event, in the background; never raises, never waits."""
        if os.getpid() != self._pid:
            return  # a forked child: the run is its parent's
        time_ = fields.get("time") or datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        told = {"event": word, "run_dir": None if directory is None else str(directory.absolute()), "time": time_}
        told |= {name: fields[name] for name in _FIELDS if name in fields}
        line = json.dumps(told, default=str).encode() + b"\n"
        with self._lock:
            if len(self._waiting) >= _MAX_WAITING:
                self._complain(f"{_MAX_WAITING} events wait for it; further ones are dropped")
                return
            self._waiting.append(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="on-event", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Wait for the hooks a few seconds at most; what runs then is killed, what waits is dropped."""
        if os.getpid() != self._pid:
            return
        thread = self._thread
        if thread is not None:
            thread.join(self._at_exit_seconds)
        with self._lock:
            if self._waiting or self._thread is not None:
                self._complain("it was not done when the process ended")
            self._waiting.clear()
        running = self._running
        if running is not None:
            _kill(running)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                line = self._waiting.popleft()
            try:
                self._run(line)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with a hook, the run goes on
                self._complain(f"{type(error).__name__}: {error}")

    def _run(self, line: bytes) -> None:
        null = subprocess.DEVNULL
        self._running = subprocess.Popen(  # noqa: S603 - the user's own command
            self._argv, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True
        )
        try:
            self._running.communicate(line, timeout=self._limit_seconds)
        except subprocess.TimeoutExpired:
            self._complain(f"it took longer than {self._limit_seconds:g} s")
        finally:
            if self._running.returncode is None:
                _kill(self._running)
                self._running.wait()
            code, self._running = self._running.returncode, None
        if code:
            self._complain(f"it ended with {code}")

    def _complain(self, reason: str) -> None:
        if not self._has_complained:
            self._has_complained = True
            with contextlib.suppress(OSError, ValueError):
                print(  # noqa: T201 - said to the person who gave the command
                    f"resumable-trainer: --on-event {self._argv[0]}: {reason}; the run goes on (said once)",
                    file=sys.stderr,
                    flush=True,
                )


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
