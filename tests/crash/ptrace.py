"""Watch, end or disturb a forked process at each system call that changes files (Linux on x86-64).

A seccomp filter in the child stops it at such calls alone, and ptrace lets the parent look: so a call is met
in the order in which it truly happens, whatever thread makes it, and everything else runs at full speed. strace
counts calls per name and per thread, which leaves calls of a second thread out of reach.

Sources: seccomp(2) SECCOMP_RET_TRACE, ptrace(2) PTRACE_EVENT_SECCOMP; a tracer that sets the number of the call to -1
there skips it, and the value put into the result register is what the caller gets.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_NUMBERS = {
    "open": 2, "close": 3, "write": 1, "mmap": 9, "pwrite64": 18, "writev": 20, "sendfile": 40, "flock": 73,
    "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84,
    "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "fchmod": 91, "mknod": 133, "sync": 162,
    "openat": 257, "mkdirat": 258, "mknodat": 259, "unlinkat": 263, "renameat": 264, "linkat": 265,
    "symlinkat": 266, "fchmodat": 268, "splice": 275, "sync_file_range": 277, "fallocate": 285, "pwritev": 296,
    "syncfs": 306, "renameat2": 316, "copy_file_range": 326, "pwritev2": 328, "io_uring_setup": 425, "openat2": 437,
}  # fmt: skip
_NAMES = {number: name for name, number in _NUMBERS.items()}
_OF_FD = frozenset(
    {"close", "write", "pwrite64", "writev", "flock", "fsync", "fdatasync", "ftruncate", "fchmod", "sync_file_range",
     "fallocate", "pwritev", "pwritev2", "syncfs", "sendfile"}
)  # fmt: skip
_OF_PATH = frozenset({"open", "truncate", "mkdir", "rmdir", "creat", "unlink", "chmod", "mknod"})
_OF_PATH_AT = frozenset({"openat", "mkdirat", "mknodat", "unlinkat", "fchmodat"})
_WRITES = frozenset({"write", "pwrite64"})
_COPIES = frozenset({"sendfile", "copy_file_range"})  # their bytes never pass through the caller's memory
_CREATING = os.O_CREAT | os.O_TRUNC
_PROT_WRITE, _MAP_SHARED, _MAP_ANONYMOUS = 0x2, 0x1, 0x20
# Offsets of registers in struct user (sys/user.h).
_RAX, _RDX, _ORIG_RAX = 10 * 8, 12 * 8, 15 * 8
_TRACEME, _POKEUSER, _CONT, _SYSCALL, _SETOPTIONS, _GETEVENTMSG, _GET_SYSCALL_INFO = 0, 6, 7, 24, 0x4200, 0x4201, 0x420E
_OPTIONS = 0x1 | 0x8 | 0x80 | 0x100000  # TRACESYSGOOD | TRACECLONE | TRACESECCOMP | EXITKILL
_WALL = 0x40000000
_HANGS_AFTER_SECONDS = 60
_EVENT_SECCOMP, _EVENT_CLONE = 7, 3
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


@dataclass
class Call:
    """One call that changes files below the directory watched, or an acknowledgement.

    Attributes:
        name: Of the system call; "ack" for an acknowledgement.
        path: What it acts on.
        target: The second path of a rename or link.
        data: Bytes to be written; the acknowledged name.
        offset: Where they go; None: where the file's own offset stands, or its end if it appends.
        length: Of a truncation, or of what is to be written.
        flags: Of an open.
        result: What it returned; None if it was not executed.
        thread: Which thread made it.
    """

    name: str
    path: str
    target: str = ""
    data: bytes = b""
    offset: int | None = None
    length: int = 0
    flags: int = 0
    result: int | None = None
    thread: int = 0

    def __str__(self) -> str:
        return (
            f"{self.name}({os.path.basename(self.path)}{' -> ' + os.path.basename(self.target) if self.target else ''})"
        )


@dataclass(frozen=True)
class Fail:
    """Let the call fail with this number, without being executed."""

    number: int


@dataclass(frozen=True)
class Short:
    """Let a write take no more than so many bytes."""

    num_bytes: int


KILL = "kill"
Decide = Callable[[Call, int], Fail | Short | str | None]


@dataclass
class Outcome:
    """How a traced process ended.

    Attributes:
        calls: What it did, in order.
        acked: Names it acknowledged.
        status: Exit status; negative: the signal.
        error: Class and message of the exception it ended with.
        was_met: Whether the call waited for came.
    """

    calls: list[Call] = field(default_factory=list)
    acked: list[str] = field(default_factory=list)
    status: int = 0
    error: str = ""
    was_met: bool = False


def why_not() -> str | None:
    """Why no process can be traced here; None if one can."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return "the tracer knows Linux on x86-64 only"
    try:
        outcome = trace(lambda acknowledge: acknowledge("x"), under="/nowhere")
    except OSError as error:
        return f"ptrace is not allowed here: {error}"
    return None if outcome.acked == ["x"] else f"ptrace or seccomp do not work here: {outcome}"


