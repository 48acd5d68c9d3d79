"""Goodput: which share of a run's wall time moved it forward, and what the rest was lost to.

Computed from the rows of `events.jsonl` alone, so that it can be had of any run at any time. Every second between the
start of the first process and the end of the last (or now) is counted in exactly one place, so that the parts add up to
the whole. Where nobody has written how a launch ended, its end is the last sign of life that the next one found in the
lock (refreshed about once a second). Rows that are torn, foreign or older are passed over. Free of torch.
"""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

KINDS = ("training", "set-up", "saving", "repeated", "hung", "down")
"""Where time goes: what moved the run forward; starting, until the first batch; standing still for snapshots, and
saving on the way out; training that was lost and had to be done again; silence before a hung process was ended; between
launches."""


@dataclass(frozen=True)
class Goodput:
    """An account of a run's time.

    Attributes:
        launches: How many there were.
        interruptions: How many launches ended before the run did, by kind: "preempted", "interrupted" (from the
            keyboard), "failed", "diverged", "hung", "killed".
        rollbacks: How often the run has gone back because it had diverged.
        steps_repeated: Steps that had to be trained again, as far as is known.
        seconds: Wall time by kind, see `KINDS`.
    """

    launches: int
    interruptions: dict[str, int]
    rollbacks: int
    steps_repeated: int
    seconds: dict[str, float]

    @property
    def wall_seconds(self) -> float:
        """From the first start to the end, or to now."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float | None:
        """The share of wall time that moved the run forward; None if no time has passed."""
        return self.seconds["training"] / self.wall_seconds if self.wall_seconds > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "share": self.share,
            "wall_seconds": round(self.wall_seconds, 3),
            "seconds": {kind: round(seconds, 3) for kind, seconds in self.seconds.items()},
            "launches": self.launches,
            "interruptions": dict(self.interruptions),
            "rollbacks": self.rollbacks,
            "steps_repeated": self.steps_repeated,
        }


@dataclass
class _Launch:
    """What the rows of one launch say; times in seconds since the epoch."""

    began: float
    ended: float
    generation: object = None
    training_at: float | None = None
    resumed_from: str | None = None
    resumed_step: int = 0
    step: int = 0  # the last that is known
    taken: dict[str, float] = field(default_factory=dict)  # when each snapshot's state was captured
    stalls: float = 0.0
    lost_to_rollbacks: float = 0.0
    rollbacks: int = 0
    rolled_back_at: float | None = None  # until it trains again
    alive: float | None = None  # the last sign of life
    kind: str | None = None  # how it ended, if it said so
    is_end_known: bool = False
    is_done: bool = False  # the run ended with it
    left_with: str | None = None  # the snapshot saved on the way out


def account(events: Iterable[Mapping[str, Any]], *, now: float | None = None, seen: float | None = None) -> Goodput:
    """The account of a run.

    Args:
        events: Rows of its events, oldest first.
        now: If it runs: the time, in seconds since the epoch.
        seen: If it does not: when its last launch gave its last sign of life, if that is known.
    """
    launches: list[_Launch] = []
    for row in events:
        _take(row, launches)
    if not launches:
        return Goodput(0, {}, 0, 0, dict.fromkeys(KINDS, 0.0))
    last = launches[-1]
    if now is not None:
        last.ended, last.kind, last.is_done = max(last.ended, now), None, True  # it has not ended
    elif not last.is_end_known and seen is not None:
        last.ended = max(last.ended, seen)
    seconds, repeated = dict.fromkeys(KINDS, 0.0), 0
    for launch, following in zip(launches, [*launches[1:], None], strict=True):
        for kind, part in _parts(launch, following, is_running=following is None and now is not None).items():
            seconds[kind] += part
        if following is not None:
            seconds["down"] += max(0.0, following.began - launch.ended)
            repeated += max(0, launch.step - following.resumed_step)
    kinds = Counter(_kind_of(launch, is_last=launch is last) for launch in launches)
    del kinds["done"]
    return Goodput(len(launches), dict(kinds), sum(launch.rollbacks for launch in launches), repeated, seconds)


def _take(row: Mapping[str, Any], launches: list[_Launch]) -> None:
    """Add a row to the launch that it belongs to; times never run backwards."""
    at, event = seconds_of(row.get("time")), row.get("event")
    if at is None:
        return
    if event == "launched":
        _begin(row, at, launches)
        return
    if not launches or event == "pruned":  # pruning is no activity of the run
        return
    launch = launches[-1]
    at = launch.ended = max(at, launch.ended)
    step = row.get("step")
    if type(step) is int and 0 <= step < 2**62 and event not in ("diverged", "resumed"):
        launch.step = max(launch.step, step)
    if event in _TAKERS:
        _TAKERS[event](launch, row, at)


def _begin(row: Mapping[str, Any], at: float, launches: list[_Launch]) -> None:
    earliest = launches[-1].ended if launches else 0.0
    previous = row.get("previous")
    if launches and isinstance(previous, dict) and previous.get("generation") == launches[-1].generation:
        seen, step = seconds_of(previous.get("seen")), previous.get("step")
        if seen is not None:
            launches[-1].alive = min(seen, at)
            if not launches[-1].is_end_known:
                earliest = launches[-1].ended = max(launches[-1].ended, min(seen, at))
        if type(step) is int and 0 <= step < 2**62:
            launches[-1].step = max(launches[-1].step, step)
    started = seconds_of(row.get("started"))
    began = max(earliest, min(started, at) if started is not None else at)
    launches.append(_Launch(began, max(at, began), row.get("generation")))


def _resumed(launch: _Launch, row: Mapping[str, Any], at: float) -> None:
    if launch.training_at is None:  # else it went back because it had diverged
        launch.resumed_from = str(row.get("snapshot"))
        launch.resumed_step = launch.step = row["step"] if type(row.get("step")) is int else 0


def _training(launch: _Launch, row: Mapping[str, Any], at: float) -> None:
    if launch.rolled_back_at is not None:
        launch.lost_to_rollbacks += at - launch.rolled_back_at
        launch.rolled_back_at = None
    launch.training_at = at if launch.training_at is None else launch.training_at


def _committed(launch: _Launch, row: Mapping[str, Any], at: float) -> None:
    taken, stall = seconds_of(row.get("taken")), row.get("stall_seconds")
    launch.taken[str(row.get("snapshot"))] = min(at, taken) if taken is not None else at
    if isinstance(stall, int | float) and isfinite(stall) and stall > 0:
        launch.stalls += stall


def _diverged(launch: _Launch, row: Mapping[str, Any], at: float) -> None:
    if row.get("action") == "rollback":
        since = launch.taken.get(str(row.get("back_to")), launch.training_at)
        launch.rollbacks += 1
        launch.rolled_back_at = at
        launch.lost_to_rollbacks += max(0.0, at - since) if since is not None else 0.0
    else:
        launch.kind = "diverged"


def _left(launch: _Launch, row: Mapping[str, Any], at: float) -> None:
    launch.kind, launch.left_with = str(row.get("event")), str(row.get("snapshot"))


def _failed(launch: _Launch, row: Mapping[str, Any], at: float) -> None:
    launch.kind = launch.kind or "failed"


def _finished(launch: _Launch, row: Mapping[str, Any], at: float) -> None:
    launch.is_done = True


def _exited(launch: _Launch, row: Mapping[str, Any], at: float) -> None:
    launch.is_end_known = True
    launch.is_done |= row.get("code") == 0


def _ended(launch: _Launch, row: Mapping[str, Any], at: float) -> None:
    launch.is_end_known = True
    if row.get("result") == "hang":
        launch.kind = "hung"


_TAKERS = {
    "resumed": _resumed,
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


def _kind_of(launch: _Launch, *, is_last: bool) -> str:
    if launch.is_done and launch.kind is None:
        return "done"
    return launch.kind or "killed"


def _parts(launch: _Launch, following: _Launch | None, *, is_running: bool) -> dict[str, float]:
    """Where the time of one launch went; adds up to its duration."""
    began, ended = launch.began, launch.ended
    training_at = ended if launch.training_at is None else min(max(launch.training_at, began), ended)
    left = ended - training_at
    parts = {"set-up": training_at - began}
    newest = max(launch.taken.values(), default=training_at)
    hung = 0.0
    if launch.kind == "hung":
        hung = min(left, max(0.0, ended - max(launch.alive or 0.0, newest, training_at)))
    parts["hung"], left = hung, left - hung
    kept = _kept_until(launch, following, newest, training_at)
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


def _kept_until(launch: _Launch, following: _Launch | None, newest: float, training_at: float) -> float:
    """When the state was taken that the next launch went on from; this one's beginning if it was an earlier's."""
    if following is None or launch.is_done:
        return newest
    return launch.taken.get(following.resumed_from or "", training_at)


def seconds_of(time: object) -> float | None:
    """A time of an event (ISO 8601 with an offset) as seconds since the epoch; None if it is none."""
    if not isinstance(time, str):
        return None
    try:
        parsed = datetime.datetime.fromisoformat(time)
        return parsed.timestamp() if parsed.tzinfo is not None else None
    except (ValueError, OverflowError, OSError):
        return None


def in_words(goodput: Goodput) -> str:
    """One line for people."""
    if goodput.share is None:
        return "nothing to account for yet"
    text = f"{goodput.share:.1%} of {duration(goodput.wall_seconds)} moved the run forward"
    lost = [(seconds, kind) for kind, seconds in goodput.seconds.items() if kind != "training" and seconds >= 0.05]
    if lost:
        text += " | " + ", ".join(f"{kind} {duration(seconds)}" for seconds, kind in sorted(lost, reverse=True))
    ends = [f"{number} {kind}" for kind, number in goodput.interruptions.items()]
    ends += [f"{goodput.rollbacks} rolled back"] if goodput.rollbacks else []
    if ends:
        text += f" | {goodput.launches} launches: {', '.join(ends)}"
    if goodput.steps_repeated:
        text += f" | {goodput.steps_repeated} steps repeated"
    return text


def duration(seconds: float) -> str:
    """Seconds in a unit that fits."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
