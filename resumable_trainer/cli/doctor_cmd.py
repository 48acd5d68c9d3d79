"""`doctor`: does this job resume exactly? Found out by killing it. Exit code 0 only if it does."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from resumable_trainer.cli.output import size
from resumable_trainer.cli.starting import check_target, command_of
from resumable_trainer.durable import filesystem
from resumable_trainer.proof.diagnosis import sections_of
from resumable_trainer.proof.doctor import examine
from resumable_trainer.proof.trials import Settings

if TYPE_CHECKING:
    import argparse
    from pathlib import Path
    from types import FrameType

    from resumable_trainer.proof.doctor import Costs, Examination

_NOT_EXACT = 1
_NOTICE_SECONDS = 30.0
_MAX_NAMES = 4
_MARGIN = 2.0  # a snapshot beside others' load may take so many times as long
_KEPT = 5  # snapshots that the default policy keeps at most, the one being written included


def run(args: argparse.Namespace) -> int:
    """Examine, and say what was found; 0 if every resume was exact."""
    command = command_of(args)
    check_target(command)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)  # what it has made is removed on the way
    settings = Settings(args.epochs, args.batches, args.timeout, keep=args.keep)
    say = _silent if args.json else _to_stderr
    say(f"doctor  {command}: at most {args.epochs} epochs of {args.batches} batches, in a scratch directory")
    found = examine(command, settings, say)
    print(json.dumps(_as_json(found), indent=2) if args.json else "\n".join(_lines(found, keep=args.keep)))
    return 0 if found.is_exact else _NOT_EXACT


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _silent(line: str) -> None:
    """Programs read the end alone."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _lines(found: Examination, *, keep: bool) -> list[str]:
    lines = _verdict(found)
    if found.fresh_starts_differ and found.is_exact:
        lines.append(
            "note    two fresh starts are not the same (something is drawn before the run is opened, unseeded);"
            " a resume does not mind"
        )
    if found.lost:
        names = ", ".join(f"`{name}`" for name in found.lost[:_MAX_NAMES])
        more = ", ..." if len(found.lost) > _MAX_NAMES else ""
        lines.append(
            f"note    not brought back by a resume: {names}{more}; it made no difference here. If anything hangs on it"
            " later, hand it over as a part"
        )
    lines += [f"cost    {_cost(found.costs)}", f"room    {_room(found)}", f"disk    {_disk(found.directory)}"]
    lines += [f"warning {line}" for line in filesystem.warnings(found.directory)]
    lines.append(f"notice  {_notice(found.costs)}")
    return [*lines, f"kept    {found.scratch}"] if keep else lines


def _verdict(found: Examination) -> list[str]:
    if found.is_exact:
        return [
            f"exact   this job resumes to the bit: {len(found.survived)} times killed or told to leave, and the same"
            f" {_compared(found)}"
        ]
    if found.failure is not None and found.after is not None:
        return [f"NOT exact: {found.after.words}, and started again, the script fails", *_causes(found)]
    if found.divergence is None and not found.columns:
        return [
            f"NOT exact: the same {_compared(found)} so far, but not everything was brought back",
            *_causes(found),
        ]
    if found.divergence is None:
        columns = ", ".join(found.columns)
        return [
            f"NOT exact: the state is the same, the metric rows are not: {columns}",
            "do      log only what the training computes: no times, no host names",
        ]
    after = found.after.words if found.after is not None else "started again"
    lines = [f"NOT exact: {after}, the run went on otherwise than if it had not been"]
    lines += [f"differs {_where(found)}"]
    return lines + _causes(found)


def _causes(found: Examination) -> list[str]:
    return [
        line
        for cause in found.causes
        for line in (f"cause   {cause.kind.replace('_', ' ')}: {cause.text}", f"do      {cause.advice}")
    ]