def trace(
    act: Callable[[Callable[[str], None]], None],
    *,
    under: Path | str,
    decide: Decide = lambda call, index: None,
    data: bool = False,
) -> Outcome:
    """Run `act` in a forked child, and decide at each of its calls that change files.

    Args:
        act: What the child does; it gets a function that acknowledges a name.
        under: The directory whose changes count.
        decide: Given a call and how many came before it: None lets it go on.
        data: Whether written bytes and results are recorded.
    """
    ack_out, ack_in = os.pipe()
    error_out, error_in = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(act, ack_in, error_in)
    os.close(ack_in)
    os.close(error_in)
    try:
        outcome = _Tracer(pid, os.fspath(under), ack_in, decide, data=data).run()
        outcome.acked = _read_all(ack_out).decode().split()
        outcome.error = _read_all(error_out).decode(errors="replace")
    finally:
        os.close(ack_out)
        os.close(error_out)
    return outcome


def _child(act: Callable[[Callable[[str], None]], None], ack: int, error: int) -> None:
    status = 0
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_HANGS_AFTER_SECONDS)
    try:
        _libc.ptrace(_TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        _install_filter()
        act(lambda name: void(os.write(ack, name.encode() + b"\n")))
    except BaseException as problem:  # noqa: BLE001 - told to the parent
        status = 7
        where = traceback.format_exc().strip().splitlines()
        kinds = "/".join(kind.__name__ for kind in type(problem).__mro__[:-1])
        os.write(error, f"{kinds}: {problem}\n{chr(10).join(where[-6:])}".encode()[:3000])
    finally:
        os._exit(status)


def void(value: object) -> None:
    """Take a value and give none."""


def _install_filter() -> None:
    """Trap exactly the calls of the table; everything else runs as ever."""
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    numbers = list(_NUMBERS.values())
    program = [struct.pack("<HBBI", load, 0, 0, 0)]
    for place, number in enumerate(numbers):
        program.append(struct.pack("<HBBI", equal, len(numbers) - place, 0, number))
    program.append(struct.pack("<HBBI", give, 0, 0, 0x7FFF0000))  # SECCOMP_RET_ALLOW
    program.append(struct.pack("<HBBI", give, 0, 0, 0x7FF00000))  # SECCOMP_RET_TRACE
    code = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code))
    if _libc.prctl(38, 1, 0, 0, 0) or _libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp filter refused")


def _read_all(fd: int) -> bytes:
    pieces = []
    while piece := os.read(fd, 65536):
        pieces.append(piece)
    return b"".join(pieces)


