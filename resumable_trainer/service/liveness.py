"""The watching end of the sd_notify protocol: what a training says about itself, and until when it must.

Policy: only datagrams of the training's own process count; the kernel says whose they are
(SCM_CREDENTIALS), so that a data-loader worker cannot speak for a training that hangs. The socket has an
abstract name: no file that could be left over. Linux alone; elsewhere nothing is heard.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from dataclasses import dataclass, field

from resumable_trainer.loop.heartbeat import FAILURE_WORD

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_MAX_BYTES = 4096
DEFAULT_LIMIT_SECONDS = 1800.0


@dataclass
class Liveness:
    """Until when a child must give its next sign of life; the clock is the caller's.

    Args:
        limit_seconds: Until the child has learned a better one; None: it is not watched before it has spoken.
        started: When it was started.
    """

    limit_seconds: float | None
    started: float
    status: str = ""
    failure: str = ""  # the last words of one that failed
    deadline: float | None = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = None if self.limit_seconds is None else self.started + self.limit_seconds

    def hear(self, message: dict[str, str], now: float) -> None:
        """Take up what the child has said."""
        if self.limit_seconds is None:
            self.limit_seconds = DEFAULT_LIMIT_SECONDS
            self.deadline = now + self.limit_seconds
        learned = _microseconds(message.get("WATCHDOG_USEC"))
        if learned:
            self.limit_seconds = learned
        self.status = message.get("STATUS", self.status)
        self.failure = message.get(FAILURE_WORD, self.failure)
        if learned or any(message.get(word) == "1" for word in ("READY", "WATCHDOG", "STOPPING")):
            self.deadline = now + self.limit_seconds
        extended = _microseconds(message.get("EXTEND_TIMEOUT_USEC"))
        if extended:
            self.deadline = max(self.deadline or now, now + extended)

    def excuse(self, seconds: float) -> None:
        """The watcher itself was stopped for so long, and the child perhaps with it: that was no silence."""
        if self.deadline is not None:
            self.deadline += seconds

    def is_over(self, now: float) -> bool:
        """Whether the child has been silent for too long."""
        return self.deadline is not None and now >= self.deadline


class Ear:
    """The socket on which a supervisor hears its child."""

    def __init__(self) -> None:
        self.address: str | None = None
        self._socket: socket.socket | None = None
        if sys.platform == "linux":
            name = f"resumable-trainer/{os.getpid()}-{os.urandom(8).hex()}"
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._socket.bind(f"\0{name}")
            self.address = f"@{name}"

    def fileno(self) -> int:
        """For a selector; -1 where nothing is heard."""
        return -1 if self._socket is None else self._socket.fileno()

    def messages(self, pid: int) -> list[dict[str, str]]:
        """All that process `pid` has said since the last call; what others say is dropped."""
        found: list[dict[str, str]] = []
        while self._socket is not None:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_MAX_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
            except OSError:
                break
            if _sender(ancillary) == pid:
                found.append(_parsed(data))
        return found

    def close(self) -> None:
        """Hear no more."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(data) >= _CREDENTIALS.size:
            return int(_CREDENTIALS.unpack_from(data)[0])
    return None


def _parsed(data: bytes) -> dict[str, str]:
    lines = data.decode(errors="replace").splitlines()
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def _microseconds(text: str | None) -> float | None:
    """Seconds; None for what is no sensible number."""
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 18:
        return None
    return int(text) / 1e6 or None
