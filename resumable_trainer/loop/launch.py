"""How this process was started, and how the command line hands a run to the script it starts.

The command line runs the script inside its own process, so that a service manager signals the
trainer itself, and so that the lock is taken and the signal handlers stand before torch is
imported. What it knows it leaves here; the script's `Run` picks it up. Free of torch.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import os
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.digest import digest_bytes
from resumable_trainer.durable.journal import Journal, read_rows_from_end
from resumable_trainer.durable.lock import RunLock, read_owner
from resumable_trainer.errors import RunHeldError
from resumable_trainer.snapshot.layout import EVENTS, RUN_LOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from resumable_trainer.loop.probe import Probe


@dataclass(frozen=True)
class Command:
    """A command that starts a training.

    Attributes:
        python: The interpreter's path.
        script: The script's absolute path; None if a module is run.
        module: The module's name (`python -m`); None if a script is run.
        args: Arguments after it.
        cwd: Working directory.
    """

    python: str
    script: str | None
    module: str | None
    args: tuple[str, ...]
    cwd: str

    @classmethod
    def current(cls) -> Command:
        """The command that started this process, whoever started it."""
        main = sys.modules.get("__main__")
        spec = getattr(main, "__spec__", None)
        module = None if spec is None else spec.name.removesuffix(".__main__")
        file = getattr(main, "__file__", None)
        script = None if module or not file else str(Path(file).resolve())
        return cls(sys.executable, script, module, tuple(sys.argv[1:]), str(Path.cwd()))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Command:
        """The way back of `to_json`."""
        return cls(**{**fields, "args": tuple(fields["args"])})

    def to_json(self) -> dict[str, Any]:
        """Plain values for `run.json` and the events."""
        return {**asdict(self), "args": list(self.args)}

    @property
    def name(self) -> str:
        """Name of the script or module, without suffix; names a run directory by default."""
        if self.script is not None:
            return Path(self.script).stem
        return self.module.rpartition(".")[2] if self.module else "interactive"

    def same_work(self, other: Command) -> bool:
        """Whether both start the same script with the same arguments in the same place."""
        mine, theirs = asdict(self), asdict(other)
        mine.pop("python"), theirs.pop("python")
        return mine == theirs

    def __str__(self) -> str:
        target = self.script if self.module is None else f"-m {self.module}"
        return " ".join(filter(None, [target, *self.args]))


@dataclass
class Handover:
    """What the command line hands to the `Run` in the script that it starts.

    Attributes:
        command: The command being run, as it is to be recorded.
        directory: The run directory for a script that names none.
        target: The run directory that was asked for, where `which` and `fresh` apply.
        which: Snapshot to continue from: "latest", "best", a step, "epoch:N".
        fresh: Set the old line aside first.
        strict: Refuse on drift.
        locks: Locks already taken, by resolved run directory.
        moved: Where runs are now, by the resolved directory in which they were recorded.
        on_event: Is told each event that is noted, with the run directory.
        probe: Gives what examines the runs of this process; None for a training.
    """

    command: Command | None = None
    directory: Path | None = None
    target: Path | None = None
    which: str = "latest"
    fresh: bool = False
    strict: bool = False
    locks: dict[Path, RunLock] = field(default_factory=dict)
    moved: dict[Path, Path] = field(default_factory=dict)
    on_event: Callable[[Path, Mapping[str, Any]], None] | None = None
    probe: Callable[[], Probe] | None = None

    def applies_to(self, directory: Path) -> bool:
        """Whether `which` and `fresh` are meant for this run directory."""
        return self.target is None or self.target.resolve() == directory.resolve()


@dataclass
class Process:
    """What this process has opened; one instance, `process`, because a process is one."""

    handover: Handover = field(default_factory=Handover)
    opened: dict[Path, int] = field(default_factory=dict)
    script: str | None = None
    failed: bool = False
    leaving: int = 0
    exit_recorded: bool = False

    def note_opened(self, directory: Path, generation: int) -> None:
        """Remember a run opened by this process; its exit will be noted in the run's events."""
        if not self.opened:
            atexit.register(self._at_exit, os.getpid())
            command = self.handover.command or Command.current()
            self.script = command.script
        self.opened[directory.resolve()] = generation

    def note_failure(self) -> None:
        """The process ends by an uncaught exception."""
        self.failed = True

    def note_leaving(self, code: int) -> None:
        """A run is left on the way out of the process, which ends with this exit code: at its exit nobody is told."""
        self.leaving = code

    def _at_exit(self, pid: int) -> None:
        if os.getpid() == pid and not self.exit_recorded and not self.failed:
            self.record_exit(self.leaving)

    def record_exit(self, code: int) -> None:
        """Note in the events of every run opened here how the process ended.

        Only this tells a later start that the whole command is done, and not merely one of the runs
        that it opens. A run that somebody else holds by now is left alone.
        """
        self.exit_recorded = True
        sources = source_digests(self.script) if code == 0 else {}
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        for directory, generation in self.opened.items():
            if not directory.is_dir():
                continue  # gone or moved: taking its lock would make it again
            try:
                _append_event(
                    directory,
                    {"event": "exited", "time": time, "generation": generation, "code": code, "sources": sources},
                )
            except (RunHeldError, OSError):
                continue  # best effort: without the note the next start merely takes the long way


