"""Divergence: a loss that is no number any more, or leaps; what is done about it, as pure values.

A loss is looked at when rows of steps are written, at the latest before a snapshot: a device is not waited for, and no
snapshot is taken behind a diverged step. Which step has diverged, and which batches are left out because of it, are
functions of the rows alone. So a run that is killed at any instant finds the same divergence again, and skips the same.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from resumable_trainer.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Action = Literal["stop", "rollback"]


@dataclass(frozen=True)
class OnDivergence:
    """What to do when a run diverges.

    Args:
        action: "stop": leave with exit code 79, the snapshot of before is kept. "rollback": go back to the last good
            snapshot, leave out the batches that are blamed, and go on.
        metric: Which logged value is looked at, in every row of a step (and of an epoch, if it is logged there).
        spike: Besides NaN and infinities: a value more than so many times the median of the last `window` values.
        window: How many values the median is of; a spike is looked for from so many on.
        skip_batches: How many batches are blamed: the one that diverged and those trained before it. Doubled at each
            rollback that does not get past them.
        max_rollbacks: How often a run may go back; after that it stops with exit code 79.

    Raises:
        SettingsError: Any of them illegal; all problems in one message.
    """

    action: Action = "stop"
    metric: str = "loss"
    spike: float | None = None
    window: int = 100
    skip_batches: int = 1
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        problems = []
        if self.action not in ("stop", "rollback"):
            problems.append(f"action is {self.action!r}, it must be 'stop' or 'rollback'")
        if not isinstance(self.metric, str) or not self.metric:
            problems.append(f"metric is {self.metric!r}, it must be the name of a logged value")
        if self.spike is not None and not (isinstance(self.spike, int | float) and 1 < self.spike < float("inf")):
            problems.append(f"spike is {self.spike!r}, it must be None or more than 1")
        for name, least in (("window", 2), ("skip_batches", 1), ("max_rollbacks", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                problems.append(f"{name} is {value!r}, it must be an int of at least {least}")
        if problems:
            raise SettingsError(f"OnDivergence: {'; '.join(problems)}", found=problems)

    @classmethod
    def of(cls, choice: OnDivergence | Action | None) -> OnDivergence | None:
        """The settings that a user's choice stands for.

        Raises:
            SettingsError: It is none of the two words.
        """
        return choice if choice is None or isinstance(choice, OnDivergence) else cls(action=choice)


@dataclass(frozen=True)
class Divergence:
    """A row that has diverged.

    Attributes:
        step: Batches finished before it.
        epoch: Epochs finished before it.
        batch: Its batch within the epoch, from 0.
        name: Of the value.
        value: The value.
        median: Of the values before it, if it is a spike; None if it is no number.
    """

    step: int
    epoch: int
    batch: int
    name: str
    value: float
    median: float | None = None

    def __str__(self) -> str:
        against = "" if self.median is None else f" (median before: {self.median:.4g})"
        return (
            f"{self.name} is {self.value:.4g}{against} at step {self.step} (epoch {self.epoch + 1}, batch {self.batch})"
        )


Row = tuple[int, int, int]
"""Step, epoch and batch of a row."""


@dataclass
class DivergenceWatch:
    """Looks at rows in the order of their steps, and remembers what is left out; part of a run's state.

    Attributes:
        settings: What to look for; None: nothing, but what was left out before stays out.
        found: The first row that has diverged.
        skips: Batches left out: [epoch, first, last].
        num_rollbacks: How often the run has gone back.
    """

    settings: OnDivergence | None
    found: Divergence | None = None
    skips: list[tuple[int, int, int]] = field(default_factory=list)
    num_rollbacks: int = 0
    _blamed: int = 0  # how many batches at the last rollback
    _last_step: int = -1  # the step that had diverged then
    _values: deque[float] = field(default_factory=deque)

    def look(self, positions: Iterable[Row], values: Sequence[Any]) -> None:
        """Look at the watched value of rows, in the order of their steps; stops at the first that has diverged."""
        settings = self.settings
        if settings is None or self.found is not None or (settings.spike is None and isfinite(sum(values))):
            return
        for (step, epoch, batch), value in zip(positions, values, strict=True):
            median = self._median_if_leapt(settings, value)
            if not isfinite(value) or median is not None:
                self.found = Divergence(step, epoch, batch, settings.metric, value, median)
                return
            if settings.spike is not None:
                self._values.append(value)
                if len(self._values) > settings.window:
                    self._values.popleft()

    def _median_if_leapt(self, settings: OnDivergence, value: float) -> float | None:
        if settings.spike is None or not isfinite(value) or len(self._values) < settings.window:
            return None
        median = statistics.median(self._values)
        return median if value > settings.spike * abs(median) else None

    def num_blamed(self, divergence: Divergence) -> int:
        """How many of the last trained batches are to be left out: more if the run has not got past the last ones."""
        assert self.settings is not None
        if divergence.step <= self._last_step:  # as many steps less were trained before it as were left out
            return 2 * self._blamed
        return self.settings.skip_batches

    def rolled_back(self, divergence: Divergence, skips: Sequence[tuple[int, int, int]], num_blamed: int) -> None:
        """The run goes back and leaves these batches out."""
        self.skips = merged([*self.skips, *skips])
        self.num_rollbacks += 1
        self._blamed, self._last_step, self.found = num_blamed, divergence.step, None

    def left_out(self, epoch: int) -> frozenset[int]:
        """Batches of an epoch that are not trained."""
        return frozenset(batch for at, first, last in self.skips if at == epoch for batch in range(first, last + 1))

    def state_dict(self) -> dict[str, Any] | None:
        """Plain values; None if there is nothing to remember."""
        if self.settings is None and not self.skips:
            return None
        return {
            "skips": [list(skip) for skip in self.skips],
            "num_rollbacks": self.num_rollbacks,
            "blamed": self._blamed,
            "last_step": self._last_step,
            "values": list(self._values),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """The way back of `state_dict`."""
        state = state or {}
        self.found = None
        self.skips = [(epoch, first, last) for epoch, first, last in state.get("skips", ())]
        self.num_rollbacks = state.get("num_rollbacks", 0)
        self._blamed, self._last_step = state.get("blamed", 0), state.get("last_step", -1)
        self._values = deque(state.get("values", ()))

    def keep_decisions_of(self, other: DivergenceWatch) -> None:
        """What was decided stays decided when the run goes back behind it; what was seen since is forgotten."""
        self.skips, self.num_rollbacks = other.skips, other.num_rollbacks
        self._blamed, self._last_step = other._blamed, other._last_step


def stretches(rows: Sequence[Row]) -> list[tuple[int, int, int]]:
    """Rows as [epoch, first batch, last batch]; batches between them, of which none was logged, are left out too."""
    by_epoch: dict[int, list[int]] = {}
    for _, epoch, batch in rows:
        by_epoch.setdefault(epoch, []).append(batch)
    return [(epoch, min(batches), max(batches)) for epoch, batches in sorted(by_epoch.items())]


def merged(skips: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The same batches in order, those that touch in one."""
    result: list[tuple[int, int, int]] = []
    for epoch, first, last in sorted(skips):
        if result and result[-1][0] == epoch and first <= result[-1][2] + 1:
            first, last = result[-1][1], max(last, result[-1][2])
            result.pop()
        result.append((epoch, first, last))
    return result


def in_words(skips: Sequence[tuple[int, int, int]]) -> str:
    """Batches left out, for a person: epochs count from 1, batches from 0 as in the rows."""
    return ", ".join(
        f"epoch {epoch + 1} batch {first}" if first == last else f"epoch {epoch + 1} batches {first} to {last}"
        for epoch, first, last in skips
    )