class _Tracer:
    def __init__(
        self,
        pid: int,
        under: str,
        ack: int,
        decide: Decide,
        *,
        data: bool,
    ) -> None:
        self._pid = pid
        self._under = under
        self._ack = ack
        self._decide = decide
        self._data = data
        self._count = 0
        self._pending: dict[int, tuple[Call, int]] = {}  # by thread: the call it is in, and its first argument
        self._outcome = Outcome()

    def run(self) -> Outcome:
        os.waitpid(self._pid, 0)
        self._ptrace(_SETOPTIONS, self._pid, _OPTIONS)
        self._ptrace(_CONT, self._pid, 0)
        while True:
            tid, status = os.waitpid(-1, _WALL)
            if os.WIFSTOPPED(status):
                self._stopped(tid, status)
            elif tid == self._pid:
                self._outcome.status = os.waitstatus_to_exitcode(status)
                return self._outcome

    def _ptrace(self, request: int, tid: int, data: int, address: int = 0) -> None:
        if _libc.ptrace(request, tid, address, data) < 0 and ctypes.get_errno() != errno.ESRCH:
            raise OSError(ctypes.get_errno(), f"ptrace request {request:#x} failed")

    def _stopped(self, tid: int, status: int) -> None:
        event, number = status >> 16, os.WSTOPSIG(status)
        if event == _EVENT_SECCOMP:
            self._at_entry(tid)
        elif number == signal.SIGTRAP | 0x80:
            self._at_exit(tid)
            self._ptrace(_CONT, tid, 0)
        else:
            is_for_tracer = event or number in (signal.SIGSTOP, signal.SIGTRAP)
            self._ptrace(_CONT, tid, 0 if is_for_tracer else number)

    def _info(self, tid: int) -> tuple[tuple[int, ...], int]:
        """Number and arguments at an entry, result at an exit (struct ptrace_syscall_info)."""
        buffer = ctypes.create_string_buffer(88)
        _libc.ptrace(_GET_SYSCALL_INFO, tid, len(buffer), ctypes.addressof(buffer))
        raw = buffer.raw
        return struct.unpack_from("<7Q", raw, 24), struct.unpack_from("<q", raw, 24)[0]

    def _at_entry(self, tid: int) -> None:
        (number, *args), _ = self._info(tid)
        call = self._call(tid, _NAMES[number], args)
        if call is None:
            self._ptrace(_CONT, tid, 0)
            return
        call.thread = tid
        self._outcome.calls.append(call)
        decision = None
        if call.name != "ack":
            decision = self._decide(call, self._count)
            self._count += 1
        self._outcome.was_met |= decision is not None
        if decision == KILL:
            os.kill(self._pid, signal.SIGKILL)
            return
        if isinstance(decision, Fail):
            self._ptrace(_POKEUSER, tid, -1, _ORIG_RAX)
            self._ptrace(_POKEUSER, tid, -decision.number, _RAX)
        if isinstance(decision, Short):
            self._ptrace(_POKEUSER, tid, min(decision.num_bytes, args[2]), _RDX)
        if self._data and not isinstance(decision, Fail):
            self._pending[tid] = call, args[2] if call.name == "copy_file_range" else args[0]
            self._ptrace(_SYSCALL, tid, 0)
        else:
            self._ptrace(_CONT, tid, 0)

    def _at_exit(self, tid: int) -> None:
        call, fd = self._pending.pop(tid)
        call.result = self._info(tid)[1]
        if call.name in _COPIES and call.result > 0:
            with open(f"/proc/{tid}/fd/{fd & 0xFFFFFFFF}", "rb") as file:
                file.seek(call.offset or 0)
                call.data = file.read(call.result)

    def _call(self, tid: int, name: str, args: list[int]) -> Call | None:
        """The call if it changes something below the directory watched."""
        call: Call | None = None
        if name in _OF_FD:
            call = self._call_of_fd(tid, name, args)
        elif name in _OF_PATH:
            call = Call(name, self._path(tid, -100, args[0]), flags=args[1], length=args[1])
        elif name in _OF_PATH_AT:
            call = Call(name, self._path(tid, args[0], args[1]), flags=args[2])
        elif name in ("rename", "link"):
            call = Call(name, self._path(tid, -100, args[0]), self._path(tid, -100, args[1]))
        elif name in ("renameat", "renameat2", "linkat"):
            call = Call(name, self._path(tid, args[0], args[1]), self._path(tid, args[2], args[3]))
        elif name == "symlink":
            call = Call(name, self._path(tid, -100, args[1]))
        elif name == "symlinkat":
            call = Call(name, self._path(tid, args[1], args[2]))
        elif name == "copy_file_range":
            call = self._copy(tid, name, args[2], args[3])
        elif name == "splice":
            call = Call(name, self._fd_path(tid, args[2]))
        elif name == "openat2":
            call = Call(name, self._path(tid, args[0], args[1]), flags=_CREATING)
        elif name == "mmap" and args[2] & _PROT_WRITE and args[3] & _MAP_SHARED and not args[3] & _MAP_ANONYMOUS:
            call = Call(name, self._fd_path(tid, args[4]))
        elif name in ("sync", "io_uring_setup"):  # whatever is done through a ring is seen by no tracer
            call = Call(name, self._under)
        if call is None or (call.name in ("open", "openat") and not call.flags & _CREATING):
            return None
        if call.name == "ack" or self._is_watched(call.path) or (call.target and self._is_watched(call.target)):
            return call
        # The sync that makes the name of the directory itself durable.
        return call if call.name == "fsync" and call.path == os.path.dirname(self._under) else None

    def _is_watched(self, path: str) -> bool:
        return (path + "/").startswith(self._under + "/")

    def _call_of_fd(self, tid: int, name: str, args: list[int]) -> Call:
        fd = args[0]
        if fd == self._ack and name == "write":
            return Call("ack", "", data=self._memory(tid, args[1], args[2]))
        if name == "sendfile":
            return self._copy(tid, name, fd, 0)
        length = args[2] if name in _WRITES else args[1]
        call = Call(name, self._fd_path(tid, fd), length=length)
        if name == "writev":
            pieces = struct.iter_unpack("<QQ", self._memory(tid, args[1], 16 * args[2]))
            call.data = b"".join(self._memory(tid, *piece) for piece in pieces) if self._data else b""
        if name in _WRITES and self._data:
            call.data = self._memory(tid, args[1], args[2])
        if name == "pwrite64":
            call.offset = args[3]
        if name in ("write", "writev") and self._data:
            call.offset = self._offset(tid, fd)
        return call

    def _copy(self, tid: int, name: str, fd: int, offset: int) -> Call:
        """A copy into a file within the kernel; where to is told, if at all, by a number at an address."""
        call = Call(name, self._fd_path(tid, fd))
        if self._data and self._is_watched(call.path):
            at = struct.unpack("<Q", self._memory(tid, offset, 8))[0] if offset else self._offset(tid, fd)
            assert at is not None, "a copy to the end of a file that is open for appending"
            call.offset = at
        return call

    def _offset(self, tid: int, fd: int) -> int | None:
        """The file offset; None if the file is open for appending."""
        with open(f"/proc/{tid}/fdinfo/{fd}") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        return None if int(fields["flags"], 8) & os.O_APPEND else int(fields["pos"])

    def _fd_path(self, tid: int, fd: int) -> str:
        try:
            return os.readlink(f"/proc/{tid}/fd/{fd & 0xFFFFFFFF}")
        except OSError:
            return ""

    def _path(self, tid: int, directory: int, address: int) -> str:
        text = os.fsdecode(self._memory(tid, address, 4096, string=True))
        if text.startswith("/"):
            return os.path.normpath(text)
        at_cwd = directory & 0xFFFFFFFF == 0xFFFFFF9C
        base = os.readlink(f"/proc/{tid}/cwd") if at_cwd or directory == -100 else self._fd_path(tid, directory)
        return os.path.normpath(os.path.join(base, text))

    def _memory(self, tid: int, address: int, length: int, *, string: bool = False) -> bytes:
        fd = os.open(f"/proc/{tid}/mem", os.O_RDONLY)
        try:
            if not string:
                return os.pread(fd, length, address)
            end = (address | 4095) + 1  # a string may end just before memory that is not there
            text = os.pread(fd, min(length, end - address), address)
            if b"\0" not in text:
                text += os.pread(fd, length, end)
            return text.partition(b"\0")[0]
        finally:
            os.close(fd)
