"""Examine a job: run it undisturbed, then killed and resumed in nasty places, and say whether both are the same.

What the script writes elsewhere than in its run directory, it writes. Free of torch.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.durable.journal import read_rows
from resumable_trainer.errors import ExitCode, ResumableTrainerError, UsageError
from resumable_trainer.proof.diagnosis import (
    Cause,
    Evidence,
    causes,
    lost_variables,
    lost_without_effect,
    missing_name,
    suspects,
    unset,
    without_effect,
)
from resumable_trainer.proof.plan import kills
from resumable_trainer.proof.surroundings import SOURCES
from resumable_trainer.proof.trace import Trace, cut_short, first_difference, longest_gap_seconds, pairs_part_at
from resumable_trainer.proof.trials import Settings, Trials
from resumable_trainer.snapshot.layout import EVENTS, METRICS

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumable_trainer.loop.launch import Command
    from resumable_trainer.proof.nursery import Result
    from resumable_trainer.proof.trace import Divergence
    from resumable_trainer.proof.trial import Kill


@dataclass(frozen=True)
class Costs:
    """What the undisturbed run has shown of time and space.

    Attributes:
        snapshot_bytes: Size of the largest snapshot.
        durable_seconds: Longest time from the capture of a snapshot until it was durable.
        stall_seconds: Time that the training waits for the copy in memory.
        gap_seconds: Longest time between two places at which a notice is followed.
        start_seconds: From the process's start until the run was open.
    """

    snapshot_bytes: int
    durable_seconds: float
    stall_seconds: float
    gap_seconds: float
    start_seconds: float


@dataclass
class Examination:
    """What was found.

    Attributes:
        directory: The run directory that the script names; nothing in it was touched.
        undisturbed: The run that was never stopped.
        survived: Kills after which the run went on as if nothing had happened.
        divergence: Where it did not; None if it always did.
        failed: What the start told after which it did not.
        after: The kill before it.
        causes: Why, the surest first.
        fresh_starts_differ: Whether two fresh starts are not the same, which is no matter of a resume.
        failure: The variable that a start after a kill did not find, so that it ended there.
        lost: What no resume brings back, by name, without any effect that could be seen or foreseen.
        columns: Columns of the metric journal that differ.
        costs: Of a snapshot, and of a start.
        scratch: Where everything was done.
    """

    directory: Path
    undisturbed: Trace
    costs: Costs
    scratch: Path
    survived: list[Kill] = field(default_factory=list)
    divergence: Divergence | None = None
    failed: Trace = field(default_factory=Trace)
    after: Kill | None = None
    causes: list[Cause] = field(default_factory=list)
    fresh_starts_differ: bool = False
    failure: str | None = None
    lost: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        """Whether every resume was exact, to the bit."""
        return self.divergence is None and not self.columns and not self.causes


class Doctor:
    """Examines one job.

    Args:
        trials: Carries out its starts.
        say: Shows lines of progress.
    """

    def __init__(self, trials: Trials, say: Callable[[str], None]) -> None:
        self._trials, self._say = trials, say
        self._resumed: list[Trace] = []

    def examine(self) -> Examination:
        """Do all of it; takes some starts of the script.

        Raises:
            UsageError: The script opens no run, or trains nothing.
            ResumableTrainerError: It fails by itself, or a start did not end in time.
        """
        result = self._trials.undisturbed()
        if result.code != 0:
            raise ResumableTrainerError(
                f"the script fails by itself (exit code {result.code}), without any kill:\n{result.output}\n",
                found=result.code,
                expected=0,
                hint="mend that first",
            )
        named, trace = self._trials.named, result.trace
        if not trace.moments:
            raise UsageError(f"run {named} trains nothing", path=named, hint="it has no epoch to go")
        found = Examination(named, trace, _costs(trace, self._trials.place("undisturbed")), self._trials.place())
        self._kill_and_compare(found)
        return found

    # -- kills --------------------------------------------------------------------------------------

    def _kill_and_compare(self, found: Examination) -> None:
        plan = kills(found.undisturbed)
        self._chain(found, plan, "killed", owed=0)
        run = "killed"
        if (
            found.divergence is not None
            and not found.survived
            and found.after is None
            and "frozen" in found.undisturbed.facts
        ):
            # Before anything was killed: so begin from one and the same snapshot.
            self._say("two fresh starts are not the same; both from one snapshot, then")
            found.fresh_starts_differ, found.divergence = True, None
            frozen = int(found.undisturbed.facts["frozen"])
            ahead = {moment.key for moment in found.undisturbed.moments[frozen:]}
            run = self._trials.thaw("killed-again")
            later = [kill for kill in plan if kill.key in ahead]
            self._chain(found, later, run, owed=frozen)
        if found.failure is not None:
            return
        if found.divergence is None:
            found.columns = self._columns(run)
            self._look_for_what_is_lost(found)
        else:
            found.causes = self._causes(found)

    def _chain(self, found: Examination, plan: list[Kill], run: str, *, owed: int) -> None:
        """Start, be killed, start again, until the run's end or the first difference.

        Args:
            found: Takes what is found.
            plan: Kills, in order.
            run: Name of the run directory.
            owed: Number of the undisturbed moment from which on the chain must meet all.
        """
        chain = Trace()
        for before, kill in zip([None, *plan], [*plan, None], strict=True):
            result = self._trials.start(run, number=len(chain.opened), kill=kill)
            if before is not None and (missing := missing_name(result.output)) is not None and result.code > 0:
                found.after, found.failure = before, missing
                found.causes = [unset(missing)]
                return
            _check_end(result, kill)
            chain = chain.followed_by(result.trace)
            found.failed = result.trace
            if before is not None:
                self._resumed.append(result.trace)
            found.divergence = first_difference(result.trace, found.undisturbed)
            if found.divergence is None and result.code == 0:
                found.divergence = cut_short(chain, found.undisturbed.moments[owed:])
            if found.divergence is not None:
                found.after = before
                return
            if before is not None:
                found.survived.append(before)
                self._say(f"  {before.words}, and started again: the same")
            if result.code == 0:
                return

    def _look_for_what_is_lost(self, found: Examination) -> None:
        """All came out the same; whatever is not brought back may still make a difference later."""
        trace = found.undisturbed
        if "frozen" not in trace.facts or not any(lost_variables(start, trace) for start in self._resumed):
            return
        lost = lost_without_effect(self._resumed, trace, self._trials.pair("lost", steady=()))
        sources = [Path(file).read_text(errors="replace") for file in trace.facts.get("files", ())]
        found.causes, found.lost = without_effect(lost, sources)

    def _columns(self, run: str) -> list[str]:
        """Columns of the metric journals that differ although the state never did."""
        one, other = (self._trials.place(name) / METRICS for name in ("undisturbed", run))
        if one.read_bytes() == other.read_bytes():
            return []
        rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (one, other)]
        differing: dict[str, None] = {}
        for a, b in zip(*rows, strict=False):
            differing.update(dict.fromkeys(name for name in {**a, **b} if a.get(name) != b.get(name)))
        return list(differing) or ["number of rows"]

    # -- causes -------------------------------------------------------------------------------------

    def _causes(self, found: Examination) -> list[Cause]:
        self._say("not the same; looking for the cause")
        assert found.divergence is not None
        if "frozen" not in found.undisturbed.facts:
            return [_NO_SNAPSHOT]
        resumes = self._trials.pair("resume", steady=())
        # What a resume does first is compared with the run itself: that is where something was lost.
        first = first_difference(resumes[0], found.undisturbed)
        evidence = Evidence(found.undisturbed, first or found.divergence, found.failed, resumes)
        if pairs_part_at(*resumes) is None:
            return causes(evidence, repeats_itself=True)
        agree: dict[str, bool] = {}
        for source in (*suspects(evidence), "all"):
            # Twice: what races agrees by chance now and then.
            agree[source] = self._agree_without(source, "once") and self._agree_without(source, "again")
            if agree[source]:
                break
        return causes(replace(evidence, agree_without=agree), repeats_itself=False)

    def _agree_without(self, source: str, name: str) -> bool:
        steady = SOURCES if source == "all" else (source,)
        return pairs_part_at(*self._trials.pair(f"without-{source}-{name}", steady=steady)) is None


def examine(command: Command, settings: Settings, say: Callable[[str], None]) -> Examination:
    """Examine the job that a command starts; see `Doctor.examine`."""
    with Trials(command, settings) as trials:
        return Doctor(trials, say).examine()


def _costs(trace: Trace, run: Path) -> Costs:
    rows = [row for row in read_rows(run / EVENTS) if row.get("event") == "committed"]
    return Costs(
        snapshot_bytes=max((int(row["bytes"]) for row in rows), default=0),
        durable_seconds=max((float(row["seconds"]) for row in rows), default=0.0),
        stall_seconds=float(trace.facts.get("stall_seconds", 0.0)),
        gap_seconds=longest_gap_seconds(trace),
        start_seconds=float(trace.opened[0]["seconds"]),
    )


_NO_SNAPSHOT = Cause(
    "unknown",
    "the run took no snapshot before it ended, so that nothing could be resumed",
    "log, loop and evaluate within run.epochs(...) and run.batches(...)",
)


def _check_end(result: Result, kill: Kill | None) -> None:
    """A trial ends as it was told to, or at its run's end."""
    expected = {0}
    if kill is not None:
        expected.add(-int(signal.SIGKILL) if kill.signal == "SIGKILL" else int(ExitCode.PREEMPTED))
    if result.code not in expected:
        raise ResumableTrainerError(
            f"the script, started again, fails (exit code {result.code}):\n{result.output}\n",
            found=result.code,
            expected=sorted(expected),
            hint="a job that cannot be started again cannot be resumed; mend that first",
        )
