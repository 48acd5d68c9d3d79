"""`verify`: check every byte of a run's snapshots, its metric journal against their marks, and each line of its events.

Events are counted by nothing: a damaged line of them harms no resume, and whoever goes on from a state that was noted
behind it does not read it. So it is found here.

With `--replay` a stretch of the run is trained once more, in a copy, and compared with what was recorded: exit
code 0 if it is the same to the bit, 1 if it is not.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumable_trainer.cli.diff_cmd import difference_as_json, difference_lines
from resumable_trainer.cli.output import run_directory
from resumable_trainer.cli.starting import check_target, go_on_as
from resumable_trainer.durable.digest import Digest, reading
from resumable_trainer.durable.journal import read_rows
from resumable_trainer.errors import ExitCode, NotFoundError, UsageError
from resumable_trainer.loop import launch
from resumable_trainer.proof.replay import replayed, stretch
from resumable_trainer.report.difference import compare
from resumable_trainer.report.summary import Entry, entries
from resumable_trainer.snapshot.layout import EVENTS, METRICS

if TYPE_CHECKING:
    import argparse

_CHUNK_BYTES = 1 << 20
_DIFFERENT = 1


def run(args: argparse.Namespace) -> int:
    """Print what is valid and what is not; 65 if anything is damaged."""
    directory = run_directory(args)
    if args.replay:
        return _replay(directory, args)
    if args.which is not None:
        raise UsageError("verify: --from goes with --replay")
    found = entries(directory)
    reasons = {METRICS: _journal_damage(directory, found), EVENTS: _events_damage(directory)}
    damaged = [entry for entry in found if entry.reason is not None]
    if args.json:
        print(json.dumps(_as_json(directory, found, reasons), indent=2))
    else:
        for entry in found:
            print(f"{entry.name}: {'valid' if entry.reason is None else 'DAMAGED: ' + entry.reason}")
        looked_at = [METRICS] if any(entry.manifest is not None for entry in found) else []
        looked_at += [EVENTS] if (directory / EVENTS).exists() else []
        for name in looked_at:
            print(f"{name}: {'valid' if reasons[name] is None else f'DAMAGED: {reasons[name]}'}")
        print(f"{len(found) - len(damaged)} of {len(found)} snapshots are valid")
    return int(ExitCode.NO_VALID_SNAPSHOT) if damaged or any(reasons.values()) else int(ExitCode.DONE)


def _replay(directory: Path, args: argparse.Namespace) -> int:
    """Train from one snapshot to the next, and say whether both are the same."""
    start = launch.recorded_start(directory)
    if start is None:
        raise NotFoundError(
            f"{directory} does not say which command started it, so it cannot be replayed", path=directory
        )
    check_target(start.command)
    go_on_as(start.command.python, [*sys.argv[1:]])
    begin, recorded = stretch(directory, args.which)
    if not args.json:
        print(f"replay  {begin.manifest.name} -> {recorded.manifest.name} of {directory}", flush=True)
    with replayed(begin, recorded, start, timeout_seconds=args.timeout) as replay:
        found = compare(recorded, replay.made)
        fields = difference_as_json(recorded, replay.made, found)
        before, now = recorded.manifest.depends_on, replay.made.manifest.depends_on
    changed = [name for name in before if name in now and now[name] != before[name]]
    is_same = found.rows.is_same and all(section.is_same for section in found.sections)
    if args.json:
        names = {"from": begin.manifest.name, "to": recorded.manifest.name}
        print(
            json.dumps(
                {"run_dir": str(directory), **names, "exact": is_same, "changed": changed, "difference": fields},
                indent=2,
            )
        )
        return 0 if is_same else _DIFFERENT
    for line in difference_lines(recorded, replay.made, found) if not is_same else ():
        print(line)
    steps = recorded.manifest.position.step - begin.manifest.position.step
    if changed:
        print(f"changed {', '.join(changed)}: not as it was when this was recorded")
    tensors = sum(section.num_tensors for section in found.sections)
    if is_same:
        print(
            f"exact   {steps} steps trained once more gave the same: {tensors} tensors, all values, {found.rows.a} rows"
        )
    else:
        print(f"NOT exact: {steps} steps trained once more do not give what was recorded; doctor looks for the cause")
    return 0 if is_same else _DIFFERENT


def _as_json(directory: Path, found: list[Entry], reasons: dict[str, str | None]) -> dict[str, Any]:
    return {
        "run_dir": str(directory),
        "valid": not any(reasons.values()) and all(entry.reason is None for entry in found),
        "snapshots": [{"name": e.name, "valid": e.reason is None, "reason": e.reason} for e in found],
        **{Path(name).stem: {"valid": reason is None, "reason": reason} for name, reason in reasons.items()},
    }


def _events_damage(directory: Path) -> str | None:
    """Which line of the events is none; None if all are. A torn last line is what a kill leaves, and no damage."""
    try:
        deque(read_rows(directory / EVENTS), maxlen=0)
    except FileNotFoundError:
        return None
    except ValueError as error:
        return str(error)
    return None


def _journal_damage(directory: Path, found: list[Entry]) -> str | None:
    """Why the journal is not what the valid snapshots count; None if it is. Read once, mark by mark."""
    marks = sorted(
        {
            (entry.manifest.journal.num_bytes, entry.manifest.journal.digest)
            for entry in found
            if entry.manifest is not None and entry.reason is None and entry.manifest.journal is not None
        }
    )
    if not marks:
        return None
    digest = Digest()
    try:
        with reading(directory / METRICS) as file:
            for num_bytes, expected in marks:
                while digest.num_bytes < num_bytes:
                    chunk = file.read(min(_CHUNK_BYTES, num_bytes - digest.num_bytes))
                    if not chunk:
                        return f"it has {digest.num_bytes} bytes, a snapshot counts {num_bytes}"
                    digest.update(chunk)
                now = digest.value().digest
                if now != expected:
                    return f"its first {num_bytes} bytes have digest {now[:8]}.., a snapshot counts {expected[:8]}.."
    except FileNotFoundError:
        return "it is missing"
    except ValueError as error:
        return str(error)
    return None
