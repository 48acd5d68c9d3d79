"""`slurm print`: a batch script that continues a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumable_trainer.cli.output import run_directory
from resumable_trainer.cli.recorded import recorded_command
from resumable_trainer.service.slurm import Job, script

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    directory = run_directory(args).resolve()
    command = recorded_command(directory)
    job = Job(directory, command.python, command.cwd, args.time, args.warn, tuple(args.sbatch))
    print(script(job), end="")
    return 0
