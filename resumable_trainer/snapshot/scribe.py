"""The scribe: a small process beside the training that commits small snapshots which come often. Free of torch.

Why: a snapshot of a few kilobytes is some forty system calls with a little Python between them. In a thread they take
turns with the training at the interpreter's lock, and an epoch of 20 ms becomes 25 ms; in another process they cost it
the sending of a message. A state that comes seldom, or is large, is written by a thread: there the bytes are the cost.

Policy: the scribe is a shortcut and is trusted with nothing else. It runs the same `Committer` as the thread does, on
the same files, checks the run's lock before it publishes, and answers. Whatever goes wrong with it (it refuses, dies,
or was never there), the owner writes the same snapshot itself, and every rule about failures is applied there.

When the training dies, the kernel kills the scribe (`PR_SET_PDEATHSIG`), in the middle of a commit too, which is as
good a place as any other. So it is used on Linux only. Signals to the group are the training's, it ignores them.

Orders: a line of JSON with the lengths of what follows it, then those bytes. Answers: a line of words.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.priority import move_anywhere

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REMEMBERED = ("settings", "depends_on", "saved_by")  # fields of a manifest that hardly ever change
_SEND_BUFFER_BYTES = 1 << 20
_MAX_LINE_BYTES = 16 << 20
_TIMEOUT_SECONDS = 300.0  # a disk that hangs longer than this hangs for whoever writes
_END_SECONDS = 10.0
_TOO_OFTEN_LATE = 3
_ANSWER_BYTES = 1 << 16
_FAILED = b"failed "
READY = b"ready\n"


class ScribeError(Exception):
    """The scribe did not commit the snapshot; its owner is to do it."""


@dataclass(frozen=True)
class Committed:
    """What the scribe answers.

    Attributes:
        own_digest: Digest of the manifest.
        num_bytes: Bytes of all files but the manifest.
        at: When the snapshot was durable (`time.monotonic()`, the same in all processes).
        notes: What is to be noted in the run's events: [event, fields].
    """

    own_digest: str
    num_bytes: int
    at: float
    notes: Sequence[tuple[str, dict[str, Any]]]

    def to_line(self) -> bytes:
        """The answer as it is sent."""
        return f"{self.own_digest} {self.num_bytes} {self.at:.6f} {json.dumps(self.notes)}\n".encode()

    @classmethod
    def of_line(cls, line: bytes) -> Committed:
        """The way back, without the newline.

        Raises:
            ValueError: It is something else.
        """
        own_digest, num_bytes, at, notes = line.decode().split(" ", 3)
        return cls(own_digest, int(num_bytes), float(at), json.loads(notes) if notes != "[]" else ())


def failed(error: Exception) -> bytes:
    """The answer of a scribe that could not."""
    return _FAILED + f"{type(error).__name__}: {error}".replace("\n", " ").encode(errors="replace") + b"\n"


class Scribe:
    """The owner's end.

    Args:
        directory: The run directory.
        lock: Device and inode of the lock file, and the generation that holds it.
        rows: The metric journal that is to be synced before each manifest; None for none.

    Raises:
        OSError: No process can be started.
    """

    def __init__(self, directory: Path, *, lock: tuple[int, int, int], rows: Path | None) -> None:
        self._socket, other = socket.socketpair()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            self._socket.settimeout(_TIMEOUT_SECONDS)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "resumable_trainer.snapshot.scribe_process"],
                env=_environment(),
                stdin=other.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            other.close()
        self.rows = rows
        self._is_ready = self._is_at_end = False
        self._received = b""
        self._late = 0  # answers in a row that had to be waited for
        begin = {"directory": str(directory), "lock": lock, "rows": rows and str(rows), "parent": os.getpid()}
        with contextlib.suppress(OSError):  # then it never becomes ready
            send(self._socket, begin)

    def is_ready(self) -> bool:
        """Whether it has started and can be given orders; never waits.

        Raises:
            ScribeError: It will never be.
        """
        if not self._is_ready and self.has_answered():
            self._answer()
            self._is_ready = True
        return self._is_ready

    def order(self, order: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Let it commit a snapshot; one at a time, each followed by `answer`.

        Args:
            order: `manifest` (its fields but `files`; those to be remembered may be left out when they are as in the
                order before), `delete` (names of snapshots to be deleted then).
            files: Content of all files but the manifest, by name.

        Raises:
            ScribeError: It is not there, or cannot be told.
        """
        try:
            send(self._socket, order, files)
        except (OSError, TypeError, ValueError) as error:  # gone, or a value that JSON has no form for
            raise ScribeError(str(error)) from error

    def has_answered(self) -> bool:
        """Whether `answer` would not wait."""
        if not self._is_at_end and b"\n" not in self._received:
            try:
                # As it is: the socket's own methods would first ask whether there is something, a call more.
                piece = os.read(self._socket.fileno(), _ANSWER_BYTES)
            except BlockingIOError:
                return False
            except OSError:
                piece = b""
            self._received += piece
            self._is_at_end = not piece
        return self._is_at_end or b"\n" in self._received

    def answer(self) -> Committed:
        """Wait until the snapshot is durable.

        Raises:
            ScribeError: It could not be made durable, or the scribe is gone.
        """
        self._late = 0 if self.has_answered() else self._late + 1
        if self._late == _TOO_OFTEN_LATE:
            self._hurry()
        try:
            return Committed.of_line(self._answer())
        except ValueError as error:
            raise ScribeError(f"no answer: {error}") from error

    def _answer(self) -> bytes:
        while not self.has_answered():
            if not select.select([self._socket], [], [], _TIMEOUT_SECONDS)[0]:
                raise ScribeError("no answer: timed out")
        line, newline, self._received = self._received.partition(b"\n")
        if not newline:
            raise ScribeError("it is gone")
        if line.startswith(_FAILED):
            raise ScribeError(line.removeprefix(_FAILED).decode())
        return line

    def _hurry(self) -> None:
        """Let it interrupt others on its way, on any core: on a busy machine the training would wait for it."""
        move_anywhere(self._process.pid)
        with contextlib.suppress(OSError):
            os.sched_setscheduler(self._process.pid, os.SCHED_OTHER, os.sched_param(0))

    def close(self) -> None:
        """End it; what it has begun it finishes."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def can_be_used() -> bool:
    """Whether this system ends a process when its parent dies."""
    return sys.platform.startswith("linux")


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    package = str(Path(__file__).parents[2])  # this package, also where it is not installed
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
    return environment


def send(connection: socket.socket, fields: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> None:
    """Send one message: plain values, and files by name."""
    files = files or {}
    line = json.dumps([fields, [[name, len(data)] for name, data in files.items()]]).encode() + b"\n"
    connection.sendall(b"".join([line, *files.values()]))


def receive(connection: socket.socket) -> tuple[dict[str, Any], dict[str, bytes]] | None:
    """The next message; None at the end.

    Raises:
        ValueError: Something else came.
    """
    data = bytearray()
    while (end := data.find(b"\n")) < 0:
        if len(data) > _MAX_LINE_BYTES:
            raise ValueError("a message without an end")
        if not _more(connection, data):
            return None
    fields, lengths = json.loads(data[:end])
    total = end + 1 + sum(length for _, length in lengths)
    while len(data) < total:
        if not _more(connection, data):
            return None
    files, start = {}, end + 1
    for name, length in lengths:
        files[name] = bytes(data[start : start + length])
        start += length
    return fields, files


def _more(connection: socket.socket, data: bytearray) -> bool:
    piece = connection.recv(1 << 16)
    data += piece
    return bool(piece)
