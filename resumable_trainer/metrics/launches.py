"""One launch of a run, as its events tell it row by row, and where its time went. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from resumable_trainer.metrics.goodput import Goodput, seconds_of

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    leaving_at: float | None = None  # when it began to save and leave
    over_at: float | None = None  # when the run had ended; what the script does then is its own
    exited_at: float | None = None  # when the script was through
    silent_since: float | None = None  # its last word, if somebody else has told its end
    is_end_known: bool = False
    is_done: bool = False  # the run ended with it
    is_afterwards: bool = False  # the run had ended before it began

    @property
    def found_nothing_to_do(self) -> bool:
        """Whether it came when the run had ended, and left it at that: it is none of the run's."""
        return self.is_afterwards and self.training_at is None and self.kind is None

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


def step_of(row: Mapping[str, Any]) -> int | None:
    """The step that a row tells of, if that can be one."""
    step = row.get("step")
    return step if type(step) is int and 0 <= step < 2**62 else None


def close(launch: Launch, previous: Mapping[str, Any], at: float) -> None:
    """What the next launch has found in the lock of this one."""
    seen, step = seconds_of(previous.get("seen")), step_of(previous)
    if seen is not None:
        launch.alive = min(seen, at)
        if not launch.is_end_known:
            launch.ended = max(launch.ended, launch.alive)
    if step is not None:
        launch.step = max(launch.step, step)


def _training(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    launch.over_at = None
    if launch.rolled_back_at is not None:
        launch.lost_to_rollbacks += at - launch.rolled_back_at
        launch.rolled_back_at = None
    launch.training_at = at if launch.training_at is None else launch.training_at


def _committed(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    launch.over_at = None
    taken = seconds_of(row.get("taken"))
    taken = min(at, taken) if taken is not None else at
    launch.taken.pop(name := str(row.get("snapshot")), None)  # saved anew, after going back: it is the newest now
    launch.taken[name] = taken
    launch.newest_taken = taken if launch.newest_taken is None else max(launch.newest_taken, taken)
    launch.stalls += _duration(row.get("stall_seconds")) or 0.0


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
    seconds = _duration(row.get("leaving_seconds"))
    launch.leaving_at = None if seconds is None else at - seconds


def _failed(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    launch.kind = launch.kind or "failed"


def _finished(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    launch.is_done, launch.over_at = True, at


def _exited(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    launch.is_end_known, launch.exited_at = True, at
    launch.is_done |= row.get("code") == 0
    if not launch.is_done:
        launch.kind = launch.kind or "failed"  # it refused to train, say: it was not killed


def _ended(launch: Launch, row: Mapping[str, Any], at: float) -> None:
    if launch.silent_since is None:
        launch.silent_since = launch.ended
    launch.is_end_known = True
    if row.get("result") == "hang":
        launch.kind = "hung"


def _duration(seconds: object) -> float | None:
    """Seconds as a row tells them; None if they can be none."""
    return seconds if isinstance(seconds, int | float) and isfinite(seconds) and seconds > 0 else None


TAKERS = {
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


def settled_with(so_far: Goodput, launch: Launch, following: Launch | None, *, is_running: bool = False) -> Goodput:
    """The account with one launch more, given the one after it."""
    if launch.found_nothing_to_do:
        return so_far
    seconds, interruptions = dict(so_far.seconds), dict(so_far.interruptions)
    for kind, part in _parts(launch, is_last=following is None, is_running=is_running).items():
        seconds[kind] += part
    repeated = so_far.steps_repeated
    if following is not None:
        seconds["down"] += max(0.0, following.began - launch.ended) if launch.over_at is None else 0.0
        repeated += max(0, launch.step - following.resumed_step)
    if not launch.is_done or launch.kind is not None:
        kind = launch.kind or "killed"
        interruptions[kind] = interruptions.get(kind, 0) + 1
    return Goodput(so_far.launches + 1, interruptions, so_far.rollbacks + launch.rollbacks, repeated, seconds)


def _parts(launch: Launch, *, is_last: bool, is_running: bool) -> dict[str, float]:
    """Where the time of one launch went; adds up to its duration, without what a script does after the run."""
    known = [at for at in (launch.over_at, launch.exited_at) if at is not None]
    began, ended = launch.began, min([*known, launch.ended])
    training_at = ended if launch.training_at is None else min(max(launch.training_at, began), ended)
    set_up, left = training_at - began, ended - training_at
    hung = 0.0
    if launch.kind == "hung":
        hung = min(ended - began, max(0.0, ended - max(launch.alive or 0.0, launch.silent_since or 0.0)))
    in_training = min(hung, left)
    set_up, left = set_up - (hung - in_training), left - in_training
    newest = training_at if launch.newest_taken is None else launch.newest_taken
    kept = newest  # when the state was captured that the next launch went on from; our beginning if it was an earlier's
    if not is_last and not launch.is_done:
        kept = training_at if launch.continued_at is None else launch.continued_at
    leaves_in_order = launch.kind in ("preempted", "interrupted") or launch.is_done
    lost = 0.0 if is_running else max(0.0, ended - hung - kept)
    saving = 0.0
    if leaves_in_order and kept >= newest:
        # What came between the state that was saved and the leaving (an evaluation, say) is made again.
        saving = min(left, lost, max(0.0, ended - (launch.leaving_at or 0.0)))
        lost -= saving
    left -= saving
    repeated = min(left, lost + launch.lost_to_rollbacks)
    left -= repeated
    stalls = min(left, launch.stalls)
    return {
        "set-up": set_up,
        "hung": hung,
        "repeated": repeated,
        "saving": saving + stalls,
        "training": left - stalls,
        "down": 0.0 if launch.exited_at is None else launch.ended - launch.exited_at,  # the process is taken down
    }
