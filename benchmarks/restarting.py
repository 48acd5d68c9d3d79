"""From a kill to the first resumed step, in fresh processes; and what it costs to start a finished run again.

Every kind is killed with SIGKILL when its fifth epoch has begun; then the same command is started again and again, each
time killed after its first step. It is let go to the end once: are these the bits of the same training never killed?
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import peers
from benchmarks.machine import starting
from benchmarks.table import Goal, Row, Side
from benchmarks.timing import ArmError, Bench, alternately, with_threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SCRIPT = str(Path(__file__).with_name("script.py"))
_EPOCHS, _KILLED_IN = 8, 5
_PEERS = ("Lightning", "HF Trainer")


@dataclass(frozen=True)
class Launch:
    """One command that is started and watched.

    Attributes:
        kind: See `script`.
        directory: Where it saves.
        log: Where its output goes.
    """

    kind: str
    directory: str
    log: Path

    @property
    def arguments(self) -> list[str]:
        """Behind the interpreter, or behind `resumable-trainer run`."""
        return [SCRIPT, self.kind, self.directory, str(_EPOCHS)]

    def until(self, word: str, *, times: int = 1, kill: bool = True) -> dict[str, float]:
        """Start it, and end it when it has told a word so many times; when each word was told first, from the start.

        Raises:
            ArmError: It ended before it told the word.
        """
        told, tell = os.pipe()
        environment = {**with_threads(1), "BENCH_TELL": str(tell)}
        with self.log.open("wb") as log:
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *self.arguments], env=environment, pass_fds=(tell,), stdout=log, stderr=log
            )
        os.close(tell)
        found: dict[str, float] = {}
        try:
            with os.fdopen(told) as words:
                for line in words:
                    name, when = line.split()
                    found.setdefault(name, float(when) - started)
                    times -= name.startswith(word)
                    if not times:
                        break
        finally:
            if kill:
                process.send_signal(signal.SIGKILL)
            process.wait()
        if times:
            last = self.log.read_text(errors="replace").strip().splitlines()
            raise ArmError(f"{self.kind} ended before it said {word!r}: {last[-1] if last else 'without a word'}")
        return found


def restarts(bench: Bench) -> Iterator[Row]:
    """Against importing torch and setting up, against peers; and a finished run against `python -c pass`."""
    missing = {name: reason for name in _PEERS if (reason := peers.why_not(name))}
    kinds = ["own", *(name for name in _PEERS if name not in missing)]
    launches = {kind: _launch(bench, kind) for kind in ["imports", "bare", *kinds]}
    for kind in kinds:
        launches[kind].until("epoch", times=_KILLED_IN)

    def arm(kind: str) -> Mapping[str, float]:
        found = launches[kind].until("first")
        return {kind: found["first"], f"{kind} ready": found.get("ready", 0.0)}

    arms = [lambda kind=kind: arm(kind) for kind in launches]
    m = alternately(arms, rounds=bench.pick(5, 2), warmup=bench.pick(1, 0))
    exact = {kind: _resumes_exactly(bench, launches[kind]) for kind in kinds} if not bench.quick else {}

    what = "kill to first resumed step: classic job"
    own = Side("own", m["own"], durability="synced and verified", exact=exact.get("own"))
    note = "" if exact else "whether each resumes exactly is tried in the full form only"
    setup, bound = Side("import torch + set-up", m["bare ready"]), Side("importing torch", m["imports"])
    yield Row("restart", what, own, setup, "difference", Goal(0.3), note=note)
    yield Row("restart", what, own, Side("the same + its first step", m["bare"]), "difference")
    for name in _PEERS:
        goal = Goal(2.5, at_least=True)
        if name in missing:
            yield Row("restart", what, comparison="times faster", goal=goal, skipped=missing[name])
            continue
        theirs = Side(name, m[name], durability="page cache", exact=exact.get(name))
        yield Row("restart", what, own, theirs, "times faster", goal, bound=bound)
    yield from _finished(bench)


def _launch(bench: Bench, kind: str) -> Launch:
    directory = bench.directory(f"restart-{kind}")
    return Launch(kind, directory, Path(directory).with_suffix(".log"))


def _resumes_exactly(bench: Bench, killed: Launch) -> bool:
    """Whether a run that was killed ends as one that was not."""
    whole = _launch(bench, killed.kind).until("digest", kill=False)
    resumed = killed.until("digest", kill=False)
    return whole.keys() & resumed.keys() >= {word for word in whole if word.startswith("digest")}


def _finished(bench: Bench) -> Iterator[Row]:
    launch = _launch(bench, "own")
    launch.until("digest", kill=False)
    arms = [
        lambda: {"run": starting(["-m", "resumable_trainer", "run", *launch.arguments])},
        lambda: {"pass": starting(["-c", "pass"])},
    ]
    arms += [] if bench.quick else [lambda: {"plain": starting(launch.arguments)}]
    m = alternately(arms, rounds=bench.pick(7, 3))
    nothing = Side("python -c pass", m["pass"])
    what = "finished run started again with"
    yield Row("restart", f"{what} resumable-trainer run", Side("own", m["run"]), nothing, "difference", Goal(0.3))
    if bench.quick:
        return
    note = "the script imports torch before the package can know that there is nothing to do"
    yield Row("restart", f"{what} python SCRIPT", Side("own", m["plain"]), nothing, "difference", note=note)
