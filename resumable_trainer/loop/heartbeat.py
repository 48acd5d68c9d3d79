"""The training's signs of life, for whoever watches the process: systemd, or `run --restart`.

The words are those of sd_notify(3): one datagram of `KEY=VALUE` lines to `$NOTIFY_SOCKET`. Policy: only progress of
the training thread is a sign of life (a step, a batch of an evaluation, a snapshot, an epoch), never a timer, so that a
hung loop is found. How long it may be silent is learned: ten times the longest silence so far, at least
`FLOOR_SECONDS`, once an epoch's end with its evaluation and snapshot has been seen (in this launch or an earlier one);
until then, and once the run is closed, the watcher's own limit holds. Not watched, nothing is done and nothing is sent.
Free of torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FLOOR_SECONDS = 30.0
FAILURE_WORD = "X_FAILURE"  # ours: systemd passes over words with this beginning
FLOOR_VARIABLE = "RESUMABLE_TRAINER_MIN_WATCHDOG_SECONDS"
_TIMES_LONGEST = 10.0
_STATUS_SECONDS = 1.0
_LOADING_SECONDS = 1800.0
_SAVING_SECONDS = 600.0


class Heartbeat:
    """Tells a watcher how the training goes.

    Args:
        send: Sends one message; None if nobody watches.
        limit_seconds: How long the watcher waits for a sign of life (`$WATCHDOG_USEC`); 0 if it does not.
        longest_gap_seconds: The longest silence of earlier launches that have ended an epoch; None if it is not known.
        note: Told a new longest silence, to be known to later launches.
        floor_seconds: The shortest limit.
        clock: Seconds.
    """

    def __init__(
        self,
        send: Callable[[str], None] | None,
        *,
        limit_seconds: float = 0.0,
        longest_gap_seconds: float | None = None,
        note: Callable[[float], None] = lambda seconds: None,
        floor_seconds: float = FLOOR_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send, self._note, self._floor, self._clock = send, note, floor_seconds, clock
        self._noted = longest_gap_seconds or 0.0
        self._longest = longest_gap_seconds or 0.0
        self._last = self._last_sent = self._status_at = clock()
        self._own_limit = limit_seconds
        self._limit = limit_seconds  # as the watcher has it
        self._has_seen_epoch = longest_gap_seconds is not None

    @classmethod
    def of_process(
        cls, environment: Mapping[str, str], *, longest_gap_seconds: float | None, note: Callable[[float], None]
    ) -> Heartbeat:
        """The heartbeat of this process, as its environment asks for."""
        address = environment.get("NOTIFY_SOCKET")
        if not address:
            return cls(None)
        is_meant = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        limit = _number(environment.get("WATCHDOG_USEC")) / 1_000_000 if is_meant else 0.0
        if limit:
            show_stacks_on_abort()
        floor = _number(environment.get(FLOOR_VARIABLE)) or FLOOR_SECONDS
        return cls(
            Messenger(address),
            limit_seconds=limit,
            longest_gap_seconds=longest_gap_seconds,
            note=note,
            floor_seconds=floor,
        )

    @property
    def longest_seconds(self) -> float:
        """The longest silence of the training thread so far."""
        return self._longest

    def loading(self, what: str) -> None:
        """A snapshot is restored: that may take longer than a start usually does."""
        self._tell(f"EXTEND_TIMEOUT_USEC={_microseconds(_LOADING_SECONDS)}", f"STATUS={what}")

    def ready(self) -> None:
        """The state is restored; training may begin. From here on silence counts."""
        self._last = self._last_sent = self._clock()
        self._tell("READY=1", "STATUS=ready")
        if self._has_seen_epoch:
            self._set_limit()

    def beat(self, status: Callable[[], str] | None = None) -> None:
        """The training thread has got on; `status` gives a line for people, asked for about once a second."""
        now = self._clock()
        gap, self._last = now - self._last, now
        if not self._limit or gap <= self._limit:  # a longer one would have been ended: both were stopped meanwhile
            self._longest = max(self._longest, gap)
        if self._send is None:
            return
        if status is not None and now - self._status_at >= _STATUS_SECONDS:
            self._status_at = self._last_sent = now
            self._tell("WATCHDOG=1", f"STATUS={status()}")
        elif now - self._last_sent >= min(self._floor, self._limit or self._floor) / 10:
            self._last_sent = now
            self._tell("WATCHDOG=1")

    def epoch_ends(self) -> None:
        """An epoch is over, its evaluation and snapshot too: what silences are usual is known now."""
        self.beat()
        if self._send is None:
            return
        self._has_seen_epoch = True
        self._set_limit()
        if self._longest > 1.5 * self._noted:
            self._noted = self._longest
            self._note(round(self._longest, 3))

    def stopping(self) -> None:
        """The training leaves, and saves on its way out: it may take its time."""
        microseconds = _microseconds(_SAVING_SECONDS)
        self._tell("STOPPING=1", "STATUS=saving, then leaving", f"EXTEND_TIMEOUT_USEC={microseconds}", "WATCHDOG=1")

    def closed(self) -> None:
        """The run is closed; what the script does then, a test or an export, has no pace that is known."""
        self._change_limit(self._own_limit)

    def _set_limit(self) -> None:
        self._change_limit(max(self._floor, _TIMES_LONGEST * self._longest))

    def _change_limit(self, limit: float) -> None:
        if self._limit and not 0.9 < limit / self._limit < 1.1:
            self._limit = limit
            self._tell(f"WATCHDOG_USEC={_microseconds(limit)}", "WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        if self._send is not None:
            self._send("\n".join(line.replace("\n", " ") for line in lines))


def show_stacks_on_abort() -> None:
    """Let a watcher's SIGABRT show the stacks of all threads."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no stderr to write to
        faulthandler.enable()


def nothing_to_do() -> None:
    """A start finds nothing to do: a service that leaves without having been ready would count as failed."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        Messenger(address)("READY=1\nSTATUS=done already, nothing to do")


def failing(error: BaseException) -> None:
    """The script ends by an uncaught error; of one that has opened no run nobody else can know which."""
    address = os.environ.get("NOTIFY_SOCKET")
    text = type(error).__name__
    with contextlib.suppress(Exception):  # an error of the user's that cannot be shown
        text = f"{text}: {error}".partition("\n")[0][:200]
    if address:
        Messenger(address)(f"STATUS=failed: {text}\n{FAILURE_WORD}={text}")


class Messenger:
    """Sends sd_notify datagrams; never an error: no manager is worth a training.

    Args:
        address: Of the socket; a leading "@" means an abstract one.
    """

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._pid = os.getpid()

    def __call__(self, message: str) -> None:
        """Send; nothing from a forked child, whose signs of life are not the training's."""
        if os.getpid() != self._pid:
            return
        with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
            sending.setblocking(False)
            sending.sendto(message.encode(errors="replace"), self._address)


def _microseconds(seconds: float) -> int:
    return int(seconds * 1_000_000)


def _number(text: str | None) -> float:
    """A number above 0; 0 for anything else."""
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if 0 < value < 1e15 else 0.0
