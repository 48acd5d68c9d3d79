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
from math import isfinite
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.digest import reading
from resumable_trainer.durable.journal import read_rows_from_end, rows_after
from resumable_trainer.metrics.goodput import KINDS, Goodput, seconds_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pydantic import TypeAdapter

NOTED = "accounted"  # the event that holds a state
_VERSION = 1  # of what a state means: one of another version is not gone on from
_REMEMBERED = 8  # snapshots of a launch in a state that is noted; whoever resumes takes nearly always the newest


class AbridgedError(LookupError):
    """A state that was noted does not hold what a row asks for: the rows must be read from the beginning."""


@dataclass
class Launch:
    """What the rows of one launch say; times in seconds since the epoch."""

    began: float
    ended: float
    generation: Any = None
    training_at: float | None = None
    resumed_step: int = 0
    step: int = 0  # the last that is known
    taken: dict[str, float] = field(default_factory=dict)  # when each snapshot's state was captured
    newest_taken: float | None = None
    is_abridged: bool = False  # `taken` holds the newest alone
    continued_at: float | None = None  # when the state was captured that the next launch went on from, if it was ours
    stalls: float = 0.0
    lost_to_rollbacks: float = 0.0
    rollbacks: int = 0
    rolled_back_at: float | None = None  # until it trains again
    alive: float | None = None  # the last sign of life
    kind: str | None = None  # how it ended, if it said so
    is_end_known: bool = False
    is_done: bool = False  # the run ended with it

    def when_taken(self, snapshot: object) -> float | None:
        """When a snapshot's state was captured; None if this launch has not captured it.

        Raises:
            AbridgedError: It may have been one of those that are forgotten.
        """
        if self.is_abridged and str(snapshot) not in self.taken:
            raise AbridgedError(str(snapshot))
        return self.taken.get(str(snapshot))

    def abridged(self) -> Launch:
        """The same with the newest snapshots alone."""
        newest = dict(list(self.taken.items())[-_REMEMBERED:])
        return replace(self, taken=newest, is_abridged=self.is_abridged or len(newest) < len(self.taken))


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
            at = launch.ended = max(at, launch.ended)
            if event not in ("diverged", "resumed") and (step := _step_of(row)) is not None:
                launch.step = max(launch.step, step)
            if event == "resumed":
                self._resumed(row)
            elif isinstance(event, str) and event in _TAKERS:
                _TAKERS[event](launch, row, at)

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
        earliest = 0.0
        if self.launches:
            before, previous = self.launches[-1], row.get("previous")
            if isinstance(previous, dict) and previous.get("generation") == before.generation:
                _close(before, previous, at)
            earliest = before.ended
        started = seconds_of(row.get("started"))
        began = max(earliest, min(started, at) if started is not None else at)
        self.launches.append(Launch(began, max(at, began), row.get("generation")))
        if len(self.launches) > 2:
            self.settled = _settled(self.settled, self.launches[0], self.launches[1])
            del self.launches[0]

    def _resumed(self, row: Mapping[str, Any]) -> None:
        launch = self.launches[-1]
        if launch.training_at is None:  # else it went back because it had diverged
            launch.resumed_step = launch.step = row["step"] if type(row.get("step")) is int else 0
            if len(self.launches) > 1:
                self.launches[0].continued_at = self.launches[0].when_taken(row.get("snapshot"))

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
        found = self.settled if len(self.launches) == 1 else _settled(self.settled, self.launches[0], last)
        return _settled(found, last, None, is_running=now is not None)


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


def _step_of(row: Mapping[str, Any]) -> int | None:
    step = row.get("step")
    return step if type(step) is int and 0 <= step < 2**62 else None


def _close(launch: Launch, previous: Mapping[str, Any], at: float) -> None:
    """What the next launch has found in the lock of this one."""
    seen, step = seconds_of(previous.get("seen")), _step_of(previous)
    if seen is not None:
        launch.alive = min(seen, at)
        if not launch.is_end_known:
            launch.ended = max(launch.ended, launch.alive)
    if step is not None:
        launch.step = max(launch.step, step)


