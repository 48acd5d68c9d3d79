"""`run`: start a script or module, or continue it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.cli.starting import check_target, command_of, directories_of, directory_to_be, start
from resumable_trainer.loop import launch
from resumable_trainer.report.summary import is_run

if TYPE_CHECKING:
    import argparse

    from resumable_trainer.loop.launch import Command


def run(args: argparse.Namespace) -> int:
    """Start or continue; the exit code of the training."""
    command = command_of(args)
    check_target(command)
    target = None if args.run_dir is None else Path(args.run_dir)
    if args.restart:
        return _supervise(args, command, target)
    launch.process.handover.directory = target or launch.default_directory(command)
    return start(command, _directories(command, target), target, args)


def _directories(command: Command, target: Path | None) -> list[Path]:
    """Run directories that the command trains, or will make."""
    directories = directories_of(command)
    if target is not None and target.resolve() not in directories:
        # What else this command has trained is another run, done or held; a script that names its own is found below.
        directories = [target.resolve()] if is_run(target) else []
    if not directories:
        expected = directory_to_be(command, target or launch.default_directory(command))
        return [] if expected is None else [expected.resolve()]
    return directories


def _supervise(args: argparse.Namespace, command: Command, target: Path | None) -> int:
    from resumable_trainer.cli.supervising import Runs, starting_options, supervise

    def arguments(has_begun: bool) -> list[str]:
        where = [] if args.run_dir is None else ["--run-dir", args.run_dir]
        module = ["-m"] if args.module else []
        return ["run", *where, *starting_options(args, has_begun=has_begun), *module, args.target, *args.args]

    return supervise(arguments, Runs(lambda: _directories(command, target)), args)
