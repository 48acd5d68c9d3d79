"""Opening a run: who it is, which line it continues, and its journal cut back to the snapshot."""

from __future__ import annotations

import datetime
import json
import os
import secrets
import socket
from dataclasses import asdict, replace
from itertools import islice
from math import inf
from os import getpid
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.digest import reading
from resumable_trainer.durable.files import make_directories, move_directory, write_replacing
from resumable_trainer.durable.journal import Mark, read_rows
from resumable_trainer.errors import DamagedSnapshotError
from resumable_trainer.loop import identity, launch
from resumable_trainer.loop.accounting import Accounting
from resumable_trainer.loop.cursor import BatchLoop, Cursor
from resumable_trainer.loop.heartbeat import Heartbeat
from resumable_trainer.loop.interval import REMEMBERED, Interruptions
from resumable_trainer.loop.record import EMPTY_MARK_DIGEST
from resumable_trainer.loop.started import launch_started
from resumable_trainer.metrics import goodput as goodputs
from resumable_trainer.metrics.account import Account
from resumable_trainer.snapshot import strict_json
from resumable_trainer.snapshot.layout import EVENTS, METRICS, QUARANTINE, RUN_JSON
from resumable_trainer.state import generators

if TYPE_CHECKING:
    from pathlib import Path

    from resumable_trainer.loop.launch import Command
    from resumable_trainer.loop.record import Record
    from resumable_trainer.manager import RestoreReport, StateManager
    from resumable_trainer.snapshot.manifest import Manifest
    from resumable_trainer.snapshot.retention import Retention

_COSTS = 50
_MAX_BYTES = 1 << 20  # of run.json, which is written once and says who the run is


