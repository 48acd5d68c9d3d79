"""Goodput: which share of a run's wall time moved it forward, and what the rest was lost to.

Every second between the start of the first process (a supervisor's, if one has started it) and the end of the last (or
now) is counted in exactly one place, so that the parts add up to the whole. Once the run itself has ended its time
stands still: what a script does then (a test, an export, another run) is not counted, until the process is taken down;
nor is the time until somebody gives it more to train. How it is reckoned from a run's events: `account`. Free of torch.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

KINDS = ("training", "set-up", "saving", "repeated", "hung", "down")
"""Where time goes: what moved the run forward; starting, until the first batch; standing still for snapshots, and
saving on the way out; training (or evaluation) that was lost and had to be done again; silence before a hung process
was ended, before its first batch too; between launches, from when the script of one was through."""


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
        text += f" | {_number(goodput.launches, 'launch', 'launches')}: {', '.join(ends)}"
    if goodput.steps_repeated:
        text += f" | {_number(goodput.steps_repeated, 'step', 'steps')} repeated"
    return text


def _number(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def duration(seconds: float) -> str:
    """Seconds in a unit that fits."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
