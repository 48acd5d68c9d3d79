"""`stop`: ask the process that holds a run to save and leave, and wait until it has."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from typing import TYPE_CHECKING

from resumable_trainer.cli.output import run_directory
from resumable_trainer.durable.lock import is_alive, read_owner
from resumable_trainer.errors import ExitCode, RunHeldError, UsageError
from resumable_trainer.report.summary import summarize
from resumable_trainer.snapshot.layout import RUN_LOCK

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from resumable_trainer.durable.lock import Owner

_POLL_SECONDS = 0.05


def run(args: argparse.Namespace) -> int:
    """Stop the holder; 0 once nobody holds the run."""
    directory = run_directory(args)
    owner = read_owner(directory / RUN_LOCK)
    alive = owner is not None and is_alive(owner)
    if owner is not None and alive is None:
        raise UsageError(
            f"run {directory} is held by {owner}, which is not this host ({socket.gethostname()})",
            hint=f"call stop on {owner.host}",
        )
    if owner is not None and alive:
        os.kill(owner.pid, signal.SIGTERM)
        _wait(directory, owner, args.timeout)
    summary = summarize(directory)
    if args.json:
        print(json.dumps({**summary.to_json(), "stopped_pid": owner.pid if owner and alive else None}, indent=2))
    else:
        where = summary.newest.name if summary.newest else "nothing saved yet"
        words = f"pid {owner.pid} has left" if owner and alive else "nobody runs it"
        print(f"{directory}: {words} | {summary.state.replace('_', ' ')} | {where}")
    return int(ExitCode.DONE)


def _wait(directory: Path, owner: Owner, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while is_alive(owner):
        now = read_owner(directory / RUN_LOCK)
        if now is not None and (now.generation != owner.generation or now.released):
            return
        if time.monotonic() > deadline:
            raise RunHeldError(
                f"run {directory} is still held by {owner} after {timeout_seconds:g} s",
                path=directory,
                hint="it saves at the end of its batch; wait longer, or send SIGTERM again to end it without saving",
            )
        time.sleep(_POLL_SECONDS)
