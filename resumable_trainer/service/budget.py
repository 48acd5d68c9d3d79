"""How often a training is started again, and after which wait: a pure policy.

Preemptions and failures have budgets of their own: a spot market that takes the machine away fifty
times says nothing about the training. What tells a training that cannot go on from one that is
unlucky is durable progress: after so many failures in a row without any, starting it again is no use.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from typing import Literal

from resumable_trainer.errors import ExitCode, SettingsError

Kind = Literal["preempted", "failed", "final"]
NO_USE = (ExitCode.USAGE, ExitCode.NO_VALID_SNAPSHOT, ExitCode.NOT_FOUND, ExitCode.SETTINGS, ExitCode.DIVERGED)
"""Endings after which starting again comes to the same, whoever does it."""
FINAL = frozenset({*NO_USE, ExitCode.DONE, ExitCode.HELD, ExitCode.INTERRUPTED})

_MAX_UNOPENED = 2


@dataclass(frozen=True)
class Ending:
    """How a child ended.

    Attributes:
        code: Its exit code; negative: the signal that it died of.
        progressed: Whether it has made durable progress.
        step: Of the newest durable snapshot; None if there is none.
        error: What it said about its failure; empty if nothing.
        hung: Whether it was ended because it made no progress.
        has_opened: Whether a run was ever opened, by it or before it.
    """

    code: int
    progressed: bool
    step: int | None = None
    error: str = ""
    hung: bool = False
    has_opened: bool = True

    @property
    def kind(self) -> Kind:
        """Whether to start again, and whose budget pays for it."""
        if self.hung:
            return "failed"
        if self.code in FINAL:
            return "final"
        # A SIGTERM that kills came before the training's handlers stood.
        return "preempted" if self.code in (ExitCode.PREEMPTED, -signal.SIGTERM) else "failed"

    def __str__(self) -> str:
        if self.hung:
            return "it made no progress"
        if self.code < 0:
            return f"it died of {_name(-self.code)}"
        words = "it was preempted" if self.code == ExitCode.PREEMPTED else f"it failed with exit code {self.code}"
        return f"{words} ({self.error})" if self.error else words


@dataclass(frozen=True)
class Limits:
    """How often a training may be started again.

    Args:
        max_failures: After failures, over the supervisor's life; None for no limit.
        max_preemptions: After preemptions; None for no limit.
        max_stuck: After failures in a row without durable progress; before any run was opened at most 2, as a script
            that does not get so far is wrong rather than unlucky.
        first_wait_seconds: Before the first restart after a failure; doubled at each further one without progress.
        longest_wait_seconds: The wait grows no longer.

    Raises:
        SettingsError: Any of them illegal; all problems in one message.
    """

    max_failures: int | None = None
    max_preemptions: int | None = None
    max_stuck: int = 5
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 300.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, it must be at least {least}"
            for name, value, least in (
                ("max_failures", self.max_failures, 0),
                ("max_preemptions", self.max_preemptions, 0),
                ("max_stuck", self.max_stuck, 0),
                ("first_wait_seconds", self.first_wait_seconds, 0),
                ("longest_wait_seconds", self.longest_wait_seconds, self.first_wait_seconds),
            )
            if value is not None and not value >= least
        ]
        if problems:
            raise SettingsError(f"restarts: {'; '.join(problems)}", found=problems)


@dataclass(frozen=True)
class Spent:
    """What has been used up so far.

    Attributes:
        failures: All of them.
        preemptions: All of them.
        stuck: Failures since the last durable progress.
        idle: Endings of both kinds since the last durable progress.
        errors: What the failures since then said, without repetition.
    """

    failures: int = 0
    preemptions: int = 0
    stuck: int = 0
    idle: int = 0
    errors: tuple[str, ...] = ()

    @property
    def restarts(self) -> int:
        """How often the training has been started again, if each ending led to it."""
        return self.failures + self.preemptions

    def after(self, ending: Ending) -> Spent:
        """What is used up once a child has ended so."""
        before = replace(self, stuck=0, idle=0, errors=()) if ending.progressed else self
        if ending.kind == "preempted":
            return replace(before, preemptions=self.preemptions + 1, idle=before.idle + (not ending.progressed))
        said = str(ending)
        errors = before.errors if said in before.errors else (*before.errors, said)
        return replace(before, failures=self.failures + 1, stuck=before.stuck + 1, idle=before.idle + 1, errors=errors)


@dataclass(frozen=True)
class Decision:
    """What follows from an ending.

    Attributes:
        wait_seconds: Before the next start; None: there is none.
        reason: Why there is none; empty if a restart follows or nothing is left to do.
    """

    wait_seconds: float | None
    reason: str = ""


def decide(limits: Limits, spent: Spent, ending: Ending) -> Decision:
    """Whether to start again after `ending`, which `spent` counts already."""
    if ending.kind == "final":
        return Decision(None)
    max_stuck = limits.max_stuck if ending.has_opened else min(limits.max_stuck, _MAX_UNOPENED)
    if ending.kind == "failed" and spent.stuck > max_stuck:
        return Decision(None, _why_stuck(spent, ending))
    if limits.max_failures is not None and spent.failures > limits.max_failures and ending.kind == "failed":
        return Decision(None, f"{spent.failures} failures, {limits.max_failures} are allowed; at last {ending}")
    if limits.max_preemptions is not None and spent.preemptions > limits.max_preemptions and ending.kind == "preempted":
        return Decision(None, f"{spent.preemptions} preemptions, {limits.max_preemptions} are allowed")
    return Decision(_wait(limits, spent))


def _wait(limits: Limits, spent: Spent) -> float:
    if not spent.idle:
        return 0.0  # preempted, and further than before: go on at once
    return min(limits.longest_wait_seconds, limits.first_wait_seconds * 2.0 ** min(spent.idle - 1, 60))


def _why_stuck(spent: Spent, ending: Ending) -> str:
    where = "before the first snapshot" if ending.step is None else f"at step {ending.step}"
    where = where if ending.has_opened else "before a run was opened"
    same = "each time the same" if len(spent.errors) == 1 else f"{len(spent.errors)} different errors, the last"
    return f"{spent.stuck} failures in a row without durable progress, {where}; {same}: {ending}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
