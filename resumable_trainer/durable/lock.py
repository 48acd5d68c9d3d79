"""The run's lock: one writer per run directory, and who it is.

Policy: `flock` (through filelock) on `run.lock`, held open for the life of the run, never waited
for and never unlinked. The kernel frees it when the holder dies, however it dies. Forked children
close their copy of the descriptor: a flock lives as long as any copy, and a data-loader worker that
outlives a killed trainer would keep the run locked.

The owner's record lies inside the file, one padded line written in place. It is for people and for
lookers, who never take the lock: trying it would make a start in that instant fail. The *generation*
in it grows by one at each launch and is stamped into every manifest, so that a process thought dead
cannot publish.

Cost: one sync at launch; noting the step is one small write.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
import weakref
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from resumable_trainer.errors import RunHeldError

if TYPE_CHECKING:
    from collections.abc import Iterator

_RECORD_BYTES = 2048
_MAX_COMMAND_CHARS = 512
_RECORD_WAIT_SECONDS = 0.5
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


@dataclass(frozen=True)
class Owner:
    """Who holds, or last held, a run.

    Attributes:
        host: Host name.
        pid: Process id there.
        boot_id: Which boot of that host; a pid means nothing after another one.
        process_start: Start time of the process in clock ticks since boot; a pid may be used again.
        since: When the run was taken (ISO 8601, UTC).
        generation: Number of the launch.
        step: Training step last noted; None before the first.
        command: What is running.
        released: Whether it has let go in good order.
    """

    host: str
    pid: int
    boot_id: str
    process_start: str
    since: str
    generation: int
    step: int | None = None
    command: str = ""
    released: bool = False

    def __str__(self) -> str:
        step = "before its first snapshot" if self.step is None else f"at step {self.step}"
        return f"pid {self.pid} on {self.host} since {self.since}, {step}"


class RunLock:
    """The lock of one run directory.

    Args:
        path: The lock file, `run.lock` in the run directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        # thread_local=False: the thread that writes snapshots checks the lock that the training thread took.
        self._flock = FileLock(str(self._path), timeout=0, thread_local=False)
        self._fd = -1
        self._inode: tuple[int, int] | None = None
        self._owner: Owner | None = None

    @property
    def owner(self) -> Owner:
        """This process's record."""
        assert self._owner is not None, "the lock is not held"
        return self._owner

    @property
    def generation(self) -> int:
        """Number of this launch."""
        return self.owner.generation

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._owner is not None

    def acquire(self, *, known_generation: int = 0, command: str = "") -> Owner:
        """Take the run, at once or not at all.

        Args:
            known_generation: The newest generation known from elsewhere (manifests), should the
                lock file have been lost.
            command: What to tell others.

        Raises:
            RunHeldError: Another process holds it; the message says who, since when, at which step.
        """
        self._take()
        try:
            last = read_owner(self._path)
            generation = 1 + max(known_generation, last.generation if last else 0)
            self._owner = _myself(generation, command[:_MAX_COMMAND_CHARS])
            self._write_record()
            os.fsync(self._fd)
        except BaseException:
            self._let_go()
            raise
        return self._owner

    @contextlib.contextmanager
    def held_again(self) -> Iterator[None]:
        """Hold the run for a moment without a new launch: the record stays as it is.

        Raises:
            RunHeldError: Another process holds it.
        """
        self._take()
        try:
            yield
        finally:
            self._let_go()

    def note_step(self, step: int) -> None:
        """Let others see how far the run is; not synced."""
        if self._owner is not None:
            self._owner = replace(self._owner, step=step)
            self._write_record()

    def check(self) -> None:
        """Make sure that this process may still publish.

        Raises:
            RunHeldError: The lock file was removed or replaced, or a later launch has taken the run.
        """
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            raise self._lost("its lock file is gone") from None
        if (found.st_dev, found.st_ino) != self._inode:
            raise self._lost("its lock file was replaced")
        owner = read_owner(self._path)
        if owner is None or owner.generation != self.generation:
            raise self._lost(f"it was superseded by generation {owner.generation if owner else 'unknown'}")

    def release(self) -> None:
        """Let go in good order; a second call does nothing."""
        if self._owner is None:
            return
        self._owner = replace(self._owner, released=True)
        with contextlib.suppress(OSError):  # on a vanished directory there is nothing left to tell
            self._write_record()
        self._let_go()
        self._owner = None

    def _take(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._flock.acquire(timeout=0)
        except Timeout:
            raise self._refusal() from None
        self._fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        status = os.fstat(self._fd)
        self._inode = (status.st_dev, status.st_ino)
        _held.add(self)

    def _let_go(self) -> None:
        _held.discard(self)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._flock.release(force=True)

    def _write_record(self) -> None:
        line = json.dumps(asdict(self.owner)).encode()
        os.pwrite(self._fd, line.ljust(_RECORD_BYTES - 1) + b"\n", 0)

    def _refusal(self) -> RunHeldError:
        owner = _owner_once_written(self._path)
        who = str(owner) if owner else "another process that has not said yet who it is"
        return RunHeldError(
            f"run {self._path.parent} is held by {who}",
            path=self._path,
            found=owner,
            hint="wait for it, or stop it with: resumable-trainer stop " + str(self._path.parent),
        )

    def _lost(self, reason: str) -> RunHeldError:
        return RunHeldError(
            f"run {self._path.parent} is no longer ours: {reason}",
            path=self._path,
            found=reason,
            expected=f"generation {self.generation}",
            hint="nothing was published; look who else uses this run directory",
        )

    def _close_in_child(self) -> None:
        """Close the inherited descriptors; the parent's lock is untouched, as nothing is unlocked."""
        flock_fd = getattr(getattr(self._flock, "_context", None), "lock_file_fd", None)
        for fd in (self._fd, flock_fd):
            # filelock closes its own from 4.0 on; by then the number may belong to another file.
            if fd is not None and fd >= 0 and _is_file(fd, self._inode):
                os.close(fd)
        self._fd = -1
        self._owner = None


def _is_file(fd: int, inode: tuple[int, int] | None) -> bool:
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == inode


def _close_all_in_child() -> None:
    for lock in list(_held):
        lock._close_in_child()
    _held.clear()


os.register_at_fork(after_in_child=_close_all_in_child)


def read_owner(path: Path) -> Owner | None:
    """The record in a lock file; None if there is none (yet). Takes no lock and waits for nobody."""
    try:
        with open(path, "rb") as file:
            fields = json.loads(file.read(_RECORD_BYTES))
    except FileNotFoundError:
        return None
    except ValueError:  # torn or foreign: people learn nothing from it, and the manifests know the generation
        return None
    return _owner_from(fields)


def _owner_from(fields: Any) -> Owner | None:
    try:
        owner = Owner(**fields)
    except TypeError:
        return None
    return owner if isinstance(owner.generation, int) and isinstance(owner.pid, int) else None


def _owner_once_written(path: Path) -> Owner | None:
    """The holder's record; the winner of a race may need an instant to write it."""
    deadline = time.monotonic() + _RECORD_WAIT_SECONDS
    while True:
        owner = read_owner(path)
        if (owner is not None and is_alive(owner) is not False) or time.monotonic() > deadline:
            return owner
        time.sleep(0.01)


def is_alive(owner: Owner) -> bool | None:
    """Whether the owner still runs; None if that cannot be known from this host."""
    if owner.released:
        return False
    if owner.host != socket.gethostname():
        return None
    if owner.boot_id != _boot_id():
        return False
    if owner.process_start:
        return _process_start(owner.pid) == owner.process_start
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _myself(generation: int, command: str) -> Owner:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    pid = os.getpid()
    return Owner(
        host=socket.gethostname(),
        pid=pid,
        boot_id=_boot_id(),
        process_start=_process_start(pid),
        since=now,
        generation=generation,
        command=command,
    )


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """Start time of a process in clock ticks since boot; "" if it is gone, a zombie, or not Linux."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # proc(5): the second field is the name in parentheses, which may hold spaces and parentheses itself.
    fields = stat.rpartition(")")[2].split()
    state, start = fields[0], fields[19]
    return "" if state in ("Z", "X") else start
