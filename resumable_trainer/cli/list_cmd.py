"""`list`: the snapshots of a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from resumable_trainer.cli.output import run_directory, size, table
from resumable_trainer.report.summary import entries

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Print one line, or one JSON object, per snapshot."""
    directory = run_directory(args)
    found = [entry.to_json() for entry in entries(directory)]
    if args.json:
        print(json.dumps(found, indent=2))
    elif not found:
        print(f"{directory} has no snapshots yet")
    else:
        print(table(["step", "epoch", "batch", "size", "state", "created", "name"], [_row(f) for f in found]))
    return 0


def _row(fields: dict[str, Any]) -> list[object]:
    state = "valid, best" if fields["best"] else "valid" if fields["valid"] else f"DAMAGED: {fields['reason']}"
    created = (fields["created"] or "")[:19].replace("T", " ")
    return [fields["step"], fields["epoch"], fields["batch"], size(fields["bytes"]), state, created, fields["name"]]
