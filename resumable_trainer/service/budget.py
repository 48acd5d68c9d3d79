"""Whether to start a training again, and after how long: a pure policy over how it has ended. Free of torch.

Preemptions (exit 75) are nobody's fault and have a budget of their own, without limit by default. Failures (exit 70, 74
and the like, death by a signal, hangs) have one too; and whatever the budgets say, a training that comes no further
(no new durable snapshot) is given up after a few restarts: the next would end the same.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Literal

from resumable_trainer.errors import ExitCode, SettingsError

FINAL = frozenset(
    {
        ExitCode.DONE,
        ExitCode.USAGE,
        ExitCode.NO_VALID_SNAPSHOT,
        ExitCode.NOT_FOUND,
        ExitCode.HELD,
        ExitCode.SETTINGS,
        ExitCode.DIVERGED,
        ExitCode.INTERRUPTED,
    }
)
"""Exit codes after which starting again would be of no use."""

Kind = Literal["final", "preempted", "failed"]


@dataclass(frozen=True)
class Ending:
    """How a child has ended.

    Attributes:
        code: As `subprocess` has it: an exit code, or -n for death by signal n.
        hung: Whether it was ended because it made no progress.
        error: What it said, if it did.
    """

    code: int
    hung: bool = False
    error: str = ""

    @property
    def kind(self) -> Kind:
        """What its end means for starting it again."""
        if self.hung:
            return "failed"
        if self.code in FINAL:
            return "final"
        return "preempted" if self.code == ExitCode.PREEMPTED else "failed"

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 + n for death by signal n."""
        return self.code if self.code >= 0 else 128 - self.code

    def __str__(self) -> str:
        if self.hung:
            return "made no progress and was ended"
        if self.code < 0:
            try:
                name = signal.Signals(-self.code).name
            except ValueError:
                name = str(-self.code)
            return f"killed by {name}"
        return f"exit {self.code}" + (f" ({self.error})" if self.error else "")


@dataclass(frozen=True)
class Decision:
    """What is to be done now.

    Attributes:
        restart: Whether to start it again.
        wait_seconds: How long to wait before.
        reason: For a person.
    """

    restart: bool
    wait_seconds: float
    reason: str


@dataclass
class Budget:
    """Counts endings, and decides.

    Args:
        max_failures: How many failures are borne; None for any number.
        max_preemptions: How many preemptions; None for any number.
        max_in_vain: How many restarts after failures without a new durable snapshot.
        first_wait_seconds: Before the first restart after a failure; doubled by each further one without progress.
        longest_wait_seconds: At most.

    Raises:
        SettingsError: A limit below 0.
    """

    max_failures: int | None = 100
    max_preemptions: int | None = None
    max_in_vain: int = 5
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 300.0
    num_failures: int = field(default=0, init=False)
    num_preemptions: int = field(default=0, init=False)
    _in_vain: int = field(default=0, init=False)
    _preempted_in_vain: int = field(default=0, init=False)
    _endings: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        for name in ("max_failures", "max_preemptions", "max_in_vain"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise SettingsError(f"{name.replace('_', '-')} is {value}, it must be at least 0")

    def after(self, ending: Ending, *, has_progressed: bool, place: str) -> Decision:
        """Decide after an ending.

        Args:
            ending: How the child has ended.
            has_progressed: Whether there is a new durable snapshot since the last ending.
            place: The newest durable snapshot, for a person.
        """
        if has_progressed:
            self._in_vain = self._preempted_in_vain = 0
            self._endings.clear()
        if ending.kind == "final":
            return Decision(False, 0.0, str(ending))
        if ending.kind == "preempted":
            return self._after_preemption(ending)
        return self._after_failure(ending, place)

    def _after_preemption(self, ending: Ending) -> Decision:
        self.num_preemptions += 1
        if self.max_preemptions is not None and self.num_preemptions > self.max_preemptions:
            return Decision(
                False, 0.0, f"preempted {self.num_preemptions} times, at most {self.max_preemptions} allowed"
            )
        wait = self._backoff(self._preempted_in_vain) if self._preempted_in_vain else 0.0
        self._preempted_in_vain += 1
        return Decision(True, wait, f"preempted, restart {self.num_preemptions + self.num_failures}")

    def _after_failure(self, ending: Ending, place: str) -> Decision:
        self.num_failures += 1
        self._endings.append(str(ending))
        if self.max_failures is not None and self.num_failures > self.max_failures:
            return Decision(
                False, 0.0, f"{ending}; failed {self.num_failures} times, at most {self.max_failures} allowed"
            )
        if self._in_vain >= self.max_in_vain:
            return Decision(False, 0.0, f"{self._in_vain} restarts came no further than {place}: {self._how()}")
        wait = self._backoff(self._in_vain)
        self._in_vain += 1
        tried = f", {self._in_vain} of at most {self.max_in_vain} without progress" if self._in_vain > 1 else ""
        return Decision(True, wait, f"{ending}, restart {self.num_preemptions + self.num_failures}{tried}")

    def _backoff(self, times: int) -> float:
        return min(self.first_wait_seconds * 2.0 ** min(times, 30), self.longest_wait_seconds)

    def _how(self) -> str:
        kinds = list(dict.fromkeys(self._endings))
        return f"each time {kinds[0]}" if len(kinds) == 1 else "; ".join(kinds)
