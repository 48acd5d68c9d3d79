"""Run: the user's own loop, made resumable.

The door: arguments, the run's life from entering to leaving, what the loop's body says and asks. What happens between
is in `loop/loops.py` (the loops and their boundaries) and `loop/keeper.py` (the state, restored and saved).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal, Self

from resumable_trainer.errors import Interrupted, ResumableTrainerError, SettingsError, Stopped, UsageError
from resumable_trainer.loop import late_compiler, launch
from resumable_trainer.loop.divergence import OnDivergence
from resumable_trainer.loop.keeper import Keeper
from resumable_trainer.loop.loops import Loops
from resumable_trainer.loop.notices import install_excepthook, notices
from resumable_trainer.loop.progress import Progress
from resumable_trainer.loop.scalars import take
from resumable_trainer.loop.settings import RunSettings
from resumable_trainer.loop.triggers import SnapshotPolicy
from resumable_trainer.metrics.history import History
from resumable_trainer.snapshot.layout import METRICS
from resumable_trainer.state.parts import check_parts

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from resumable_trainer.loop.probe import Place
    from resumable_trainer.manager import Outcome
    from resumable_trainer.metrics.early_stopping import EarlyStopping
    from resumable_trainer.snapshot.tree import Flat


late_compiler.put_off()  # now: whoever imports this makes an optimizer next


class Run:
    """A training that can be killed at any instant and continues as if nothing had happened.

    Use it as a context manager: entering takes the run's lock and restores the newest valid snapshot.

    Args:
        directory: The run directory. None: the one that the command line hands over, or
            `runs/<name of the script>`.
        state: Parts by name: model, optimizer, scheduler, scaler, EMA model, random generators,
            anything with `state_dict()` and `load_state_dict()`.
        seed: Seed of the order of data; a fresh run also seeds the global generators with it.
        snapshots: When to save and what to keep.
        early_stopping: When to stop; None never does.
        progress: None: bars on a terminal, lines elsewhere; True: bars; False: nothing.
        strict: Refuse to continue if something that the numbers depend on has changed.
        on_divergence: What to do when the logged loss is no finite number: "stop" (exit code 79), "rollback" (back to
            the last good snapshot, without the batches that are blamed), or `OnDivergence(...)`; None trains on.

    Raises:
        SettingsError: Illegal settings, all problems at once.

    What lives in the script's local variables across batches is not captured: hand it over as a part.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        state: Mapping[str, object],
        seed: int = 0,
        snapshots: SnapshotPolicy | None = None,
        early_stopping: EarlyStopping | None = None,
        progress: bool | None = None,
        strict: bool = False,
        on_divergence: OnDivergence | Literal["stop", "rollback"] | None = None,
    ) -> None:
        check_parts(state)
        handover = launch.process.handover
        command = handover.command or launch.Command.current()
        probe = None if handover.probe is None else handover.probe()
        policy = snapshots if snapshots is not None else SnapshotPolicy()
        self._settings = RunSettings(
            directory=launch.directory_for(directory, command),
            command=command,
            state=dict(state),
            seed=seed,
            snapshots=policy if probe is None else probe.policy(policy),
            early_stopping=early_stopping,
            on_divergence=OnDivergence.of(on_divergence),
            strict=strict or handover.strict,
            probe=probe,
        )
        self._screen = Progress.for_choice(progress)
        self.says_how_it_steps = False  # a Trainer that compiles its steps does, when it knows
        self._closed = False
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Nothing is known yet: entering reads it from the run directory, each time anew."""
        probe = self._settings.probe
        tell: Callable[[Place, Any], None] | None = None
        if probe is not None:
            tell = lambda place, batch: probe.at(place, self, batch)  # noqa: E731
        self._keeper = Keeper(self._settings, self._screen)
        self._loops = Loops(self._keeper, tell=tell)

    # -- life -------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._begin_anew()
        self._closed = False
        install_excepthook(launch.process.note_failure)
        with contextlib.ExitStack() as if_it_fails:
            notices.begin()
            launch.process.note_leaving(0)  # a script, or a notebook, that goes on after it has left a run has not left
            if_it_fails.callback(notices.end)
            self._keeper.open(says_how_it_steps=self.says_how_it_steps)
            if_it_fails.callback(self._keeper.close)
            self._loops.open()
            if self._settings.probe is not None:
                self._settings.probe.opened(self)
            if_it_fails.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        swallowed = self._loops.leaving.stopped if error is None else None
        error = error or swallowed
        try:
            if error is None:
                self._loops.settle_at_exit()
            elif not isinstance(error, Stopped):
                self._keeper.note_failure(error)
            self._close_saver(error)
        finally:
            self._close(error)
        if isinstance(error, Stopped):
            launch.process.note_leaving(int(error.exit_code))
        if error is None or isinstance(error, Stopped):
            self._screen.say([error.message] if isinstance(error, Stopped) else self._loops.display.ending())
        if swallowed is not None:
            raise swallowed

    def _close_saver(self, error: BaseException | None) -> None:
        try:
            self._keeper.saver.close()
        except ResumableTrainerError as late:
            if error is None or isinstance(error, Stopped):
                self._keeper.note_failure(late)
                raise

    def _close(self, error: BaseException | None) -> None:
        self._closed = True
        self._loops.close()
        self._screen.close()
        try:
            self._keeper.close()
        except ResumableTrainerError:
            if error is None or isinstance(error, Stopped):
                raise
        finally:
            notices.end()
            if not isinstance(error, Stopped):
                self._keeper.heart.closed()
            if isinstance(error, Interrupted):
                notices.reset()  # in a notebook the process lives on, and the cell may be run again

    # -- the loops --------------------------------------------------------------------------------

    def epochs(self, total: int) -> Iterator[int]:
        """Epoch numbers still to be trained, from 0 to `total - 1`.

        After each body: the epoch's row, early stopping, a snapshot, retention. `break` ends the run
        there, and a resume does not redo the rest.

        Args:
            total: Total for the whole run, not "more epochs".

        Raises:
            SettingsError: `total` is no int of at least 0.
        """
        if not isinstance(total, int) or isinstance(total, bool) or total < 0:
            raise SettingsError(f"epochs: total is {total!r}, it must be an int of at least 0")
        return self._loops.epochs(total)

    def batches(
        self, data: Any, *, batch_size: int | None = None, shuffle: bool = False, drop_last: bool = False
    ) -> Iterator[Any]:
        """Batches of this epoch that are not done yet.

        A batch counts as done when the next one is asked for. `break` ends the epoch's batches there.

        Args:
            data: A DataLoader, unchanged; tensors or a TensorDataset (with `batch_size`); a sequence;
                an iterable with `state_dict()`; any other iterable.
            batch_size: Samples per batch; for tensors.
            shuffle: Whether each epoch has an order of its own; for tensors.
            drop_last: Whether a short last batch is left out; for tensors.

        Raises:
            SettingsError: Data or settings that give no batches.
            UsageError: Not within an epoch, or within another loop over batches.
            DriftError: The data have changed since the snapshot, and `strict` is set.
        """
        return self._loops.batches(data, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)

    def evaluating(self, data: Any, *, batch_size: int | None = None) -> Iterator[Any]:
        """Batches for an evaluation; a notice is served between them.

        Args:
            data: As for `batches`; tensors without `batch_size` come as one batch.
            batch_size: Samples per batch; for tensors.

        Raises:
            SettingsError: Data or settings that give no batches.
        """
        return self._loops.evaluating(data, batch_size=batch_size)

    # -- what the body says -----------------------------------------------------------------------

    def log(self, **values: object) -> None:
        """Put values into this batch's row: floats, ints or tensors of one element.

        Never waits for a device. The epoch's means of them, weighted by samples, come into its row.

        Raises:
            UsageError: Outside a batch, a reserved name, a value that is no number.
        """
        row = self._loops.values
        if row is None:
            raise UsageError("log: no batch is under way", hint="values of a whole epoch go into run.log_epoch(...)")
        take(values, row)

    def log_epoch(self, **values: object) -> None:
        """Put values into this epoch's row; they stand before means of the same name.

        Raises:
            UsageError: Outside an epoch, a reserved name, a value that is no number.
        """
        if not self._loops.in_epoch:
            raise UsageError("log_epoch: no epoch is under way")
        self._loops.log_epoch(values)

    def snapshot(self) -> None:
        """One more snapshot, at the next boundary: the end of this batch, else of this epoch.

        Between boundaries the state belongs to no position, so that a resume could not be exact.
        """
        self._loops.settle()
        self._loops.snapshot_wanted = True

    def say(self, line: str) -> None:
        """Show a line for a person, above the bars."""
        self._screen.say([line])

    # -- what it may ask --------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self._settings.directory

    @property
    def step(self) -> int:
        """Training batches finished since the start of the run."""
        return self._keeper.cursor.step

    @property
    def epoch(self) -> int:
        """Index of the epoch under way; epochs finished outside of one."""
        return self._keeper.cursor.epoch

    @property
    def batch(self) -> int:
        """Batches finished in the epoch under way."""
        return self._keeper.cursor.batch

    @property
    def resumed_from(self) -> str | None:
        """Name of the snapshot that this launch continues from; None if it began anew."""
        return self._keeper.resumed_from

    @property
    def outcome(self) -> Outcome | None:
        """How the run has ended; None as long as it has not."""
        return self._keeper.outcome

    @property
    def averages(self) -> dict[str, float]:
        """Means of the step values over the epoch so far; reads device tensors."""
        if not self._closed:
            self._loops.settle()
            self._keeper.record.flush()
        return self._keeper.record.averages.means()

    @property
    def history(self) -> History:
        """All rows so far, as columns by name; reads the journal."""
        if self._closed:
            return History.read(self.directory / METRICS)
        self._loops.settle()
        return self._keeper.record.history()

    # -- for loops that know more about their steps ------------------------------------------------

    def depend_on(self, name: str, value: object) -> None:
        """Record a fact that the numbers depend on; what it was in the snapshot is compared once per launch.

        Raises:
            DriftError: It has changed since the snapshot, and `strict` is set.
        """
        self._keeper.depends.on(name, value)

    def remembered(self, name: str) -> Any:
        """A fact as the snapshot has it; None if it has none, or if the data are others now."""
        return self._keeper.depends.remembered(name)

    def leave_if_asked(self, where: str) -> None:
        """Follow a notice within a batch's body; what was trained since the last snapshot is trained again.

        For code that a notice may have broken: a Trainer's compiler gets the signals of the terminal, too.
        """
        if notices.leave is not None:
            self._loops.leaving.leave(notices.leave, where)

    def captured(self) -> Flat:
        """The whole state as a snapshot would hold it now, tensors live; for those who examine a run."""
        return self._loops.captured()
