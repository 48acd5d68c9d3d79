"""A listener for a child's signs of life: the receiving side of sd_notify(3). Free of torch.

Only the child itself is heard: the kernel tells the pid of each sender, so that a worker process which has inherited
`$NOTIFY_SOCKET` cannot speak for a training that hangs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_BYTES = 65536
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Liveness:
    """What is known of a child's life: pure, told times and messages.

    Args:
        limit_seconds: How long it may be silent, until it says otherwise.
        now: Seconds.

    Attributes:
        limit_seconds: The limit that holds.
        status: Its last `STATUS=`.
        is_ready: Whether it has said `READY=1`.
        is_stopping: Whether it has said `STOPPING=1`.
    """

    def __init__(self, limit_seconds: float, now: float) -> None:
        self.limit_seconds = limit_seconds
        self.status = ""
        self.is_ready = self.is_stopping = False
        self._alive_at = now
        self._extended_to = now

    def hear(self, message: str, now: float) -> None:
        """Take up one message; what is not understood is passed over."""
        for line in message.splitlines():
            key, _, value = line.partition("=")
            if key in ("READY", "WATCHDOG") and value == "1":
                self._alive_at = self._extended_to = now
                self.is_ready |= key == "READY"
            elif key == "STOPPING" and value == "1":
                self.is_stopping = True
            elif key == "STATUS":
                self.status = value
            elif key == "WATCHDOG_USEC" and (seconds := _seconds(value)):
                self.limit_seconds = seconds
            elif key == "EXTEND_TIMEOUT_USEC" and (seconds := _seconds(value)):
                self._extended_to = now + seconds

    def deadline(self) -> float:
        """When it counts as hung if nothing is heard until then."""
        return max(self._alive_at + self.limit_seconds, self._extended_to)


def _seconds(microseconds: str) -> float:
    return int(microseconds) / 1_000_000 if microseconds.isdecimal() and len(microseconds) < 16 else 0.0


class Listener:
    """A socket that a child sends its signs of life to.

    Attributes:
        address: For the child's `$NOTIFY_SOCKET`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._passes = getattr(socket, "SO_PASSCRED", None)
        if self._passes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, self._passes, 1)
            name = f"resumable-trainer-{os.getpid()}-{secrets.token_hex(4)}"
            self._socket.bind("\0" + name)
            self.address = "@" + name
        else:
            self._directory = tempfile.TemporaryDirectory(prefix="resumable-trainer-")
            self.address = str(Path(self._directory.name) / "notify")
            self._socket.bind(self.address)

    def receive(self, pid: int, liveness: Liveness, timeout_seconds: float) -> None:
        """Wait for messages at most so long, and let `liveness` hear those of the process `pid`."""
        select.select([self._socket], [], [], max(0.0, timeout_seconds))
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_MAX_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
            except (BlockingIOError, InterruptedError):
                return
            if self._passes is None or _sender(ancillary) == pid:
                liveness.hear(data.decode(errors="replace"), self._clock())

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()
        if self._directory is not None:
            with contextlib.suppress(OSError):
                self._directory.cleanup()


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == getattr(socket, "SCM_CREDENTIALS", -1):
            return int(_CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0])
    return -1
