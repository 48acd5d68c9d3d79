"""`k8s print`: a Job that continues a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumable_trainer.cli.output import run_directory
from resumable_trainer.cli.recorded import recorded_command
from resumable_trainer.service.kubernetes import Job, manifest

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Print the Job."""
    directory = run_directory(args).resolve()
    command = recorded_command(directory)
    arguments = (args.python or command.python, "-m", "resumable_trainer", "resume", str(directory))
    print(manifest(Job(directory, arguments, args.image, args.claim, command.cwd, args.grace)), end="")
    return 0
