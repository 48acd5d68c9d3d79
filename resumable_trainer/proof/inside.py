"""Inside a nursery and its trials: the user's script, run as it would be, with a probe in it."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.loop import launch
from resumable_trainer.loop.notices import install_excepthook, notices
from resumable_trainer.loop.script import run_script
from resumable_trainer.proof.family import Family, die_with_parent
from resumable_trainer.proof.surroundings import Surroundings
from resumable_trainer.proof.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumable_trainer.loop.probe import Probe


def main() -> int:
    """Fork a trial for each line of the standard input, until it ends; in a trial: its exit code."""
    die_with_parent(signal.SIGTERM)
    family = Family()
    started = time.monotonic()
    import numpy as np
    import torch  # noqa: F401 - every trial has it then

    import_seconds = time.monotonic() - started
    while line := sys.stdin.buffer.readline():
        trial = Trial.from_text(line.decode())
        with family.undisturbed():
            pid = os.fork()
            if pid == 0:
                family.leave()
                die_with_parent(signal.SIGKILL)
            else:
                family.head = pid
        if pid == 0:
            _become(trial)
            # As in any process that was started by itself.
            random.seed()
            np.random.seed(None)
            return carry_out(trial, import_seconds=import_seconds)
        _say(pid=pid)
        _say(code=family.bury())
    return 0


def _say(**answer: int) -> None:
    os.write(1, (json.dumps(answer) + "\n").encode())


def _become(trial: Trial) -> None:
    """Standard streams of its own: the nursery's are its line to whoever waits for the answer."""
    log = os.open(Path(trial.trace).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(fd, standard)
    os.close(log)
    os.close(nothing)
    if "kernels" in trial.steady:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def carry_out(trial: Trial, *, import_seconds: float) -> int:
    """Run the script; its exit code."""
    trace = os.open(trial.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def tell(row: str, **fields: object) -> None:
        # One write for each row: a kill, and workers that tell too, leave whole lines.
        os.write(trace, (json.dumps({"row": row, **fields}) + "\n").encode())

    notices.install()
    surroundings = Surroundings(
        trial.steady, trial.perturb, lambda function, where: tell("call", function=function, where=where)
    )
    surroundings.started -= import_seconds
    surroundings.install()
    command = launch.Command.from_json(trial.command)
    handover = launch.process.handover
    handover.command = command
    handover.probe = functools.cache(lambda: _probe(trial, tell, surroundings))
    install_excepthook(launch.process.note_failure)
    return run_script(command)


def _probe(trial: Trial, tell: Callable[..., None], surroundings: Surroundings) -> Probe:
    if trial.replay_to is not None:
        from resumable_trainer.proof.replayer import Replayer

        return Replayer(trial, tell)
    from resumable_trainer.proof.examiner import Examiner

    return Examiner(trial, tell, surroundings)


if __name__ == "__main__":
    sys.exit(main())
