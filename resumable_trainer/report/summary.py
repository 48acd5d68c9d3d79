"""The facts of a run that commands and reports show, read from its directory."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.digest import reading
from resumable_trainer.durable.files import TEMPORARY_PREFIX
from resumable_trainer.durable.journal import read_rows_from_end
from resumable_trainer.durable.lock import Owner, is_alive, read_owner
from resumable_trainer.errors import DamagedSnapshotError, NotFoundError, SnapshotGoneError
from resumable_trainer.metrics.account import NOTED, Account
from resumable_trainer.metrics.goodput import seconds_of
from resumable_trainer.report.divergences import divergences
from resumable_trainer.snapshot import strict_json
from resumable_trainer.snapshot.layout import EVENTS, RUN_JSON, RUN_LOCK, SNAPSHOTS, parse_name
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumable_trainer.metrics.goodput import Goodput
    from resumable_trainer.snapshot.manifest import Manifest

DEFAULT_ROOT = Path("runs")
_MAX_IDENTITY_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One snapshot, as `list` shows it.

    Attributes:
        name: Its name.
        path: Where it lies.
        manifest: What it says; None if the manifest cannot be read.
        reason: Why it is not valid; None if it is.
        best: Whether it is the one with the best value of the early-stopping metric.
    """

    name: str
    path: Path
    manifest: Manifest | None
    reason: str | None
    best: bool = False

    def to_json(self) -> dict[str, Any]:
        """One object of `list --json`."""
        parsed = parse_name(self.name)
        assert parsed is not None
        at = self.manifest.position if self.manifest is not None else None
        return {
            "name": self.name,
            "step": parsed.step,
            "epoch": at.epoch if at else parsed.epochs_complete,
            "batch": at.batch if at else (0 if parsed.epochs_complete is not None else None),
            "epoch_complete": parsed.epochs_complete is not None,
            "bytes": _bytes_below(self.path),
            "valid": self.reason is None,
            "reason": self.reason,
            "best": self.best,
            "created": self.manifest.created if self.manifest else None,
            "metrics": self.manifest.metrics if self.manifest else None,
            "path": str(self.path),
        }


def _bytes_below(path: Path) -> int:
    return sum(entry.lstat().st_size for entry in path.iterdir()) if path.is_dir() and not path.is_symlink() else 0


def is_run(directory: Path) -> bool:
    """Whether a directory is that of a run."""
    try:
        return any((directory / name).exists() for name in (RUN_JSON, RUN_LOCK, SNAPSHOTS))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # nothing can be there
            return False
        raise


def require_run(directory: Path) -> Path:
    """The directory, if it is a run's.

    Raises:
        NotFoundError: It is not.
    """
    if not is_run(directory):
        what = "no run" if os.access(directory, os.F_OK) else "not there"
        raise NotFoundError(
            f"{directory} is {what}", path=directory, hint="a run directory holds run.json; look below runs/"
        )
    return directory


def runs_below(root: Path) -> list[Path]:
    """Run directories below `root`; one in the making (a fork, an import) is none yet."""
    entries = sorted(root.iterdir()) if root.is_dir() else []
    return [path for path in entries if not path.name.startswith(TEMPORARY_PREFIX) and path.is_dir() and is_run(path)]


def most_recent(root: Path = DEFAULT_ROOT) -> Path:
    """The run below `root` whose events are the newest; pruning a run is no activity of it.

    Raises:
        NotFoundError: There is none.
    """
    runs = runs_below(root)
    if not runs:
        raise NotFoundError(
            f"there is no run below {root.resolve()}", path=root, hint="name the run directory, or start one with run"
        )
    return max(runs, key=lambda path: str((last_event(path, passing_over=("pruned",)) or {}).get("time", "")))


def last_event(directory: Path, *, passing_over: Sequence[str] = ()) -> dict[str, Any] | None:
    """The newest event of a run, of other kinds than those passed over; that accounts were kept is none."""
    path = directory / EVENTS
    rows = read_rows_from_end(path) if path.exists() else ()
    return next((row for row in rows if row.get("event") not in (NOTED, *passing_over)), None)


