"""Arms measured alternately: calls in this process, or workers in processes of their own, in lockstep.

Round by round each arm has one turn, in the order A B C, C B A, A B C: no arm always follows the same other one. Every
turn begins with a garbage collection, so that none pays for the litter of the one before; within a turn the collector
runs as Python has set it, or as the arm itself sets it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

Measured = dict[str, tuple[float, ...]]
_LAST_WORDS = 400


class ArmError(RuntimeError):
    """An arm cannot be measured; the message says why."""


@dataclass(frozen=True)
class Bench:
    """What all groups are given.

    Attributes:
        scratch: A directory on the disk that is measured.
        quick: Whether fewer rounds and smaller states are wanted.
        say: Shows a line to a person.
    """

    scratch: Path
    quick: bool
    say: Callable[[str], None] = print

    def pick(self, full: int, quick: int) -> int:
        """The number for the form that is wanted."""
        return quick if self.quick else full

    def directory(self, name: str) -> str:
        """A new directory."""
        return tempfile.mkdtemp(prefix=f"{name.replace(' ', '-')}-", dir=self.scratch)

    def in_child(self, target: str, *, threads: int, **settings: Any) -> Any:
        """What a function of this package tells, run in a process of its own.

        Raises:
            ArmError: It ended without having told anything.
        """
        directory = Path(self.directory("child"))
        settings["directory"] = str(directory)
        try:
            with Worker(target, settings=settings, threads=threads, log=directory / "log").start() as worker:
                return worker.hear()
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def timed(act: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    gc.collect()
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def processor_time(act: Callable[[], object]) -> float:
    """Seconds of processor time that a call takes this thread: others on the machine do not count."""
    started = time.thread_time()
    act()
    return time.thread_time() - started


def alternately(arms: Sequence[Callable[[], Mapping[str, float]]], *, rounds: int, warmup: int = 1) -> Measured:
    """What each arm gives, once in each round, in alternating order.

    Args:
        arms: Each gives what it has measured, by name.
        rounds: How many measurements of each.
        warmup: Rounds before, whose measurements are dropped.
    """
    measured: dict[str, list[float]] = {}
    for number in range(warmup + rounds):
        for arm in arms if number % 2 == 0 else reversed(arms):
            found = arm()
            if number >= warmup:
                for name, value in found.items():
                    measured.setdefault(name, []).append(value)
    return {name: tuple(values) for name, values in measured.items()}


def in_lockstep(workers: Mapping[str, Worker], *, rounds: int) -> tuple[Measured, dict[str, str]]:
    """What workers that have been started measure, in alternating order; and why some of them could not."""
    failed: dict[str, str] = {}
    for name, worker in workers.items():
        try:
            worker.hear()
        except ArmError as error:
            failed[name] = str(error)

    def arm(name: str) -> Callable[[], Mapping[str, float]]:
        return lambda: {name: float(workers[name].turn())}

    arms = [arm(name) for name in workers if name not in failed]
    return alternately(arms, rounds=rounds, warmup=0), failed


class Worker:
    """One arm in a process of its own, which works only when it is asked to.

    Args:
        target: What it runs, as `module:function` of this package; called with `Laps` and the settings.
        settings: Keyword arguments, as JSON allows them.
        threads: Threads of torch and of all libraries below it.
        log: Where its output goes.

    Raises:
        ArmError: From `start` or a turn: it could not be made ready, or has ended.
    """

    def __init__(self, target: str, *, settings: Mapping[str, Any], threads: int, log: Path) -> None:
        self._command = [sys.executable, "-m", "benchmarks.worker", target, json.dumps(settings), str(threads)]
        self._threads, self._log = threads, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it; returns at once."""
        into, out = os.pipe()
        told, tell = os.pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._command, str(into), str(tell)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(into, tell),
                env=with_threads(self._threads),
            )
        os.close(into)
        os.close(tell)
        self._asks, self._answers = os.fdopen(out, "w"), os.fdopen(told)
        return self

    def turn(self) -> Any:
        """Let it work for one turn; what it has measured."""
        try:
            self._asks.write("go\n")
            self._asks.flush()
        except BrokenPipeError:
            raise ArmError(self._last_words()) from None
        return self.hear()

    def hear(self) -> Any:
        """What it tells next: that it is ready and has warmed up, or what it has measured."""
        line = self._answers.readline()
        if not line:
            raise ArmError(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return (lines[-1] if lines else "it ended without a word")[:_LAST_WORDS]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()  # it may be inside a peer's loop, which has nothing left to do
            self._process.wait()
            self._asks.close()
            self._answers.close()


@contextlib.contextmanager
def started(workers: Mapping[str, Worker]) -> Iterator[None]:
    """All of them, until the block is left."""
    with contextlib.ExitStack() as stack:
        for worker in workers.values():
            stack.enter_context(worker.start())
        yield


def with_threads(threads: int) -> dict[str, str]:
    """The environment of a child that is to use so many threads, and finds the package and these modules."""
    count = str(threads)
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
    }
