"""Where trials come from: a process that has imported torch and nothing else forks one for each.

So a start costs what the user's script costs, without seconds of imports. Trials that are to be compared come
from two nurseries, whose hashes and addresses differ as those of any two processes. Free of torch itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from resumable_trainer.errors import ResumableTrainerError
from resumable_trainer.proof.trace import Trace, read_trace

if TYPE_CHECKING:
    from types import TracebackType

    from resumable_trainer.proof.trial import Trial

_TAIL_LINES = 30


@dataclass(frozen=True)
class Result:
    """How a trial went.

    Attributes:
        code: Exit code; negative: ended by that signal.
        trace: What its run told.
        output: Last lines of what it printed.
    """

    code: int
    trace: Trace
    output: str


class Nursery:
    """A process that forks trials, one at a time; a context manager.

    Args:
        directory: Working directory of the trials.
        timeout_seconds: After which a trial is killed.
        hash_seed: PYTHONHASHSEED of its trials; None: as the surroundings have it.
    """

    def __init__(self, directory: str, *, timeout_seconds: float, hash_seed: str | None = None) -> None:
        self._timeout_seconds = timeout_seconds
        environment = dict(os.environ)
        package = str(Path(__file__).parents[2])  # this package, also where it is not installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), package]))
        if hash_seed is not None:
            environment["PYTHONHASHSEED"] = hash_seed
        self._process = subprocess.Popen(
            [sys.executable, "-m", "resumable_trainer.proof.inside"],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C at a terminal reaches whoever examines, who ends this one
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it, and a trial that is still under way."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.terminate()  # which ends a trial first, with all that it has started
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def carry_out(self, trial: Trial) -> Result:
        """Run one trial to its end.

        Raises:
            ResumableTrainerError: It did not end in time, or the nursery itself has gone.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(trial.to_text().encode() + b"\n")
        pid = self._answer("pid", None)
        try:
            code = self._answer("code", self._timeout_seconds)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise
        path = Path(trial.trace)
        lines = path.with_suffix(".log").read_text(errors="replace").splitlines()
        return Result(code, read_trace(path), "\n".join(lines[-_TAIL_LINES:]))

    def _answer(self, name: str, timeout_seconds: float | None) -> int:
        pipe: Any = self._process.stdout
        ready, _, _ = select.select([pipe], [], [], timeout_seconds)
        if not ready:
            raise ResumableTrainerError(
                f"a start of the script did not end within {timeout_seconds:g} s",
                hint="give it more with --timeout, or shorten it with --batches and --epochs",
            )
        line = pipe.readline()
        if not line:
            raise ResumableTrainerError("the process that starts trials has gone", hint="was it killed? try again")
        return int(json.loads(line)[name])
