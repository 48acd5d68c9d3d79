"""What a run's events come to: its launches, where their time went, how often it was interrupted, what it has learned.

A fold over the rows of `events.jsonl`, oldest first, whose state can be noted among them: who reads later goes on from
the newest state that was noted, and reads only what has come since, however old the run is. It comes to the same as
reading all. Where nobody has written how a launch ended, its end is the last sign of life that the next one found in
the lock (refreshed about once a second). Rows that are torn, foreign or older are passed over. Free of torch.
"""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.digest import reading
from resumable_trainer.durable.journal import read_rows_from_end, rows_after
from resumable_trainer.metrics.goodput import KINDS, Goodput, seconds_of
from resumable_trainer.metrics.launches import TAKERS, AbridgedError, Launch, close, settled_with, step_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pydantic import TypeAdapter

NOTED = "accounted"  # the event that holds a state
_VERSION = 2  # of what a state means: one of another version is not gone on from


@dataclass
class Account:
    """What the rows so far come to.

    Attributes:
        settled: Of launches of which nothing more can become known.
        launches: The others: the newest, and the one before it.
        interrupted: How many launches ended before the run did, and not because a person wanted it.
        ran_seconds: How long all launches but the newest have run.
        said: How the newest launch says that the run stands: "failed", or its outcome.
        longest_gap_seconds: As noted by the newest event of that, whatever it holds.
    """

    settled: Goodput = field(default_factory=lambda: Goodput(0, {}, 0, 0, dict.fromkeys(KINDS, 0.0)))
    launches: list[Launch] = field(default_factory=list)
    interrupted: int = 0
    ran_seconds: float = 0.0
    said: str | None = None
    longest_gap_seconds: Any = None
    _launched_at: float | None = None
    _newest_at: float | None = None
    _ended_in_order: bool = True

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Account:
        """Of all rows, oldest first."""
        account = cls()
        for row in events:
            account.take(row)
        return account

    @classmethod
    def read(cls, path: Path) -> Account:
        """Of a run's events, from the newest state that was noted on; empty if there are none.

        Raises:
            ValueError: A line that has to be read is damaged.
            OSError: They cannot be read.
        """
        return cls.read_up_to(path)[0]

    @classmethod
    def read_up_to(cls, path: Path) -> tuple[Account, int]:
        """The same, and where the last row that it holds ends."""
        if not path.exists():
            return cls(), 0
        try:
            return _gone_on(path, *newest_noted(path))
        except AbridgedError:
            return _gone_on(path, cls(), 0)

    def noted(self, upto: int) -> dict[str, Any]:
        """Fields of the event that holds this state.

        Args:
            upto: The end of the last row in it, in bytes.
        """
        state = replace(self, launches=[launch.abridged() for launch in self.launches])
        return {"version": _VERSION, "upto": upto, "account": asdict(state)}

    # -- row by row -------------------------------------------------------------------------------

    def take(self, row: Mapping[str, Any]) -> None:
        """Add a row; times never run backwards.

        Raises:
            AbridgedError: This goes on from a state that was noted, and the row asks for what that has left out.
        """
        at, event = seconds_of(row.get("time")), row.get("event")
        if event in ("launched", "failed", "finished"):
            self.said = {"launched": None, "failed": "failed"}.get(event, str(row.get("outcome")))
        if event == "paced":
            self.longest_gap_seconds = row.get("longest_gap_seconds")
        if at is None:
            return
        self._count_interruptions(row, event, at)
        if event == "launched":
            self._begin(row, at)
        elif self.launches and event != "pruned":  # pruning is no activity of the run
            launch = self.launches[-1]
            at = max(at, launch.ended)
            if event not in ("diverged", "resumed") and (step := step_of(row)) is not None:
                launch.step = max(launch.step, step)
            if event == "resumed":
                self._resumed(row)
            elif isinstance(event, str) and event in TAKERS:
                TAKERS[event](launch, row, at)
            launch.ended = at

    def _count_interruptions(self, row: Mapping[str, Any], event: object, at: float) -> None:
        if event == "launched":
            if self._launched_at is not None and self._newest_at is not None:
                self.ran_seconds += max(0.0, self._newest_at - self._launched_at)
                self.interrupted += not self._ended_in_order
            self._launched_at, self._ended_in_order = at, False
        elif event in ("finished", "interrupted") or (event == "exited" and row.get("code") == 0):
            self._ended_in_order = True  # the run was done, or a person wanted it so
        self._newest_at = at

    def _begin(self, row: Mapping[str, Any], at: float) -> None:
        earliest, is_afterwards = 0.0, False
        if self.launches:
            before, previous = self.launches[-1], row.get("previous")
            if isinstance(previous, dict) and previous.get("generation") == before.generation:
                close(before, previous, at)
            earliest = before.ended
            is_afterwards = before.over_at is not None or before.found_nothing_to_do
        started = seconds_of(row.get("started"))
        began = max(earliest, min(started, at) if started is not None else at)
        launch = Launch(began, max(at, began), row.get("generation"), is_afterwards=is_afterwards)
        self.launches.append(launch)
        if len(self.launches) > 2:
            self.settled = settled_with(self.settled, self.launches[0], self.launches[1])
            del self.launches[0]

    def _resumed(self, row: Mapping[str, Any]) -> None:
        launch = self.launches[-1]
        if launch.training_at is None:  # else it went back because it had diverged
            launch.resumed_step = launch.step = row["step"] if type(row.get("step")) is int else 0
            if len(self.launches) > 1:
                before = self.launches[0]
                before.continued_at = before.when_taken(row.get("snapshot"))
                if before.continued_at is None and launch.resumed_step > before.resumed_step:
                    # Its own, durable, and it was killed before it could note that: later than the last it has noted.
                    before.continued_at = before.newest_taken

    # -- what it comes to -------------------------------------------------------------------------

    def goodput(self, *, now: float | None = None, seen: float | None = None) -> Goodput:
        """Where the run's time went.

        Args:
            now: If it runs: the time, in seconds since the epoch.
            seen: If it does not: when its last launch gave its last sign of life, if that is known.
        """
        if not self.launches:
            return self.settled
        last = self.launches[-1]
        if now is not None:
            last = replace(last, ended=max(last.ended, now), kind=None, is_done=True)  # it has not ended
        elif not last.is_end_known and seen is not None:
            last = replace(last, ended=max(last.ended, seen))
        found = self.settled if len(self.launches) == 1 else settled_with(self.settled, self.launches[0], last)
        return settled_with(found, last, None, is_running=now is not None)


