"""`prune`: retention by hand; `--dry-run` says what would go, and changes nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from resumable_trainer.cli.output import run_directory, size
from resumable_trainer.durable.lock import RunLock
from resumable_trainer.errors import ResumableTrainerError, SnapshotWriteError, UsageError
from resumable_trainer.loop import launch
from resumable_trainer.snapshot.layout import QUARANTINE, RUN_LOCK, SET_ASIDE
from resumable_trainer.snapshot.pruning import Plan, carry_out, plan, recorded
from resumable_trainer.snapshot.retention import Retention

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Delete what need not stay, or say what would go."""
    _check(args)
    directory = run_directory(args)
    if args.dry_run:
        retention, source = _retention(directory, args)
        planned = plan(directory, retention, also=_also(args))
    else:
        # The lock first: what is planned before it may be another's newest by the time it is deleted.
        with RunLock(directory / RUN_LOCK).held_again():
            retention, source = _retention(directory, args)
            planned = plan(directory, retention, also=_also(args))
            _carry_out(planned, directory)
    print(
        json.dumps(_as_json(directory, planned, source, args), indent=2) if args.json else _text(planned, source, args)
    )
    return 0


def _carry_out(planned: Plan, directory: Path) -> None:
    try:
        carry_out(planned, directory)
    except OSError as error:
        if isinstance(error, ResumableTrainerError):
            raise
        raise SnapshotWriteError(
            f"{directory} could not be pruned: {error}", path=directory, hint="what is still there is whole: see list"
        ) from error


def _check(args: argparse.Namespace) -> None:
    problems = []
    for name, least in (("keep_last", 1), ("keep_best", 0), ("keep_every", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            problems.append(f"--{name.replace('_', '-')} is {value}, it must be at least {least}")
    if problems:
        raise UsageError("prune: " + "; ".join(problems))


def _also(args: argparse.Namespace) -> list[str]:
    return ["unfinished", *[QUARANTINE] * args.quarantine, *[SET_ASIDE] * args.set_aside]


def _retention(directory: Path, args: argparse.Namespace) -> tuple[Retention, str]:
    """Which snapshots stay, and where that comes from; options stand above what the run has recorded."""
    found = recorded(launch.last_events(directory, ("launched",)).get("launched", {}).get("retention"))
    source = "by default" if found is None else "as it was last trained"
    retention = found or Retention()
    if retention.keep_best == 0:  # never the best unless that is asked for here
        retention = replace(retention, keep_best=1)
    asked: dict[str, Any] = {
        name: value for name in ("keep_last", "keep_best", "keep_every") if (value := getattr(args, name)) is not None
    }
    if "keep_every" in asked:
        asked |= {"keep_every": asked["keep_every"] or None, "keep_every_steps": None}
    return replace(retention, **asked), "as asked for" if asked else source


def _as_json(directory: Path, planned: Plan, source: str, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "run_dir": str(directory),
        "dry_run": args.dry_run,
        "retention": {**asdict(planned.retention), "source": source},
        "deleted": [
            {"kind": doomed.kind, "name": doomed.path.name, "path": str(doomed.path), "bytes": doomed.num_bytes}
            for doomed in planned.doomed
        ],
        "bytes": planned.num_bytes,
        "kept": list(planned.stays),
        "damaged": dict(planned.damaged),
    }


def _text(planned: Plan, source: str, args: argparse.Namespace) -> str:
    would = "would be " if args.dry_run else ""
    lines = [f"keep    {planned.retention} ({source})"]
    for doomed in planned.doomed:
        what = doomed.path.name if doomed.kind == "snapshot" else f"{doomed.path.name} ({doomed.kind})"
        what = f"{doomed.kind}/" if doomed.kind in (QUARANTINE, SET_ASIDE) else what
        lines.append(f"delete  {what}, {size(doomed.num_bytes)}")
    lines += [f"damaged {name}: {reason}; it stays" for name, reason in planned.damaged.items()]
    return "\n".join(
        [
            *lines,
            f"{len(planned.doomed)} {would}deleted, {planned.num_bytes:,} bytes {would}freed;"
            f" {len(planned.stays)} valid snapshots stay",
        ]
    )
