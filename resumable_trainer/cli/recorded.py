"""How a run was started, for commands that start it again, or write texts which do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumable_trainer.errors import NotFoundError
from resumable_trainer.loop import launch

if TYPE_CHECKING:
    from pathlib import Path

    from resumable_trainer.loop.launch import Command, Start


def recorded_command(directory: Path) -> Command:
    """The command that a run was started with.

    Raises:
        NotFoundError: It is not known.
    """
    return recorded_start(directory, hint="start its script once, with: resumable-trainer run SCRIPT.py").command


def recorded_start(directory: Path, *, hint: str) -> Start:
    """The command that a run was started with, and the directory that it was then.

    Raises:
        NotFoundError: It is not known; `hint` says what to do.
    """
    recorded = launch.recorded_start(directory)
    if recorded is None:
        raise NotFoundError(
            f"{directory} does not say which command started it",
            path=directory,
            hint=hint,
        )
    return recorded
