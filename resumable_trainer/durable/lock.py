"""The run's lock: one writer per run directory, and who it is.

Policy: `flock` (through filelock) on `run.lock`, held open for the life of the run and never
unlinked; a live holder is never waited for. The kernel frees it when the holder dies, however it
dies. Forked children close their copy of the descriptor (filelock does, from 4.0 on) and never
unlock: a flock belongs to all copies, so a data-loader worker that outlives a killed trainer would
keep the run locked, and one that unlocks would free it under the trainer. Where a file system has
no flock, a run does not start: a marker file instead would outlive its holder.

The owner's record lies inside the file, one padded line written in place. It is for people and for
lookers, who never take the lock: trying it would make a start in that instant fail. The *generation*
in it grows by one at each launch and is stamped into every manifest, so that a process thought dead
cannot publish. A filelock before 4.2.3 empties the file when it takes the lock, and the record with it.

Cost: one sync at launch; noting the step is one small write.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
import weakref
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.digest import close_after_reading, open_regular
from resumable_trainer.durable.files import Files, make_directories
from resumable_trainer.errors import RunHeldError, SettingsError, SnapshotWriteError

if TYPE_CHECKING:
    from collections.abc import Iterator

_RECORD_BYTES = 2048
_MAX_COMMAND_BYTES = 1024
_MAX_READS = 100
_SETTLING_SECONDS = 0.5
_MAX_GENERATION, _MAX_PID = 2**62, 2**31 - 1
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
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
        seen: When it last gave a sign of life (ISO 8601, UTC); empty if it was of a version that notes none.
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
    seen: str = ""
    command: str = ""
    released: bool = False

    def __str__(self) -> str:
        step = "before its first snapshot" if self.step is None else f"at step {self.step}"
        return f"pid {self.pid} on {self.host} since {self.since}, {step}"


class RunLock:
    """The lock of one run directory.

    Args:
        path: The lock file, `run.lock` in the run directory; both are made if they are not there.
        files: Primitive operations.

    Attributes:
        previous: Who held the run before, as it was last seen; None if nobody did, or if it is not known.
    """

    def __init__(self, path: Path, *, files: Files | None = None) -> None:
        from filelock import FileLock  # here, for who only reads who holds a run

        self._path = Path(path)
        self._files = files if files is not None else Files()
        # thread_local=False: the thread that writes snapshots checks the lock that the training thread took.
        self._flock = FileLock(str(self._path), timeout=0, thread_local=False, fallback_to_soft=False)
        self._fd = -1  # our own, for the record; the one that carries the flock is filelock's
        self._owner: Owner | None = None
        self.previous: Owner | None = None
        self._record_lock = threading.Lock()

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
            SettingsError: The directory's file system has no locks.
            SnapshotWriteError: The owner's record could not be made durable.
        """
        self._take()
        try:
            last = self.previous = read_owner(self._path)
            generation = 1 + max(known_generation, last.generation if last else 0)
            owner = _myself(generation, _shortened(command))
            self._write_record(owner)
            self._files.sync(self._fd)
        except OSError as error:
            self._let_go()
            raise SnapshotWriteError(
                f"{self._path} could not be written: {error}",
                path=self._path,
                hint="free space or repair the disk, then start it again",
            ) from error
        except BaseException:
            self._let_go()
            raise
        self._owner = owner
        return owner

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
        """Let others see how far the run is; not synced, and no reason to stop if it cannot be written."""
        if self._owner is not None:
            with contextlib.suppress(OSError):  # `check` reads it back before anything is published
                self._write_record(replace(self._owner, step=step, seen=_now()))

    def check(self) -> None:
        """Make sure that this process may still publish.

        Raises:
            RunHeldError: The lock file was removed or replaced, or a later launch has taken the run.
        """
        with self._record_lock:
            check_still_ours(self._path, self.identity, self.generation)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the lock file that is held."""
        found = os.fstat(self._fd)
        return found.st_dev, found.st_ino

    def release(self) -> None:
        """Let go in good order; a second call does nothing."""
        if self._owner is None:
            return
        with contextlib.suppress(OSError):  # on a vanished directory there is nothing left to tell
            self._write_record(replace(self._owner, released=True, seen=_now()))
        self._let_go()

    def _take(self) -> None:
        assert self._fd < 0, "this object holds the lock already"
        make_directories(self._files, self._path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o666)
        _held.add(self)
        try:
            self._lock_unless_held()
            # Invariant: the flock is on the file that has the name. Opened before, looked at after.
            if not os.path.samestat(os.stat(self._path), os.fstat(self._fd)):
                raise self._refusal(None)
        except BaseException:
            self._let_go()
            raise

    def _lock_unless_held(self) -> None:
        """Take the flock; a holder that lives is not waited for.

        One whose record says that it has gone, or that has none yet, is given an instant: it has just
        won the race and is about to sign, or only notes how the run before this one ended.
        """
        from filelock import Timeout

        deadline = time.monotonic() + _SETTLING_SECONDS
        while True:
            try:
                self._flock.acquire(timeout=0)
                return
            except Timeout:
                owner = read_owner(self._path)
                is_living = owner is not None and is_alive(owner) is not False
                if is_living or time.monotonic() > deadline:
                    raise self._refusal(owner if is_living else None) from None
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    raise self._lockless(error) from error
                raise
            time.sleep(0.01)

    def _let_go(self) -> None:
        _held.discard(self)
        self._owner = None
        fd, self._fd = self._fd, -1
        # The kernel lets go of descriptor and flock also when it reports an error.
        if fd >= 0:
            close_after_reading(fd)
        with contextlib.suppress(OSError):
            self._flock.release(force=True)

    def _write_record(self, owner: Owner) -> None:
        """Write the record in place; what it says is what `owner` says from then on."""
        line = json.dumps(asdict(owner)).encode()
        assert len(line) < _RECORD_BYTES
        with self._record_lock:
            if os.pwrite(self._fd, line.ljust(_RECORD_BYTES - 1) + b"\n", 0) != _RECORD_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            if self._owner is not None:
                self._owner = owner

    def _lockless(self, error: OSError) -> SettingsError:
        return SettingsError(
            f"run {self._path.parent} cannot be locked: its file system has no flock ({error.strerror})",
            path=self._path,
            hint="mount it with locks (Lustre: -o flock; NFS: not nolock), or put the run on another disk",
        )

    def _refusal(self, owner: Owner | None) -> RunHeldError:
        who = str(owner) if owner else "another process that has not said yet who it is"
        return RunHeldError(
            f"run {self._path.parent} is held by {who}",
            path=self._path,
            found=owner,
            hint="wait for it, or stop it with: resumable-trainer stop " + str(self._path.parent),
        )

    def _close_in_child(self) -> None:
        """Close our inherited descriptor; filelock closes its own, and neither unlocks anything."""
        close_after_reading(self._fd)
        self._fd = -1
        self._owner = None


def check_still_ours(path: Path, identity: tuple[int, int], generation: int) -> None:
    """Make sure that the launch which took a lock may still publish.

    Args:
        path: The lock file.
        identity: Device and inode that it had when it was taken.
        generation: Of that launch.

    Raises:
        RunHeldError: The lock file was removed or replaced, or a later launch has taken the run.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise _lost(path, "its lock file is gone", generation) from None
    if (found.st_dev, found.st_ino) != identity:
        raise _lost(path, "its lock file was replaced", generation)
    owner = read_owner(path)
    if owner is None:
        raise _lost(path, "the record in its lock file was damaged", generation)
    if owner.generation != generation:
        raise _lost(path, f"it was superseded by generation {owner.generation}", generation)