process = Process()


def note_ended(directory: Path, *, unless: Sequence[str] = ("exited", "ended"), **fields: Any) -> None:
    """Note in a run's events how its last process ended; best effort.

    For whoever watched it. A run that somebody holds by now is left alone.

    Args:
        directory: The run directory.
        unless: Events of the last launch that make it needless.
        fields: `by`, `result` ("exit", "signal" or "hang"), `code` or `signal`.
    """
    owner = read_owner(directory / RUN_LOCK)
    if owner is None:
        return
    if any(event["generation"] == owner.generation for event in last_events(directory, unless).values()):
        return
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    with contextlib.suppress(RunHeldError, OSError):
        _append_event(directory, {"event": "ended", "time": time, "generation": owner.generation, **fields})


def _append_event(directory: Path, event: dict[str, Any]) -> None:
    lock = RunLock(directory / RUN_LOCK)
    with lock.held_again():
        journal = Journal.open(directory / EVENTS)
        try:
            journal.append(event)
            journal.sync()
        finally:
            journal.close()


def default_directory(command: Command) -> Path:
    """`runs/<name of the script>`, below the working directory."""
    return Path("runs") / command.name


def directory_for(named: str | os.PathLike[str] | None, command: Command) -> Path:
    """The run directory: the one that the script names (or where it has moved to), else the one handed over."""
    handover = process.handover
    if named is None:
        directory = handover.directory or default_directory(command)
    else:
        directory = handover.moved.get(Path(named).resolve(), Path(named))
    return directory if handover.probe is None else handover.probe().directory(directory)


def named_directory(directory: Path) -> Path:
    """Where the script says that a run lies, wherever it has moved to."""
    here = directory.resolve()
    return next((named for named, now in process.handover.moved.items() if now == here), here)


def source_digests(script: str | None) -> dict[str, str]:
    """Digest of every source file of the user's that this process has loaded, by absolute path.

    The script is named, because the interpreter forgets `__main__.__file__` before it exits.
    """
    digests = {}
    for file in [script, *(getattr(module, "__file__", None) for module in list(sys.modules.values()))]:
        if file and is_users(file):
            try:
                digests[str(Path(file).resolve())] = digest_bytes(Path(file).read_bytes())
            except OSError:
                continue
    return dict(sorted(digests.items()))


@functools.cache
def _foreign_roots() -> tuple[str, ...]:
    """Where the interpreter's, installed packages' and our own sources lie."""
    roots = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots.add(str(Path(__file__).parent.parent))
    return tuple(f"{root}{os.sep}" for path in roots for root in (path, os.path.realpath(path)))


def is_users(file: str) -> bool:
    """Whether a source file is the user's, not the interpreter's, an installed package's or ours."""
    return file.endswith(".py") and not file.startswith(_foreign_roots())


def unchanged_since(sources: dict[str, str]) -> bool:
    """Whether all source files still have the digests that were recorded; False if none were."""
    return bool(sources) and all(_digest_or_none(path) == digest for path, digest in sources.items())


def _digest_or_none(path: str) -> str | None:
    try:
        return digest_bytes(Path(path).read_bytes())
    except OSError:
        return None


def events_from_end(directory: Path, kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A run's events of some kinds, the newest first; no others are parsed."""
    path = directory / EVENTS
    if path.exists():
        marks = [f'"event":"{kind}"'.encode() for kind in kinds]
        yield from (row for row in read_rows_from_end(path, holding=marks) if row.get("event") in kinds)


def last_events(directory: Path, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The newest event of each kind since the newest launch began; reads back to there, however old the run is."""
    newest: dict[str, dict[str, Any]] = {}
    for event in events_from_end(directory, [*kinds, "launched"]):
        newest.setdefault(event["event"], event)
        if event["event"] == "launched":
            break
    return {kind: newest[kind] for kind in kinds if kind in newest}


@dataclass(frozen=True)
class Start:
    """How a run is started.

    Attributes:
        command: What to start.
        directory: Where that says the run lies, which is not where it is if it was moved or forked.
    """

    command: Command
    directory: Path


def recorded_start(directory: Path) -> Start | None:
    """How a run was started last; a fork that never was, as the run that it comes from.

    None if it was never started from a script.
    """
    newest: dict[str, Any] = next(events_from_end(directory, ("launched", "forked")), {})
    if newest.get("command") is None:
        return None
    named = newest.get("directory")
    return Start(Command.from_json(newest["command"]), directory.resolve() if named is None else Path(named))


def command_is_done(directory: Path, command: Command | None = None) -> bool:
    """Whether starting the recorded command again would do nothing at all.

    It would not if the process of the newest launch ran to its end with exit code 0, none of the
    user's source files has changed, and (where `command` is given) it is the recorded one.
    """
    events = last_events(directory, ("launched", "exited"))
    launched, exited = events.get("launched"), events.get("exited")
    if launched is None or exited is None or launched.get("command") is None:
        return False
    if exited["generation"] != launched["generation"] or exited["code"] != 0:
        return False
    recorded = Command.from_json(launched["command"])
    return (command is None or command.same_work(recorded)) and unchanged_since(exited["sources"])