def _gone_on(path: Path, account: Account, upto: int) -> tuple[Account, int]:
    for end, row in rows_after(path, upto):
        account.take(row)
        upto = end
    return account, upto


def newest_noted(path: Path) -> tuple[Account, int]:
    """The newest state that was noted and can be gone on from, and up to where it counts."""
    for row in read_rows_from_end(path, holding=[f'"event":"{NOTED}"'.encode()]):
        upto = row.get("upto")
        if row.get("event") != NOTED or row.get("version") != _VERSION or type(upto) is not int:
            continue
        with contextlib.suppress(ValueError):
            account = _checked(row.get("account"))
            if _ends_a_row(path, upto):
                return account, upto
    return Account(), 0


def _checked(state: object) -> Account:
    """A state that was noted.

    Raises:
        ValueError: It is none.
    """
    account = _adapter().validate_python(state)
    if account.settled.seconds.keys() != set(KINDS):
        raise ValueError(f"time went to {', '.join(account.settled.seconds)}")
    return account


@functools.cache
def _adapter() -> TypeAdapter[Account]:
    from pydantic import TypeAdapter

    return TypeAdapter(Account)


def _ends_a_row(path: Path, offset: int) -> bool:
    with reading(path) as file:
        return 0 < offset <= os.fstat(file.fileno()).st_size and os.pread(file.fileno(), 1, offset - 1) == b"\n"