def origin(directory: Path) -> dict[str, Any]:
    """Where a run comes from, if it did not begin by itself: "forked_from" or "imported_from", as in `run.json`."""
    try:
        with reading(directory / RUN_JSON) as file:
            fields = strict_json.parse(file.read(_MAX_IDENTITY_BYTES + 1), max_bytes=_MAX_IDENTITY_BYTES)
    except (FileNotFoundError, ValueError):
        return {}
    known = ("forked_from", "imported_from")
    found = {name: fields.get(name) for name in known} if isinstance(fields, dict) else {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def origin_text(origin: dict[str, Any]) -> str | None:
    """The same for people."""
    if "forked_from" in origin:
        found = origin["forked_from"]
        return (
            f"forked from {found.get('snapshot')} of {found.get('directory')} (run {found.get('run_id') or 'unnamed'})"
        )
    if "imported_from" in origin:
        return f"imported from {origin['imported_from'].get('file')}"
    return None


def entries(directory: Path) -> list[Entry]:
    """All snapshots of the current line, oldest first; every byte is checked."""
    store = Store(directory)
    found = []
    for name in store.names():
        manifest, reason = None, None
        try:
            manifest = store.manifest(name)
            store.verify_files(manifest)
        except SnapshotGoneError:  # retention goes on while we look
            continue
        except DamagedSnapshotError as error:
            if not os.path.lexists(store.path(name)):
                continue  # whoever holds the run has deleted it meanwhile
            reason = error.message
        found.append(Entry(name, store.path(name), manifest, reason))
    return _with_best(found)


def _with_best(found: list[Entry]) -> list[Entry]:
    newest = next((entry.manifest for entry in reversed(found) if entry.manifest and not entry.reason), None)
    if newest is None or newest.best is None:
        return found
    wanted = (newest.best.step, newest.best.epoch + 1)
    return [
        Entry(e.name, e.path, e.manifest, e.reason, best=_step_and_epochs(e.name) == wanted and e.reason is None)
        for e in found
    ]


def _step_and_epochs(name: str) -> tuple[int, int | None]:
    parsed = parse_name(name)
    assert parsed is not None
    return parsed.step, parsed.epochs_complete


def newest_valid(directory: Path) -> Manifest | None:
    """The newest snapshot that verifies, and nothing is moved; None if there is none."""
    store = Store(directory)
    for name in reversed(store.names()):
        try:
            return store.verify(name)
        except (DamagedSnapshotError, SnapshotGoneError):
            continue
    return None


@dataclass(frozen=True)
class RunSummary:
    """Where a run stands.

    Attributes:
        directory: The run directory.
        state: "running", "interrupted", "finished", "stopped_early" or "failed".
        newest: The newest valid snapshot.
        holder: Who runs it now; None if nobody does.
        event: The newest event.
        origin: Where it comes from, see `origin`.
        divergences: Where it has diverged, and what was left out because of it.
        goodput: Where its time went.
    """

    directory: Path
    state: str
    newest: Manifest | None
    holder: Owner | None
    event: dict[str, Any] | None
    origin: dict[str, Any]
    divergences: list[dict[str, Any]]
    goodput: Goodput

    def to_json(self) -> dict[str, Any]:
        """The object of `status --json`."""
        holder = self.holder
        return {
            "run_dir": str(self.directory),
            "state": self.state,
            **place_of(self.newest),
            "holder": None
            if holder is None
            else {
                "pid": holder.pid,
                "host": holder.host,
                "since": holder.since,
                "generation": holder.generation,
                "step": holder.step,
                "command": holder.command,
            },
            "last_event": self.event,
            "divergences": self.divergences,
            "goodput": self.goodput.to_json(),
            **self.origin,
        }


def summarize(directory: Path) -> RunSummary:
    """Read where a run stands; takes no lock and changes nothing.

    Raises:
        NotFoundError: It is no run's directory.
    """
    require_run(directory)
    owner = read_owner(directory / RUN_LOCK)
    holder = owner if owner is not None and is_alive(owner) is not False else None
    newest, account = newest_valid(directory), Account.read(directory / EVENTS)
    return RunSummary(
        directory,
        state_of(account, newest, is_running=holder is not None),
        newest,
        holder,
        last_event(directory),
        origin(directory),
        divergences(directory),
        goodput_of(account, owner, is_running=holder is not None),
    )


def goodput_of(account: Account, owner: Owner | None, *, is_running: bool) -> Goodput:
    """Where a run's time went."""
    seen = None if owner is None else seconds_of(owner.seen)
    return account.goodput(now=time.time() if is_running else None, seen=seen)


def state_of(account: Account, newest: Manifest | None, *, is_running: bool) -> str:
    """The state of a run: if nobody holds it, how the last launch ended, or the newest snapshot's outcome."""
    if is_running:
        return "running"
    return account.said or (newest.outcome if newest is not None else None) or "interrupted"


def place_of(newest: Manifest | None) -> dict[str, Any]:
    """Where a run stands, as fields of an object for programs."""
    at = newest.position if newest else None
    best = newest.best if newest else None
    return {
        "step": at.step if at else 0,
        "epoch": at.epoch if at else 0,
        "batch": at.batch if at else 0,
        "best": None if best is None else best.model_dump(),
        "latest": newest.name if newest else None,
    }
