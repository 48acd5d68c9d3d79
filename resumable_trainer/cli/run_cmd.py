"""`run`: start a script or module, or continue it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.cli.restarting import options, supervise
from resumable_trainer.cli.starting import check_target, command_of, directories_of, directory_to_be, start
from resumable_trainer.loop import launch
from resumable_trainer.report.summary import is_run

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Start or continue; the exit code of the training."""
    command = command_of(args)
    check_target(command)
    target = None if args.run_dir is None else Path(args.run_dir)
    launch.process.handover.directory = target or launch.default_directory(command)
    if args.restart:
        return supervise(args, _arguments(args), lambda: _directories(command, target))
    return start(command, _directories(command, target), target, args)


def _directories(command: launch.Command, target: Path | None) -> list[Path]:
    """Run directories known to belong to the command."""
    directories = directories_of(command)
    if target is not None and target.resolve() not in directories:
        # What else this command has trained is another run, done or held; a script that names its own is found below.
        directories = [target.resolve()] if is_run(target) else []
    default = target or launch.default_directory(command)
    expected = directory_to_be(command, default) if not directories else None
    return directories if expected is None else [*directories, expected.resolve()]


def _arguments(args: argparse.Namespace) -> list[str]:
    """The same command line without what the supervisor does itself."""
    run_dir = [] if args.run_dir is None else [f"--run-dir={args.run_dir}"]
    return ["run", *run_dir, *options(args), *(["-m"] if args.module else []), "--", args.target, *args.args]
