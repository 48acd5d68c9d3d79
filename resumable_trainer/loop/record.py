"""The record of a run's numbers: rows of the metric journal, running averages, best, early stopping.

Rows are collected and written together: a logged device tensor is read only then. No clock readings
and no host names go in, so that the journal of a run killed and resumed any number of times is that
of a run never killed, byte for byte.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.journal import Journal, Mark, read_rows_from_end
from resumable_trainer.errors import UsageError
from resumable_trainer.loop.divergence import DivergenceWatch, OnDivergence
from resumable_trainer.loop.rows import StepRows
from resumable_trainer.loop.scalars import PendingScalar, read_all, take
from resumable_trainer.metrics.averages import RunningAverages
from resumable_trainer.metrics.early_stopping import BestValue, EarlyStopping, StoppingCounters, better
from resumable_trainer.metrics.history import History

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from resumable_trainer.durable.files import Files
    from resumable_trainer.snapshot.layout import Position

_MAX_PENDING_ROWS = 256
EMPTY_MARK_DIGEST = "99aa06d3014798d86001c324468d497f"  # xxh3-128 of no bytes


class Record:
    """Everything that a run's `log` and `log_epoch` lead to.

    Args:
        path: The metric journal.
        early_stopping: Settings; None for none.
        files: Primitive operations.
        on_divergence: What counts as diverged; None for nothing.

    Attributes:
        watch: What has diverged, and which batches are left out because of it.
    """

    def __init__(
        self,
        path: Path,
        early_stopping: EarlyStopping | None,
        *,
        files: Files,
        on_divergence: OnDivergence | None = None,
    ) -> None:
        self._path = path
        self.watch = DivergenceWatch(on_divergence)
        self._files = files
        self._journal = Journal.open(path, files=files)
        self._settings = early_stopping
        self._rows = StepRows(())  # to which the next row is added, if it holds the same names
        self._pending: list[StepRows] = []  # it and those before it
        self._epoch_values: dict[str, PendingScalar] = {}
        self._last_epoch_row: dict[str, float] = {}
        self.averages = RunningAverages()
        self.counters = StoppingCounters()
        self.best: BestValue | None = None

    def add_step(self, step: int, epoch: int, batch: int, weight: int, values: Mapping[str, PendingScalar]) -> None:
        """A batch of `weight` samples is done, at this position; its row."""
        rows, names = self._rows, tuple(values)
        if rows.names != names:
            rows = self._rows = StepRows(names)
            self._pending.append(rows)
        rows.positions.append((step, epoch, batch))
        rows.weights.append(weight)
        rows.values += values.values()
        if len(rows.weights) >= _MAX_PENDING_ROWS:
            self.flush()

    def add_epoch_values(self, values: Mapping[str, object]) -> None:
        """Values for the row of the epoch under way."""
        take(values, self._epoch_values)

    def flush(self) -> None:
        """Write the rows collected so far; reads device tensors, all together."""
        for rows in self._pending:
            rows.read()
            rows.add_to(self.averages)
            self._look_at(rows)
            self._journal.append_lines(rows.lines(), len(rows))
        self._forget_pending()

    def _look_at(self, rows: StepRows) -> None:
        settings = self.watch.settings
        if settings is not None and settings.metric in rows.names:
            self.watch.look(rows.positions, rows.values[rows.names.index(settings.metric) :: len(rows.names)])

    def _forget_pending(self) -> None:
        self._pending.clear()
        self._rows = StepRows(())

    def flush_what_is_here(self) -> None:
        """Write the rows collected so far if none of them waits for a device."""
        if not any(rows.waits_for_device() for rows in self._pending):
            self.flush()

    def show_rows(self) -> None:
        """Let those who look from outside see the rows so far."""
        self.flush()
        self._journal.flush()

    def look_at_epoch(self, position: Position) -> None:
        """Look for divergence in all that the epoch has logged, its body having ended at this position."""
        self.flush()
        settings = self.watch.settings
        if settings is not None and settings.metric in self._epoch_values:
            read_all([self._epoch_values])
            last = (max(0, position.step - 1), position.epoch, max(0, position.batch - 1))
            self.watch.look([last], [self._epoch_values[settings.metric]])

    def last_steps(self, *, until: int, number: int) -> list[tuple[int, int, int]]:
        """Step, epoch and batch of the last rows of steps up to and including step `until`, at most so many."""
        self.show_rows()
        rows = read_rows_from_end(self._path, holding=(b'"row":"step"',))
        found = ((row["step"], row["epoch"], row["batch"]) for row in rows)
        return list(islice((at for at in found if at[0] <= until), number))[::-1]

    def end_epoch(self, position: Position) -> dict[str, float]:
        """Write the epoch's row, update best and early stopping; the row's values.

        Args:
            position: Where the epoch's body ended.

        Raises:
            UsageError: The early-stopping metric is not among the epoch's values.
        """
        self.flush()
        read_all([self._epoch_values])
        values: dict[str, Any] = {**self.averages.means(), **self._epoch_values}
        self._journal.append(_row("epoch", position, values))
        if self._settings is not None:
            self._judge(self._settings, position, values)
        self.averages.clear()
        self._epoch_values, self._last_epoch_row = {}, values
        return values

    def _judge(self, settings: EarlyStopping, position: Position, values: Mapping[str, float]) -> None:
        if settings.metric not in values:
            raise UsageError(
                f"early stopping watches {settings.metric!r}, which epoch {position.epoch} did not log",
                found=sorted(values),
                expected=settings.metric,
                hint=f"log it with run.log_epoch({settings.metric}=...); logged were: {', '.join(values) or 'none'}",
            )
        value = float(values[settings.metric])
        self.counters = settings.updated(self.counters, value)
        self.best = better(settings, self.best, BestValue(settings.metric, value, position.epoch, position.step))

    @property
    def should_stop(self) -> bool:
        """Whether early stopping's patience, as the script says it now, is used up."""
        return self._settings is not None and self._settings.should_stop(self.counters)

    @property
    def last_epoch_values(self) -> dict[str, float]:
        """Values of the newest epoch row."""
        return self._last_epoch_row

    def mark(self) -> Mark:
        """Where the journal stands, every row so far included."""
        self.flush()
        return self._journal.mark()

    def sync(self) -> None:
        """Make the journal durable; called by the thread that writes snapshots."""
        self._journal.sync()

    @property
    def whole_file(self) -> Path | None:
        """The journal's file, if syncing it is all that makes the marked rows durable."""
        return self._journal.whole_file

    def history(self) -> History:
        """All rows so far."""
        self.show_rows()
        return History.read(self._path)

    def rewind(self, mark: Mark) -> bool:
        """Cut the journal back to a mark; False if it does not hold what the mark counts."""
        return self._journal.rewind(mark)

    def reopen(self) -> None:
        """Take up the journal anew after its file was replaced."""
        self._journal.close()
        self._journal = Journal.open(self._path, files=self._files)

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Put back a row that was read from a damaged journal."""
        self._journal.append(row)

    def close(self) -> None:
        """Close the journal; rows that no snapshot counts stay until the next start cuts them."""
        self._journal.close()

    def state_dict(self) -> dict[str, Any]:
        """What a snapshot keeps of it beside the mark."""
        self.flush()
        read_all([self._epoch_values])
        best = self.best
        diverged = self.watch.state_dict()
        return {
            **({} if diverged is None else {"divergence": diverged}),
            "averages": self.averages.state_dict(),
            "epoch_values": [[name, value] for name, value in self._epoch_values.items()],
            "counters": [self.counters.reference, self.counters.wait],
            "best": None if best is None else [best.metric, best.value, best.epoch, best.step],
            "watched": self._watched(),
            "last_epoch_row": [[name, value] for name, value in self._last_epoch_row.items()],
        }

    def _watched(self) -> list[str] | None:
        return None if self._settings is None else [self._settings.metric, self._settings.mode]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The way back of `state_dict`; counters of another metric than the one watched now are dropped."""
        self._forget_pending()
        self.watch.load_state_dict(state.get("divergence"))
        self.averages.load_state_dict(state["averages"])
        self._epoch_values = dict(state["epoch_values"])
        self._last_epoch_row = dict(state["last_epoch_row"])
        if self._watched() == state["watched"]:
            self.counters = StoppingCounters(*state["counters"])
            self.best = None if state["best"] is None else BestValue(*state["best"])


def _row(kind: str, position: Position, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"row": kind, "step": position.step, "epoch": position.epoch, "batch": position.batch, **values}