def identify(manager: StateManager, command: Command, seed: int) -> None:
    """Read the run's identity, or give it one; `run.json` is written once.

    Raises:
        DamagedSnapshotError: `run.json` cannot be read.
    """
    path = manager.directory / RUN_JSON
    if path.exists():
        try:
            with reading(path) as file:
                manager.run_id = _run_id(strict_json.parse(file.read(_MAX_BYTES + 1), max_bytes=_MAX_BYTES))
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedSnapshotError(
                f"{path} is damaged: {error}",
                path=path,
                hint="remove it: the run then gets its identity back from its newest snapshot",
            ) from error
        return
    manager.run_id = known_run_id(manager) or secrets.token_hex(8)
    fields = {
        "format": 1,
        "run_id": manager.run_id,
        "command": command.to_json(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "versions": identity.versions(),
    }
    write_replacing(manager.files, path, (json.dumps(fields, indent=2) + "\n").encode())


def _run_id(fields: Any) -> str:
    run_id = fields["run_id"]
    if not isinstance(run_id, str):
        raise TypeError("run_id is no text")
    return run_id


def known_run_id(manager: StateManager) -> str | None:
    """The identity that the newest readable snapshot has stamped in."""
    newest = manager.store.newest_readable()
    return None if newest is None else newest.run_id


def note_launch(manager: StateManager, command: Command, retention: Retention) -> None:
    """The event from which `resume` learns what to start, and `prune` what is to stay; from it on accounts are kept."""
    manager.on_event = Accounting(manager.note, tell=manager.on_event).heard
    recorded = command.to_json() if command.script or command.module else None
    before = manager.lock.previous
    manager.note(
        "launched",
        command=recorded,
        directory=str(launch.named_directory(manager.directory)),
        pid=getpid(),
        host=socket.gethostname(),
        versions=identity.versions(),
        retention=asdict(retention),
        started=launch_started() if len(launch.process.opened) == 1 else None,  # else another run has had that time
        previous=before and {"generation": before.generation, "step": before.step, "seen": before.seen},
    )


def begin_line(manager: StateManager, record: Record, directory: Path) -> str:
    """Which snapshot to continue from; with `--fresh`, the old line is set aside first."""
    handover = launch.process.handover
    if not handover.applies_to(directory):
        return "latest"
    if handover.fresh:
        handover.fresh = False
        record.show_rows()
        manager.set_aside(manager.store.names(), reason="a fresh start was asked for")
        return "latest"
    which, handover.which = handover.which, "latest"
    return which


def start_afresh(record: Record, seed: int) -> None:
    """No snapshot: rows that none counts are cut, and the global generators seeded."""
    record.rewind(Mark(0, EMPTY_MARK_DIGEST, 0))
    generators.seed_global(seed)


def lost_snapshots(directory: Path) -> list[str]:
    """One line if snapshots were committed here and none is left; a run never starts over silently."""
    newest = next(launch.events_from_end(directory, ("committed", "set_aside")), None)
    if newest is None or newest["event"] == "set_aside":
        return []
    return [f"warning {newest['snapshot']} was committed here and is gone, with all others: starting over from nothing"]


def interruptions(directory: Path) -> Interruptions:
    """What the run's events tell of its interruptions."""
    account = Account.read(directory / EVENTS)
    return Interruptions(account.interrupted, account.ran_seconds, tuple(_stalls(directory)))


def _stalls(directory: Path) -> list[float]:
    """What the newest snapshots took from training, in seconds."""
    committed = launch.events_from_end(directory, ("committed",))
    stalls = (row.get("stall_seconds") for row in committed)
    known = (stall for stall in stalls if isinstance(stall, float) and 0 < stall < inf)
    return list(islice(known, REMEMBERED))[::-1]


def snapshot_costs(directory: Path) -> list[float]:
    """Seconds from capture to durable of the newest snapshots, earlier launches included, as far as can be read."""
    costs: list[float] = []
    try:
        for row in launch.events_from_end(directory, ("committed",)):
            if len(costs) == _COSTS:
                break
            if isinstance(row.get("seconds"), float):
                costs.append(row["seconds"] + (row.get("stall_seconds") or 0.0))
    except (OSError, ValueError, TypeError):
        pass  # what is newer than a damaged line is as good
    return costs[::-1]


def heartbeat(manager: StateManager) -> Heartbeat:
    """The signs of life of this run, with what earlier launches have learned of its pace."""
    if not os.environ.get("NOTIFY_SOCKET"):
        return Heartbeat(None)
    gap = Account.read(manager.directory / EVENTS).longest_gap_seconds
    return Heartbeat.of_process(
        os.environ,
        longest_gap_seconds=float(gap) if isinstance(gap, int | float) and 0 < gap < 1e6 else None,
        note=lambda seconds: manager.note("paced", longest_gap_seconds=seconds),
    )


def goodput(directory: Path) -> list[str]:
    """One line: which share of the time moved the run forward."""
    try:
        account = Account.read(directory / EVENTS)
    except (OSError, ValueError):
        return []
    return [f"goodput {goodputs.in_words(account.goodput())}"] if account.launches else []


def with_loop(report: RestoreReport, record: Record, seed: int) -> RestoreReport:
    """The report with a loop's own section: made from the position if no `Run` wrote the snapshot.

    One that was imported holds no generators either: they are seeded, as a fresh run does.
    """
    assert report.manifest is not None
    if "generators" in report.absent:
        generators.seed_global(seed)
    if "loop" in report.sections:
        return report
    at = report.manifest.position
    cursor = Cursor(at.epoch, at.batch, at.step, [BatchLoop(at.batch)] if at.batch else [])
    loop: dict[str, Any] = {
        "cursor": cursor.state_dict(),
        "record": record.state_dict(),
        "epoch_generators": generators.capture_global(),
        "sources": [],
        "ended_by_break_at": None,
    }
    return replace(report, sections={**report.sections, "loop": loop})


def rewind(manager: StateManager, record: Record, manifest: Manifest) -> list[str]:
    """Cut the metric journal back to the snapshot's mark; lines for a person if it was damaged."""
    journal = manifest.journal
    if journal is None:  # saved by a StateManager alone
        return []
    if record.rewind(Mark(journal.num_bytes, journal.digest, journal.rows)):
        return []
    # The state is whole, the rows are not: the damaged journal is kept aside, its readable rows go on.
    rows = _readable_rows(manager.directory / METRICS, manifest)
    target = _free(manager.directory / QUARANTINE, METRICS)
    make_directories(manager.files, target.parent)
    move_directory(manager.files, manager.directory / METRICS, target)
    record.reopen()
    for row in rows:
        record.append_row(row)
    record.show_rows()
    manager.note("journal_damaged", moved_to=str(target), rows_expected=journal.rows, rows_kept=len(rows))
    return [
        f"warning {METRICS} does not hold what the snapshot counts ({len(rows)} of {journal.rows} rows are readable);"
        f" the damaged file is kept as {target}, the state itself is whole"
    ]


def _readable_rows(path: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Rows up to the snapshot's position, as far as they can be read."""
    rows: list[dict[str, Any]] = []
    try:
        for row in read_rows(path):
            if len(rows) == (manifest.journal.rows if manifest.journal else 0):
                break
            rows.append(row)
    except ValueError:
        pass  # what follows a damaged line cannot be trusted to be in place
    return rows


def _free(parent: Path, name: str) -> Path:
    path, number = parent / name, 2
    while path.exists():
        path, number = parent / f"{name}.{number}", number + 1
    return path