def _compared(found: Examination) -> str:
    moments = found.undisturbed.moments
    batches = sum(moment.key[0] == "batch" for moment in moments)
    tensors = len(moments[-1].state)
    evaluated = sum(moment.key[0] == "evaluating" for moment in moments)
    tests = f", {evaluated} evaluation batches" if evaluated else ""
    return f"{batches} batches{tests}, {tensors} pieces of state after each, and metric rows"


def _where(found: Examination) -> str:
    divergence = found.divergence
    assert divergence is not None
    if divergence.expected is None:
        return f"{divergence.moment.words}: one of the two runs never came there"
    what = ["the batch itself"] if divergence.data else []
    what += [_section(name, divergence.state) for name in sections_of(divergence)]
    return f"{divergence.moment.words}: {', '.join(what)}"


def _section(name: str, state: tuple[str, ...]) -> str:
    names = [entry.partition("/")[2].removesuffix(":") for entry in state if entry.startswith(f"{name}/")]
    label = {"loop": "metrics and the loop's record"}.get(name, name)
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{label} ({shown})"


def _cost(costs: Costs) -> str:
    return (
        f"a snapshot has {size(costs.snapshot_bytes)}, is durable after {_seconds(costs.durable_seconds)} and stops the"
        f" training for {_seconds(costs.stall_seconds)}; a start takes {_seconds(costs.start_seconds)}"
    )


def _room(found: Examination) -> str:
    free = filesystem.room(_nearest(found.directory)).num_bytes
    needed = found.costs.snapshot_bytes * _KEPT
    if free is None:
        return "the file system does not tell how much is free"
    verdict = "enough" if needed <= free else "NOT ENOUGH"
    return f"{size(free)} free, {size(needed)} for {_KEPT} snapshots: {verdict}"


def _disk(directory: Path) -> str:
    place = filesystem.file_system(directory)
    traits = [
        word
        for word, holds in (
            ("in memory", place.is_in_memory),
            ("network", place.is_network),
            ("syncs are off", place.omits_syncs),
            ("locks hold on this host alone", place.locks_are_local),
        )
        if holds
    ]
    return f"{place.kind or 'unknown'} on {place.mount_point}" + (f" ({', '.join(traits)})" if traits else "")


def _nearest(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _notice(costs: Costs) -> str:
    needed = costs.gap_seconds + _MARGIN * costs.durable_seconds
    verdict = "suffice" if needed <= _NOTICE_SECONDS else "do NOT suffice"
    return (
        f"{_NOTICE_SECONDS:.0f} s {verdict}: at most {_seconds(costs.gap_seconds)} until the next boundary,"
        f" and {_seconds(_MARGIN * costs.durable_seconds)} for a snapshot"
    )


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.1f} s"


def _as_json(found: Examination) -> dict[str, Any]:
    divergence = found.divergence
    needed = found.costs.gap_seconds + _MARGIN * found.costs.durable_seconds
    place = filesystem.file_system(found.directory)
    return {
        "exact": found.is_exact,
        "run_dir": str(found.directory),
        "kills": [asdict(kill) for kill in found.survived],
        "fresh_starts_differ": found.fresh_starts_differ,
        "differs": None
        if found.is_exact
        else {
            "after": None if found.after is None else found.after.words,
            "at": None if divergence is None else divergence.moment.words,
            "batch": divergence is not None and divergence.data,
            "parts": [] if divergence is None else sections_of(divergence),
            "state": [] if divergence is None else list(divergence.state),
            "columns": found.columns,
        },
        "not_brought_back": found.lost,
        "causes": [asdict(cause) for cause in found.causes],
        "snapshot": asdict(found.costs),
        "disk": {
            "kind": place.kind,
            "mount_point": os.fspath(place.mount_point),
            "free_bytes": filesystem.room(_nearest(found.directory)).num_bytes,
            "warnings": filesystem.warnings(found.directory),
        },
        "notice_30_seconds_suffice": needed <= _NOTICE_SECONDS,
    }
