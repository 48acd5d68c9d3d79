"""Pruning: retention by hand, on a run that nobody trains. Free of torch.

Policy: what does not verify is no snapshot here: it is never deleted, and never the reason why another
may go. The newest valid one stays whatever is asked for, and so does the best unless none is to be kept.
What lies in quarantine and set aside goes only when asked for, and only while the line itself has a
snapshot that verifies: until then it may be all there is.

Cost: every byte of the line's snapshots is read once.
"""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from resumable_trainer.durable.files import TEMPORARY_PREFIX, TRASH_PREFIX, Files, remove_tree
from resumable_trainer.durable.filesystem import refuse_links
from resumable_trainer.durable.journal import Journal
from resumable_trainer.durable.lock import read_owner
from resumable_trainer.errors import DamagedSnapshotError, NoValidSnapshotError
from resumable_trainer.snapshot.layout import (
    EVENTS,
    OWN_NAMES,
    QUARANTINE,
    RUN_LOCK,
    SET_ASIDE,
    SNAPSHOTS,
    ParsedName,
    parse_name,
)
from resumable_trainer.snapshot.retention import Retention, kept_of
from resumable_trainer.snapshot.store import Store
from resumable_trainer.snapshot.values import read_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from resumable_trainer.snapshot.manifest import Manifest


@dataclass(frozen=True)
class Doomed:
    """Something that goes.

    Attributes:
        kind: "snapshot", "quarantine", "set-aside", or "unfinished" (what a dead process left).
        path: Where it lies.
        num_bytes: Length of all files in it.
    """

    kind: str
    path: Path
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """What pruning does to a run.

    Attributes:
        retention: Which snapshots are to stay.
        doomed: What goes, in this order.
        stays: Names of the valid snapshots that stay, oldest first.
        damaged: Snapshots of the line that do not verify, with the reason for each; they stay.
    """

    retention: Retention
    doomed: Sequence[Doomed]
    stays: Sequence[str]
    damaged: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes that it frees."""
        return sum(doomed.num_bytes for doomed in self.doomed)


def recorded(fields: object) -> Retention | None:
    """The retention that a run has noted in its events; None if there is none that can be read."""
    try:
        found = Retention(**fields)  # type: ignore[arg-type] # checked below: it was read from a file
    except TypeError:
        return None
    numbers = (found.keep_last, found.keep_best, found.keep_every or 0, found.keep_every_steps or 0)
    if not all(type(number) is int and number >= 0 for number in numbers) or found.mode not in ("max", "min"):
        return None
    return found


def plan(run: Path, retention: Retention, *, also: Sequence[str] = ()) -> Plan:
    """What would go and what stays; changes nothing.

    Args:
        run: The run directory.
        retention: Which snapshots are to stay; `mode` counts only where the newest does not know better.
        also: What else is to go: kinds of `Doomed`.

    Raises:
        NoValidSnapshotError: There is something to delete, and no snapshot that verifies.
        SettingsError: A link stands where the run keeps a file of its own.
    """
    refuse_links(run, OWN_NAMES)
    store = Store(run)
    valid, damaged = _verified(store)
    aside = [_doomed(kind, run / kind) for kind in also if kind in (QUARANTINE, SET_ASIDE) and (run / kind).is_dir()]
    if not valid and (damaged or aside):
        raise NoValidSnapshotError(
            f"run {run} has no snapshot that verifies, so nothing is deleted:"
            + "".join(f"\n  {name}: {reason}" for name, reason in damaged.items()),
            path=run,
            found=list(damaged),
            hint="what is damaged, in quarantine or set aside may be all there is",
        )
    names = _names_to_delete(store, valid, retention) if valid else []
    doomed = [_doomed("snapshot", store.path(name)) for name in names]
    if "unfinished" in also:
        aside += [_doomed("unfinished", path) for path in _unfinished(run)]
    stays = [manifest.name for manifest in valid if manifest.name not in names]
    return Plan(retention, [*doomed, *aside], stays, damaged)


def carry_out(plan: Plan, run: Path, *, files: Files | None = None) -> None:
    """Delete what is planned, and note it in the run's events; the caller holds the lock.

    Raises:
        OSError: Something could not be deleted; what went before it is noted.
    """
    files = files if files is not None else Files()
    store, gone = Store(run, files=files), []
    try:
        # Crash here: each goes as a whole or stays, and what has lost its name is swept at the next start.
        for doomed in plan.doomed:
            if doomed.kind == "snapshot":
                store.delete(doomed.path.name)
            else:
                remove_tree(files, doomed.path)
            gone.append(doomed)
    finally:
        if gone:
            _note(run, plan.retention, gone, files)


def _note(run: Path, retention: Retention, gone: Sequence[Doomed], files: Files) -> None:
    owner = read_owner(run / RUN_LOCK)
    event: dict[str, Any] = {
        "event": "pruned",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "generation": 0 if owner is None else owner.generation,
        "snapshots": [doomed.path.name for doomed in gone if doomed.kind == "snapshot"],
        "also": [doomed.kind for doomed in gone if doomed.kind in (QUARANTINE, SET_ASIDE)],
        "bytes": sum(doomed.num_bytes for doomed in gone),
        "retention": asdict(retention),
    }
    journal = Journal.open(run / EVENTS, files=files)
    try:
        journal.append(event)
        journal.sync()
    finally:
        journal.close()


def _verified(store: Store) -> tuple[list[Manifest], dict[str, str]]:
    valid, damaged = [], {}
    for name in store.names():
        try:
            valid.append(store.verify(name))
        except DamagedSnapshotError as error:
            damaged[name] = error.message
    return valid, damaged


def _names_to_delete(store: Store, valid: Sequence[Manifest], retention: Retention) -> list[str]:
    newest = valid[-1]
    mode = _mode(store.path(newest.name), newest) or retention.mode
    names = replace(retention, mode=mode).to_delete([kept_of(manifest) for manifest in valid])
    stay = {newest.name}
    if newest.best is not None and retention.keep_best:
        # Invariant: the one that "best" means stays, even where retention would rank another before it.
        best = ParsedName(newest.best.step, newest.best.epoch + 1)
        stay.update(manifest.name for manifest in valid if parse_name(manifest.name) == best)
    return [name for name in names if name not in stay]


def _mode(path: Path, manifest: Manifest) -> Literal["max", "min"] | None:
    """Whether larger or smaller values are better, as the loop that wrote a snapshot had it."""
    loop = read_values(path, manifest).get("loop")
    record = loop.get("record") if isinstance(loop, dict) else None
    watched = record.get("watched") if isinstance(record, dict) else None
    mode = watched[1] if isinstance(watched, list) and len(watched) == 2 else None
    return mode if mode in ("max", "min") else None


def _unfinished(run: Path) -> list[Path]:
    """What `Store.sweep` would remove."""
    roots = [root for root in (run / SNAPSHOTS, run) if root.is_dir()]
    return [p for root in roots for p in sorted(root.iterdir()) if p.name.startswith((TEMPORARY_PREFIX, TRASH_PREFIX))]


def _doomed(kind: str, path: Path) -> Doomed:
    return Doomed(kind, path, _bytes_below(path))


def _bytes_below(path: Path) -> int:
    """Length of a file, or of all files below a directory; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(_bytes_below(entry) for entry in path.iterdir())