def _lost(path: Path, reason: str, generation: int) -> RunHeldError:
    return RunHeldError(
        f"run {path.parent} is no longer ours: {reason}",
        path=path,
        found=reason,
        expected=f"generation {generation}",
        hint="nothing was published; look who else uses this run directory",
    )


@contextlib.contextmanager
def held_as_it_is(path: Path) -> Iterator[None]:
    """Hold a lock file that is there, without waiting and without making anything: its maker may be removing it.

    Raises:
        BlockingIOError: Somebody holds it.
        OSError: It is not there (any more).
    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.stat(path), os.fstat(fd)):
            raise FileNotFoundError(errno.ENOENT, "it was replaced", str(path))
        yield
    finally:
        close_after_reading(fd)


def _close_all_in_child() -> None:
    for lock in list(_held):
        lock._close_in_child()
    _held.clear()


os.register_at_fork(after_in_child=_close_all_in_child)


def read_owner(path: Path) -> Owner | None:
    """The record in a lock file; None if there is none (yet). Takes no lock and waits for nobody."""
    try:
        fd = open_regular(path)
    except (FileNotFoundError, ValueError):
        return None
    try:
        return _owner_from(json.loads(_stable_record(fd).decode()))
    except (ValueError, RecursionError):  # torn or foreign: nothing is learnt, and the manifests know the generation
        return None
    finally:
        close_after_reading(fd)


def _stable_record(fd: int) -> bytes:
    """The record, read until two reads agree: one beside a write may see a mix of two (1 in 100 under load)."""
    record = os.pread(fd, _RECORD_BYTES, 0)
    for _ in range(_MAX_READS):
        again = os.pread(fd, _RECORD_BYTES, 0)
        if again == record:
            break
        record = again
    return record


def _owner_from(fields: Any) -> Owner | None:
    try:
        owner = Owner(**fields)
    except TypeError:
        return None
    # A pid below 1 means a group of processes, or all of them, to those who send signals to the owner.
    is_sound = _is_number(owner.generation, 0, _MAX_GENERATION) and _is_number(owner.pid, 1, _MAX_PID)
    return owner if is_sound else None


def _is_number(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


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
    pid, now = os.getpid(), _now()
    return Owner(
        host=socket.gethostname(),
        pid=pid,
        boot_id=_boot_id(),
        process_start=_process_start(pid),
        since=now[:19] + now[-6:],
        generation=generation,
        seen=now,
        command=command,
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _shortened(command: str) -> str:
    """As much of a command as the record holds, measured as JSON: one character takes up to twelve bytes."""
    command = command[:_MAX_COMMAND_BYTES]
    while len(json.dumps(command)) > _MAX_COMMAND_BYTES:
        command = command[: len(command) * 3 // 4]
    return command


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
