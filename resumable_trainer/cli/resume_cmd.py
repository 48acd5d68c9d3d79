"""`resume`: start the recorded command of a run again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from resumable_trainer.cli.output import run_directory
from resumable_trainer.cli.recorded import recorded_start
from resumable_trainer.cli.restarting import options, supervise, where
from resumable_trainer.cli.starting import check_target, go_on_as, start
from resumable_trainer.loop import launch

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Continue; the exit code of the training."""
    directory = run_directory(args).resolve()
    recorded = recorded_start(directory, hint="start its script again; it continues")
    command = recorded.command
    check_target(command)
    if args.restart:
        return supervise(args, ["resume", str(directory), *options(args)], lambda: [directory])
    go_on_as(command.python, _arguments(args, directory))
    os.chdir(command.cwd)
    launch.process.handover.directory = directory
    if recorded.directory != directory:
        launch.process.handover.moved[recorded.directory] = directory
    return start(command, [directory], directory, args)


def _arguments(args: argparse.Namespace, directory: Path) -> list[str]:
    return ["resume", str(directory), *where(args), *options(args)]
