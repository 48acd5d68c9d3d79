"""The probe of `doctor`: shortens a run, tells at each of its places what could be seen there, and ends it there."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from resumable_trainer.loop import launch
from resumable_trainer.proof import fingerprints
from resumable_trainer.proof.variables import Variables

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from resumable_trainer.loop.probe import Place
    from resumable_trainer.loop.run import Run
    from resumable_trainer.loop.triggers import SnapshotPolicy
    from resumable_trainer.proof.surroundings import Surroundings
    from resumable_trainer.proof.trial import Trial

EVERY_STEPS = 2  # so that a kill meets steps that a snapshot has, and such that none has
_LOOPS_WITHOUT_EPOCHS = 3  # a run of a single epoch is given so many times the batches


class Examiner:
    """Looks at the first run that the script opens.

    Args:
        trial: What is to be done.
        tell: Appends a row to the trace.
        surroundings: Of the trial.
    """

    def __init__(self, trial: Trial, tell: Callable[..., None], surroundings: Surroundings) -> None:
        self._trial, self._tell, self._surroundings = trial, tell, surroundings
        self._clock = surroundings.real_clock
        self._run: Run | None = None
        self._named: Path | None = None
        self._counts: tuple[int, int] | None = None
        self._met: Counter[str] = Counter()  # places, with these counts
        self._is_first = True
        self._is_frozen = False
        self._num_told = 0
        self._let_go = self._clock()
        self.num_batches: int | None = trial.num_batches

    # -- how the run is to differ -------------------------------------------------------------------

    def directory(self, named: Path) -> Path:
        """The scratch directory; each further run of the script gets one of its own."""
        place = named.absolute().parent / self._trial.scratch
        if self._named is None:
            self._named = named
            self._tell("named", value=str(named.absolute()))
            self._tell("new", value=[str(parent) for parent in named.absolute().parents if not parent.exists()])
            self._tell("drawn", value=self._surroundings.drawn_from())
            self._surroundings.torch_is_here()
        is_first = named == self._named
        return place / self._trial.run if is_first else place / f"{self._trial.run}-{named.name}"

    def policy(self, asked: SnapshotPolicy) -> SnapshotPolicy:
        """A snapshot every few steps, durable before the run goes on: what a kill leaves is then always the same."""
        return dataclasses.replace(
            asked, every_epochs=1, every_steps=EVERY_STEPS, every_seconds=None, keep_every=None, background=False
        )

    def total(self, asked: int) -> int:
        """A few epochs; a loop without epochs is given more batches instead."""
        if asked == 1:
            self.num_batches = self._trial.num_batches * _LOOPS_WITHOUT_EPOCHS
        return min(asked, self._trial.num_epochs)

    # -- what is seen -------------------------------------------------------------------------------

    def opened(self, run: Run) -> None:
        """The run is open: from here on its moments are told."""
        if self._run is None:
            self._run = run
            seconds = self._clock() - self._surroundings.started
            self._tell("opened", resumed_from=run.resumed_from, seconds=seconds, variables=self._variables())
            self._tell("files", value=list(launch.source_digests(launch.process.script)))
            self._let_go = self._clock()

    def at(self, place: Place, run: Run, batch: Any = None) -> None:
        """Tell what is seen, and end the process if it is to end here."""
        if run is not self._run:
            return
        seconds = self._clock() - self._let_go
        if place != "step":
            self._look(place, run, batch, seconds)
        if place in ("step", "epoch"):
            self._freeze(run)
        if place == "epoch" and run.outcome is not None:
            self._end(run)
        self._let_go = self._clock() - (seconds if place == "step" else 0.0)

    def _look(self, place: Place, run: Run, batch: Any, seconds: float) -> None:
        # What runs before an epoch's batches runs again in a resume within it: there the count is of no account.
        is_before = place in ("evaluating", "logged") and not run._loops.number
        counts = (run.epoch, 0 if is_before else run.batch)
        if counts != self._counts:
            self._counts, self._met = counts, Counter()
        key = (place, *counts, self._met[place])
        self._met[place] += 1
        # A snapshot's state belongs to the places around batches; evaluation and log_epoch lie between them.
        state = {} if place in ("evaluating", "logged") else fingerprints.of_state(run.captured())
        row: dict[str, Any] = {"key": key, "seconds": seconds, "state": state}
        if batch is not None:
            row |= {"data": fingerprints.of_data(batch), "samples": fingerprints.of_samples(batch)}
        if place == "batch" and (self._is_first or not self._trial.steady):
            row["variables"] = self._variables()
            self._is_first = False
        self._tell("moment", **row)
        self._num_told += 1
        self._end_here(key)

    def _variables(self) -> dict[str, tuple[str, str]]:
        assert self._run is not None
        return Variables([*self._run._settings.state.values(), self._run]).look(sys._getframe(2))

    def _freeze(self, run: Run) -> None:
        """Keep the run directory as a kill would leave it now, once the first snapshot is there."""
        if self._trial.freeze is not None and not self._is_frozen and (not run.batch or run.step % EVERY_STEPS == 0):
            self._is_frozen = True
            shutil.copytree(run.directory, run.directory.with_name(self._trial.freeze))
            self._tell("frozen", value=self._num_told)

    def _end_here(self, key: tuple[Any, ...]) -> None:
        kill = self._trial.kill
        if kill is not None and key == (kill.place, kill.epoch, kill.batch, kill.number):
            os.kill(os.getpid(), signal.Signals[kill.signal])

    def _end(self, run: Run) -> None:
        """The run is over: what the script does afterwards is its own affair, and is not done here."""
        begin = self._clock()
        run._keeper.manager.stage(run.captured())
        self._tell("stall_seconds", value=self._clock() - begin)
        self._tell("outcome", value=run.outcome)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
