"""`plot`: the curves of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.cli.output import run_directory
from resumable_trainer.errors import NotFoundError
from resumable_trainer.metrics.history import History
from resumable_trainer.snapshot.layout import METRICS

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Draw and say where."""
    directory = run_directory(args)
    history = History.read(directory / METRICS)
    if not len(history):
        raise NotFoundError(f"{directory} has no metric rows yet", path=directory / METRICS)
    target = history.plot(Path(args.output) if args.output else directory / "history.png", title=directory.name)
    print(json.dumps({"plot": str(target)}) if args.json else f"plot    {target}")
    return 0
