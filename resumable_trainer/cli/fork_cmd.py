"""`fork`: a new run from any snapshot of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.loop import launch
from resumable_trainer.report.selection import select_by_words
from resumable_trainer.report.summary import require_run
from resumable_trainer.snapshot.forking import fork
from resumable_trainer.snapshot.selected import select

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Copy, and say what continues it."""
    source = select(require_run(Path(args.run)), args.which) if args.which else select_by_words(args.run)
    target = Path(args.new_run)
    started = launch.recorded_start(source.run)
    start = None
    if started is not None:
        start = {"command": started.command.to_json(), "directory": str(started.directory)}
    manifest = fork(source, target, start=start)
    if args.json:
        fields = {
            "run_dir": str(target),
            "run_id": manifest.run_id,
            "snapshot": manifest.name,
            "forked_from": {"run_dir": str(source.run), "run_id": source.manifest.run_id, "path": str(source.path)},
            "skipped": dict(source.skipped),
        }
        print(json.dumps(fields, indent=2))
        return 0
    for name, reason in source.skipped.items():
        print(f"passed over {name}: {reason}")
    print(f"forked  {manifest.name} of {source.run} into {target} (run {manifest.run_id})")
    if started is not None:
        print(f"next    resumable-trainer resume {target}")
    else:
        print(f"next    start a script with this run directory: {target}")
    return 0
