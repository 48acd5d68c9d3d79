"""A batch script for Slurm: warned before its time limit the training saves, and the job is put into the queue again.

The batch shell alone gets the warning (`--signal=B:`), so it must pass it on and wait for the training; a trap
interrupts `wait`. Only exit code 75 (saved, start me again) queues the job again: a failure stays a failure.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What a batch script says.

    Attributes:
        directory: The run directory, absolute.
        python: The interpreter's path.
        cwd: Working directory of the recorded command.
        time: Slurm's limit, "D-HH:MM:SS" or another of its forms.
        warn_seconds: How long before the limit the training is told; Slurm may do it up to 60 s earlier.
        options: More lines of `#SBATCH`, as "--gres=gpu:1".
    """

    directory: Path
    python: str
    cwd: str
    time: str = "24:00:00"
    warn_seconds: int = 120
    options: tuple[str, ...] = ()


def script(job: Job) -> str:
    """The batch script."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in job.directory.name)[:60] or "run"
    options = [
        f"--job-name={name}",
        f"--time={job.time}",
        f"--signal=B:USR1@{job.warn_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={name}-%j.log",
        *job.options,
    ]
    command = shlex.join([job.python, "-m", "resumable_trainer", "resume", str(job.directory)])
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            "# Submit once, with sbatch; the job queues itself again until the run has ended.",
            f"cd {shlex.quote(job.cwd)} || exit 66",
            "trap 'kill -TERM \"$training\" 2>/dev/null' USR1 TERM",
            f"{command} &",
            "training=$!",
            'wait "$training"; code=$?',
            'while kill -0 "$training" 2>/dev/null; do wait "$training"; code=$?; done  # the trap interrupts a wait',
            'wait "$training"; code=$?  # it may have ended meanwhile; its code is still known',
            'if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
            "",
        ]
    )
