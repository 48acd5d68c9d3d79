"""The probe of `verify --replay`: lets a copy of a run train on to the next recorded snapshot, and ends there."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumable_trainer.snapshot.layout import parse_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumable_trainer.loop.probe import Place
    from resumable_trainer.loop.run import Run
    from resumable_trainer.loop.triggers import SnapshotPolicy
    from resumable_trainer.proof.trial import Trial


class Replayer:
    """Takes no snapshot on the way but after epochs, and the one that is wanted.

    Args:
        trial: `scratch` is the directory in which the copy lies, `run` the recorded run directory as its script
            names it, `replay_to` the name of the snapshot wanted.
        tell: Appends a row to the trace.
    """

    num_batches: int | None = None

    def __init__(self, trial: Trial, tell: Callable[..., None]) -> None:
        self._trial, self._tell = trial, tell
        wanted = parse_name(str(trial.replay_to))
        assert wanted is not None
        self._step, self._epochs = wanted.step, wanted.epochs_complete

    def directory(self, named: Path) -> Path:
        """The copy; another run of the same script gets a scratch directory of its own."""
        is_copied = str(named.resolve()) == self._trial.run
        return Path(self._trial.scratch) / ("run" if is_copied else f"other-{named.name}")

    def policy(self, asked: SnapshotPolicy) -> SnapshotPolicy:
        """After each epoch, durable at once."""
        return dataclasses.replace(
            asked, every_epochs=1, every_steps=None, every_seconds=None, keep_every=None, background=False
        )

    def total(self, asked: int) -> int:
        """As the script says."""
        return asked

    def opened(self, run: Run) -> None:
        """Tell from where it goes on."""
        self._tell("opened", resumed_from=run.resumed_from, seconds=0.0, variables={})

    def at(self, place: Place, run: Run, batch: Any = None) -> None:
        """Ask for the snapshot in time, and end when it is there or can no longer be."""
        if self._trial.kill is not None:
            if place == "evaluating" and run.step == self._step:
                os.kill(os.getpid(), signal.SIGTERM)
        elif place == "batch" and self._epochs is None and run.step == self._step - 1:
            run.snapshot()
        if place in ("step", "epoch") and run._keeper.manager.latest == self._trial.replay_to:
            self._end("made")
        if run.step > self._step or (place == "epoch" and run.outcome is not None):
            self._end("passed")

    def _end(self, how: str) -> None:
        self._tell("replay", value=how)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