def _training(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    if launch.rolled_back_at is not None:
        launch.lost_to_rollbacks += at - launch.rolled_back_at
        launch.rolled_back_at = None
    launch.training_at = at if launch.training_at is None else launch.training_at


def _committed(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    taken, stall = seconds_of(row.get("taken")), row.get("stall_seconds")
    taken = min(at, taken) if taken is not None else at
    launch.taken.pop(name := str(row.get("snapshot")), None)  # saved anew, after going back: it is the newest now
    launch.taken[name] = taken
    launch.newest_taken = taken if launch.newest_taken is None else max(launch.newest_taken, taken)
    if isinstance(stall, int | float) and isfinite(stall) and stall > 0:
        launch.stalls += stall


def _diverged(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    if row.get("action") == "rollback":
        taken = launch.when_taken(row.get("back_to"))
        since = launch.training_at if taken is None else taken
        launch.rollbacks += 1
        launch.rolled_back_at = at
        launch.lost_to_rollbacks += max(0.0, at - since) if since is not None else 0.0
    else:
        launch.kind = "diverged"


def _left(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    launch.kind = str(row.get("event"))


def _failed(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    launch.kind = launch.kind or "failed"


def _finished(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    launch.is_done = True


def _exited(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    launch.is_end_known = True
    launch.is_done |= row.get("code") == 0


def _ended(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    launch.is_end_known = True
    if row.get("result") == "hang":
        launch.kind = "hung"


_TAKERS = {
    "training": _training,
    "committed": _committed,
    "diverged": _diverged,
    "preempted": _left,
    "interrupted": _left,
    "failed": _failed,
    "finished": _finished,
    "exited": _exited,
    "ended": _ended,
}


def _settled(so_far: Goodput, launch: Launch, following: Launch | None, *, is_running: bool = False) -> Goodput:
    """The account with one launch more, given the one after it."""
    seconds, interruptions = dict(so_far.seconds), dict(so_far.interruptions)
    for kind, part in _parts(launch, is_last=following is None, is_running=is_running).items():
        seconds[kind] += part
    repeated = so_far.steps_repeated
    if following is not None:
        seconds["down"] += max(0.0, following.began - launch.ended)
        repeated += max(0, launch.step - following.resumed_step)
    if not launch.is_done or launch.kind is not None:
        kind = launch.kind or "killed"
        interruptions[kind] = interruptions.get(kind, 0) + 1
    return Goodput(so_far.launches + 1, interruptions, so_far.rollbacks + launch.rollbacks, repeated, seconds)


def _parts(launch: Launch, *, is_last: bool, is_running: bool) -> dict[str, float]:
    """Where the time of one launch went; adds up to its duration."""
    began, ended = launch.began, launch.ended
    training_at = ended if launch.training_at is None else min(max(launch.training_at, began), ended)
    left = ended - training_at
    parts = {"set-up": training_at - began}
    newest = training_at if launch.newest_taken is None else launch.newest_taken
    hung = 0.0
    if launch.kind == "hung":
        hung = min(left, max(0.0, ended - max(launch.alive or 0.0, newest, training_at)))
    parts["hung"], left = hung, left - hung
    kept = newest  # when the state was captured that the next launch went on from; our beginning if it was an earlier's
    if not is_last and not launch.is_done:
        kept = training_at if launch.continued_at is None else launch.continued_at
    leaves_in_order = launch.kind in ("preempted", "interrupted") or launch.is_done
    lost = 0.0 if is_running else max(0.0, ended - hung - kept)
    if leaves_in_order and kept >= newest:
        parts["saving"], lost = min(left, lost), 0.0
    else:
        parts["saving"] = 0.0
    left -= parts["saving"]
    parts["repeated"] = min(left, lost + launch.lost_to_rollbacks)
    left -= parts["repeated"]
    stalls = min(left, launch.stalls)
    parts["saving"], left = parts["saving"] + stalls, left - stalls
    return {**parts, "training": left}
