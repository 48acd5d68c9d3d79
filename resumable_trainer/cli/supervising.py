"""`run --restart` and `resume --restart`: the same command without the option, under a supervisor."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumable_trainer.loop import launch
from resumable_trainer.service.budget import Budget
from resumable_trainer.service.supervisor import Supervisor, Watched
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

_MAX_ERROR = 200


@dataclass(frozen=True)
class Runs:
    """The runs that a command trains, looked for anew each time: the first launch makes them.

    Attributes:
        directories: Gives their directories.
    """

    directories: Callable[[], Sequence[Path]]

    def newest(self) -> str | None:
        """Their newest snapshots by name; None before the first."""
        names = [names[-1] for directory in self.directories() if (names := Store(directory).names())]
        return ", ".join(names) or None

    def error(self) -> str:
        """What the newest launch said of its failure."""
        for directory in self.directories():
            last = launch.last_events(directory, ("launched", "failed"))
            if "failed" in last and last["failed"]["generation"] == last.get("launched", {}).get("generation"):
                lines = str(last["failed"].get("error", "")).splitlines()
                return lines[0][:_MAX_ERROR] if lines else ""
        return ""

    def note_ended(self, fields: Mapping[str, Any]) -> None:
        """Note how a child ended."""
        for directory in self.directories():
            launch.note_ended(directory, **fields)


def supervise(arguments: Callable[[bool], list[str]], runs: Runs, args: argparse.Namespace) -> int:
    """Run the command line under a supervisor; its exit code.

    Args:
        arguments: Gives the child's arguments; told whether an earlier child has begun the line.
        runs: What it trains.
        args: The command line.
    """

    def command(has_begun: bool) -> list[str]:
        return [sys.executable, "-m", "resumable_trainer", *arguments(has_begun)]

    supervisor = Supervisor(
        command,
        watched=Watched(runs.newest, runs.error, runs.note_ended),
        budget=Budget(args.max_failures, args.max_preemptions, args.max_in_vain),
        hang_seconds=args.hang_timeout,
        say=_say,
    )
    return supervisor.run()


def _say(line: str) -> None:
    print(f"resumable-trainer: {line}", file=sys.stderr, flush=True)


def starting_options(args: argparse.Namespace, *, has_begun: bool) -> list[str]:
    """The options of a start as they are handed to the child; what begins a line is left out once it has begun."""
    options = [f"--{name}" for name in ("strict", "json") if getattr(args, name)]
    if not has_begun:
        options += [f"--{name}" for name in ("fresh", "relaunch") if getattr(args, name, False)]
        options += ["--from", args.which]
    return [*options, "--if-running", args.if_running]
