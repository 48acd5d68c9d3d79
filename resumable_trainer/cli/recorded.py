"""How a run was started, for commands that write texts which start it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumable_trainer.errors import NotFoundError
from resumable_trainer.loop import launch

if TYPE_CHECKING:
    from pathlib import Path

    from resumable_trainer.loop.launch import Command


def recorded_command(directory: Path) -> Command:
    """The command that a run was started with.

    Raises:
        NotFoundError: It is not known.
    """
    recorded = launch.recorded_start(directory)
    if recorded is None:
        raise NotFoundError(
            f"{directory} does not say which command started it",
            path=directory,
            hint="start its script once, with: resumable-trainer run SCRIPT.py",
        )
    return recorded.command
