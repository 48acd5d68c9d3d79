"""L8: run directories made by an enemy, opened under limits: an error of ours says what is wrong, or it does no harm.

Most of them carry digests that fit, since anybody can compute those: they get past `verify` to the parsers. Each is
opened in a process of its own that has little memory and little time, through every door: `verify` and `Reader`,
the commands that look, and the restore or the training at last. An audit hook sees what Python is asked to do
(PEP 578); a directory beside the run shows whether anything was touched out there.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import damage
import hostile_directories
import hostile_manifests
import hostile_tensors
import hostile_values
import oracle
from damage import NEWER, OLDER, Holder, fingerprint, marked
from faults import in_parallel, make_ready
from forge import snapshot
from hostile_directories import OUTSIDE
from lab import Count
from scenarios import SCENARIOS, Training

from resumable_trainer import StateManager
from resumable_trainer.cli.main import main
from resumable_trainer.durable.files import Files
from resumable_trainer.durable.journal import Journal
from resumable_trainer.errors import ExitCode, ResumableTrainerError
from resumable_trainer.loop import launch
from resumable_trainer.metrics.account import NOTED, Account
from resumable_trainer.snapshot.layout import EVENTS
from resumable_trainer.snapshot.reader import Reader
from resumable_trainer.snapshot.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from forge import Case
    from lab import Lab

MEMORY_BYTES = 2 << 30  # beyond what importing has taken
CPU_SECONDS, WALL_SECONDS = 5, 60  # for each door alone, and for all of them
_SHORT_SAMPLE = 60
_SECRET = b"nobody's business"
_FORBIDDEN = frozenset(
    {
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "os.forkpty",
        "os.putenv",
        "socket.__new__",
        "socket.connect",
        "pickle.find_class",
        "marshal.loads",
        "ctypes.dlopen",
        "import",
        "compile",
        "webbrowser.open",
    }
)
_CHANGING = frozenset(
    {
        "os.chmod",
        "os.chown",
        "os.link",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.symlink",
        "os.truncate",
        "os.utime",
        "shutil.rmtree",
    }
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@functools.cache
def all_cases() -> list[Case]:
    """Every hostile run directory."""
    modules = (hostile_tensors, hostile_manifests, hostile_values, hostile_directories)
    return [case for module in modules for case in module.cases()]


def run(lab: Lab) -> Count:
    """All of them in the long form; in the short one those that are always tried, and a drawn sample."""
    if not sys.platform.startswith("linux"):
        return Count(skipped="memory of a process is limited on Linux only")
    numbers = list(range(len(all_cases())))
    if not lab.long:
        always = {number for number in numbers if _is_always_tried(all_cases()[number])}
        numbers = sorted(always | set(random.Random(lab.seed).sample(numbers, _SHORT_SAMPLE)))
    return open_all(lab.scratch, numbers)


def _is_always_tried(case: Case) -> bool:
    """Few of a kind, and each its own: links and devices, names of code, lying offsets."""
    return case.group == "file kinds" or case.name.startswith(("$enum", "weights with offsets"))


def open_all(scratch: Path, numbers: list[int]) -> Count:
    """Make and open those of `all_cases` that have these numbers."""
    make_ready()
    make_sound(scratch)
    return in_parallel(functools.partial(judge, scratch), numbers)


def make_sound(scratch: Path) -> None:
    """Two sound runs, of which each hostile one is a copy; whatever is imported late is imported now."""
    damage.make_run(scratch / "snapshots")
    SCENARIOS["journal rewind"].prepare(scratch / "trained")
    _note_account(scratch / "trained")
    for trained in (False, True):
        with _copied(scratch, "warm", trained=trained) as directory:
            doors = _doors(directory / "run", refused=False, trained=trained)
            _quietly(functools.partial(_opened, doors, is_limited=False))
    launch.process.opened.clear()


def _note_account(run: Path) -> None:
    """As a long run does among its events: to read that back, more is imported."""
    account, upto = Account.read_up_to(run / EVENTS)
    journal = Journal.open(run / EVENTS, files=Files())
    journal.append({"event": NOTED, **account.noted(upto)})
    journal.close()


@contextlib.contextmanager
def _copied(scratch: Path, name: str, *, trained: bool) -> Any:
    """A directory with a copy of a sound run, and something precious beside it."""
    directory = scratch / name
    shutil.copytree(scratch / ("trained" if trained else "snapshots"), directory / "run")
    (directory / OUTSIDE).mkdir()
    (directory / OUTSIDE / "precious").write_bytes(_SECRET)
    try:
        yield directory
    finally:
        # A directory thousands deep is beyond shutil.
        if shutil.rmtree.avoids_symlink_attacks and not os.system(f"rm -rf '{directory}'") == 0:  # noqa: S605
            raise RuntimeError(f"{directory} is still there")


def judge(scratch: Path, number: int) -> Count:
    """Make one case and open it."""
    count, case = Count(), all_cases()[number]
    with _copied(scratch, f"case-{number}", trained=case.trained) as directory:
        try:
            case.make(directory / "run")
        except PermissionError:  # devices are made by root
            return count
        before = _outside(directory)
        doors = _doors(directory / "run", refused=case.refused, trained=case.trained)
        broken = in_child(functools.partial(_opened, doors, is_limited=True), directory)
        if _outside(directory) != before:
            broken.append("something outside the run directory was changed")
    count.add(case.group, [f"{case.group}: {case.name}: {line}" for line in broken])
    return count


def _outside(directory: Path) -> list[tuple[str, int, bytes]]:
    """Every name beside the run, with its kind and content."""
    paths = sorted((directory / OUTSIDE).rglob("*"))
    return [(str(p), p.lstat().st_mode, p.read_bytes() if p.is_file() and not p.is_symlink() else b"") for p in paths]


# -- doors --------------------------------------------------------------------------------------------


Door = tuple[str, "Callable[[], list[str]]"]


def _doors(run: Path, *, refused: bool, trained: bool) -> list[Door]:
    """Every door, with its name; those that change the run come last."""
    doors: list[Door] = [] if trained else [("read", lambda: _read(snapshot(run), refused=refused))]
    for command in ("list", "show", "verify", "status"):
        doors.append((command, functools.partial(_command, [command, str(run)])))
    doors.append(("diff", lambda: _command(["diff", f"{run}:1", f"{run}:2"])))
    return [
        *doors,
        ("training", lambda: _train(run)) if trained else ("restore", lambda: _restore(run, refused=refused)),
    ]


def _opened(doors: list[Door], *, is_limited: bool) -> list[str]:
    """What is broken behind any door; one that takes too long ends the process, if it is limited."""
    broken = []
    for name, door in doors:
        if is_limited:
            limit = math.ceil(time.process_time()) + CPU_SECONDS
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            broken += [f"{name}: {line}" for line in door()]
        except ResumableTrainerError:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, a user would see it
            broken.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    return broken


def _read(path: Path, *, refused: bool) -> list[str]:
    Reader(path, verify(path)).sections()
    return ["was read, and should have been refused"] if refused else []


def _command(arguments: list[str]) -> list[str]:
    code = main(arguments)
    return [] if code in {*ExitCode, 1} else [f"exit code {code}"]


def _restore(run: Path, *, refused: bool) -> list[str]:
    holder = Holder()
    with StateManager(run, state={"part": holder}) as manager:
        found = manager.restore().snapshot
    if found == NEWER and refused:
        return ["was restored, and should have been refused"]
    if found == OLDER and fingerprint(holder.tree) != fingerprint(marked(1)):
        return ["the older snapshot came back as another state"]
    return [] if found in (OLDER, NEWER) else [f"{found} was restored"]


def _train(run: Path) -> list[str]:
    training = Training()
    training.train(run)
    return [] if oracle.parameters(training) == oracle.golden_run()[1] else ["other parameters than an undisturbed run"]


# -- limits -------------------------------------------------------------------------------------------


def in_child(doors: Callable[[], list[str]], directory: Path) -> list[str]:
    """What `doors` finds in a forked process under limits, what that did on the side, and how it ended."""
    said, saying = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(said)
        watch = Watch(directory / "run")
        try:
            _limit()
            sys.addaudithook(watch)
            broken = _quietly(doors)
            watch.is_on = False
        except BaseException as error:  # noqa: BLE001 - told to the parent
            broken = [f"the doors end by {type(error).__name__}: {error}"]
        for line in broken + watch.seen:
            os.write(saying, line.encode(errors="backslashreplace").replace(b"\n", b" ")[:600] + b"\n")
        os._exit(0)
    os.close(saying)
    with os.fdopen(said, errors="replace") as file:
        lines = file.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        names = {
            -signal.SIGXCPU: f"a door took more than {CPU_SECONDS} s of CPU",
            -signal.SIGALRM: f"more than {WALL_SECONDS} s",
        }
        lines.append(names.get(status, f"ended with status {status}"))
    return lines


def _limit() -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WALL_SECONDS)


def _quietly(work: Callable[[], list[str]]) -> list[str]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return work()


class Watch:
    """An audit hook that notes what no file may bring about.

    Args:
        run: The only directory in which anything may be changed.
    """

    def __init__(self, run: Path) -> None:
        self.is_on = True
        self.seen: list[str] = []
        self._run = os.path.realpath(run)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event in _FORBIDDEN or (event == "os.kill" and args[1] != 0):
            self._note(event, args)
        elif event == "open" and isinstance(args[0], str | bytes) and _writes(args):
            self._changes(event, args[0])
        elif event in _CHANGING:
            for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
                if not isinstance(path, int):  # a descriptor was opened by a name
                    self._changes(event, path)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        line = f"on the side: {event} {str(args[:1])[:80]}"
        if line not in self.seen:
            self.seen.append(line)

    def _changes(self, event: str, path: Any) -> None:
        parent, name = os.path.split(os.fsdecode(path))
        real = os.path.join(os.path.realpath(parent), name)
        if real != os.devnull and not (real + "/").startswith(self._run + "/"):
            self._note(event, (real,))


def _writes(args: tuple[Any, ...]) -> bool:
    mode, flags = args[1], args[2]
    return any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool((flags or 0) & _WRITING)
