"""`--restart` and `--on-event`: what `run` and `resume` share of staying alive."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from resumable_trainer.errors import UsageError
from resumable_trainer.loop import launch
from resumable_trainer.loop.heartbeat import show_stacks_on_abort
from resumable_trainer.loop.journal_lines import WARNING, marked

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from pathlib import Path


def prepare(args: argparse.Namespace) -> None:
    """Before the training begins in this process: hooks, and stacks on a SIGABRT if somebody watches."""
    if args.on_event is not None:
        from resumable_trainer.service.hooks import Hooks

        launch.process.handover.on_event = Hooks(args.on_event).noted
    if os.environ.get("NOTIFY_SOCKET") and os.environ.get("WATCHDOG_USEC"):
        show_stacks_on_abort()


def supervise(args: argparse.Namespace, arguments: Sequence[str], directories: Callable[[], list[Path]]) -> int:
    """Start `resumable-trainer *arguments*` again and again; the exit code.

    Args:
        args: The command line.
        arguments: Of the child: where it begins (`--from`, `--fresh`) is added to the first start's.
        directories: Gives the run directories known to belong to it.
    """
    from resumable_trainer.service.budget import Limits
    from resumable_trainer.service.hooks import Hooks
    from resumable_trainer.service.supervisor import Supervisor, Training

    limits = Limits(args.max_failures, args.max_preemptions, args.max_stuck, args.backoff, max(300.0, args.backoff))
    if args.hang_timeout is not None and not args.hang_timeout > 0:
        raise UsageError(f"--hang-timeout is {args.hang_timeout:g}, it must be more than 0")
    command, *rest = arguments
    python = [sys.executable, "-m", "resumable_trainer", command]
    training = Training([*python, *where(args), *rest], [*python, *rest], directories)
    hooks = None if args.on_event is None else Hooks(args.on_event)
    return Supervisor(training, limits=limits, hang_timeout=args.hang_timeout, hooks=hooks, say=_say).run()


def where(args: argparse.Namespace) -> list[str]:
    """Options that say where to begin."""
    fresh = ["--fresh"] if getattr(args, "fresh", False) else []
    return [*fresh, *(["--from", args.which] if args.which != "latest" else [])]


def options(args: argparse.Namespace) -> list[str]:
    """The other options of starting, for a process that starts the same."""
    flags = [f"--{name}" for name in ("strict", "relaunch", "json", "quiet") if getattr(args, name)]
    hook = [] if args.on_event is None else [f"--on-event={args.on_event}"]
    return [*flags, *hook, "--if-running", args.if_running]


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever read it has gone: the training is watched all the same
        print(marked(f"resumable-trainer: {line}", WARNING), file=sys.stderr, flush=True)
