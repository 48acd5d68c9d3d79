"""The trials of one examination: two nurseries, and a scratch directory beside the job's run directory.

The scratch directory lies where the script's own run would lie, so that what a snapshot costs is measured on that
disk; it is removed afterwards. Free of torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from resumable_trainer.durable.files import TEMPORARY_PREFIX, Files, remove_tree
from resumable_trainer.errors import UsageError
from resumable_trainer.proof.nursery import Nursery
from resumable_trainer.proof.trace import read_trace
from resumable_trainer.proof.trial import Trial

if TYPE_CHECKING:
    from types import TracebackType

    from resumable_trainer.loop.launch import Command
    from resumable_trainer.proof.nursery import Result
    from resumable_trainer.proof.trace import Trace

_PREFIX = f"{TEMPORARY_PREFIX}doctor-"
_NOTES_PREFIX = "resumable-trainer-doctor-"
_FROZEN = "frozen"


@dataclass(frozen=True)
class Settings:
    """How a job is examined.

    Attributes:
        num_epochs: Epochs to train at most.
        num_batches: Batches of each loop at most.
        timeout_seconds: For each start.
        keep: Leave the scratch directory where it is.
    """

    num_epochs: int = 3
    num_batches: int = 6
    timeout_seconds: float = 1800.0
    keep: bool = False


class Trials:
    """Carries out trials of one command; a context manager.

    Args:
        command: Starts the job.
        settings: How.
    """

    def __init__(self, command: Command, settings: Settings) -> None:
        self._command, self._settings = command, settings
        self._scratch = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        self._stack = contextlib.ExitStack()
        self._notes = Path()
        self._number = 0
        self._named: Path | None = None
        self._new: list[Path] = []  # directories above it that the script has made

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            sweep(Path(tempfile.gettempdir()), _NOTES_PREFIX)
            self._notes = Path(tempfile.mkdtemp(prefix=f"{_NOTES_PREFIX}{os.getpid()}-"))
            stack.callback(_remove, self._notes)
            stack.callback(self._remove_scratch)
            self._nurseries = self._open(stack, None)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _open(self, stack: contextlib.ExitStack, hash_seed: str | None) -> list[Nursery]:
        timeout = self._settings.timeout_seconds
        made = [Nursery(self._command.cwd, timeout_seconds=timeout, hash_seed=hash_seed) for _ in range(2)]
        for nursery in made:
            stack.enter_context(nursery)
        return made

    # -- where --------------------------------------------------------------------------------------

    @property
    def named(self) -> Path:
        """The run directory that the script names.

        Raises:
            UsageError: It has named none.
        """
        if self._named is None:
            raise UsageError(
                f"{self._command} opens no run: there is nothing to examine",
                hint="doctor looks at what happens within Run(...) or Trainer(...).fit",
            )
        return self._named

    def place(self, run: str = "") -> Path:
        """The scratch directory, or a run directory therein."""
        return self.named.parent / self._scratch / run

    def thaw(self, run: str) -> str:
        """A run directory that continues from the first snapshot of the undisturbed run."""
        shutil.copytree(self.place(_FROZEN), self.place(run))
        return run

    def _remove_scratch(self) -> None:
        if self._named is None or self._settings.keep:
            return
        _remove(self.place())
        for parent in self._new:
            with contextlib.suppress(OSError):  # somebody else has put something there
                parent.rmdir()

    # -- trials -------------------------------------------------------------------------------------

    def undisturbed(self) -> Result:
        """A fresh start, left alone to its end."""
        try:
            result = self._carry_out("undisturbed", self._nurseries[0], freeze=_FROZEN)
        finally:
            self._note_named()
        if self._named is not None:
            sweep(self._named.parent, _PREFIX)
        return result

    def _note_named(self) -> None:
        """Where the script's run lies, and so the scratch directory, also if the trial never came to its end."""
        for path in sorted(self._notes.glob("*.jsonl")):
            facts = read_trace(path).facts
            if "new" in facts:
                self._named, self._new = Path(facts["named"]), [Path(parent) for parent in facts["new"]]
                return

    def start(self, run: str, *, number: int, **changes: Any) -> Result:
        """A start in surroundings as they might be `number` starts later."""
        return self._carry_out(run, self._nurseries[(number + 1) % 2], perturb=number, **changes)

    def pair(self, name: str, *, steady: tuple[str, ...]) -> tuple[Trace, Trace]:
        """Two resumes from the first snapshot: in surroundings as they are, and in perturbed ones."""
        runs = [self.thaw(f"{name}-{number}") for number in (0, 1)]
        with contextlib.ExitStack() as stack:
            nurseries = self._open(stack, "0") if "hash" in steady else self._nurseries
            pool = stack.enter_context(ThreadPoolExecutor(2))
            waiting = [
                pool.submit(self._carry_out, run, nursery, steady=steady, perturb=number)
                for number, (run, nursery) in enumerate(zip(runs, nurseries, strict=True))
            ]
            one, other = (future.result() for future in waiting)
        return one.trace, other.trace

    def _carry_out(self, run: str, nursery: Nursery, **changes: Any) -> Result:
        self._number += 1
        trial = Trial(
            command=self._command.to_json(),
            trace=str(self._notes / f"{self._number:03d}-{run}.jsonl"),
            scratch=self._scratch,
            run=run,
            num_epochs=self._settings.num_epochs,
            num_batches=self._settings.num_batches,
        )
        return nursery.carry_out(replace(trial, **changes))


def sweep(parent: Path, prefix: str) -> None:
    """Remove what examinations that were killed have left: directories named after a process that is gone."""
    for entry in parent.iterdir() if parent.is_dir() else ():
        match = re.fullmatch(re.escape(prefix) + r"(\d+)-\w+", entry.name)
        if match is not None and not Path(f"/proc/{match[1]}").exists():
            _remove(entry)


def _remove(directory: Path) -> None:
    with contextlib.suppress(OSError):  # what stays is swept by the next examination
        if directory.is_dir() and not directory.is_symlink():
            remove_tree(Files(), directory)
