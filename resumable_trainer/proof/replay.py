"""Proof after the fact: a copy of a run trains from one of its snapshots to the next, and both must be the same.

The run itself is not touched, and may be training. Free of torch.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.durable.files import TEMPORARY_PREFIX, Files, remove_tree
from resumable_trainer.errors import (
    DamagedSnapshotError,
    ExitCode,
    NotFoundError,
    ResumableTrainerError,
    SnapshotGoneError,
)
from resumable_trainer.proof.nursery import Nursery
from resumable_trainer.proof.trial import Kill, Trial
from resumable_trainer.proof.trials import sweep
from resumable_trainer.snapshot.forking import fork
from resumable_trainer.snapshot.selected import Selected, select
from resumable_trainer.snapshot.store import Store
from resumable_trainer.snapshot.values import read_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resumable_trainer.loop.launch import Start
_PREFIX = f"{TEMPORARY_PREFIX}replay-"


@dataclass(frozen=True)
class Replay:
    """A stretch of a run, trained once more.

    Attributes:
        begin: The snapshot from which the copy went on.
        recorded: The next one, as the run has it.
        made: The same, as the copy made it.
    """

    begin: Selected
    recorded: Selected
    made: Selected


def stretch(run: Path, which: str | None) -> tuple[Selected, Selected]:
    """Two snapshots of a run, the second made on the way on from the first.

    Args:
        run: The run directory.
        which: The first of them; None: so that the second is the newest possible.

    Raises:
        NotFoundError: There are no such two.
    """
    store = Store(run)
    if which is not None:
        begin = select(run, which)
        follower = _follower(store, begin.manifest.name)
        if follower is not None:
            return begin, select(run, follower)
        raise NotFoundError(
            f"{begin.manifest.name} is the last of {run}: there is nothing to compare a replay with",
            path=run,
            hint="name an earlier one with --from, or let the run train on",
        )
    for name in reversed(store.names()):
        with contextlib.suppress(DamagedSnapshotError, SnapshotGoneError):
            follower = _follower(store, name)
            if follower is not None:
                return select(run, name), select(run, follower)
    raise NotFoundError(
        f"{run} has no two snapshots that follow each other",
        path=run,
        hint="let it train on, or keep more of them: SnapshotPolicy(keep_last=...)",
    )


def _follower(store: Store, name: str) -> str | None:
    """The nearest snapshot that comes after `name` and verifies; what retention has taken from between is no matter."""
    names = store.names()
    for later in names[names.index(name) + 1 :]:
        with contextlib.suppress(DamagedSnapshotError, SnapshotGoneError):
            return store.verify(later).name
    return None


def _notice(recorded: Selected) -> Kill | None:
    """Where the copy is to be told to leave, if the recorded snapshot was made by a notice in an evaluation.

    Such a one stands behind the last batch's loop, one made after a step still within it, under the same name.
    """
    manifest = recorded.manifest
    loop = read_values(recorded.path, manifest).get("loop", {})
    loops = loop.get("cursor", {}).get("loops", [])
    if manifest.epoch_complete or not loops or not loops[-1][1]:
        return None
    at = manifest.position
    return Kill("evaluating", at.epoch, at.batch, 0, "SIGTERM", "told to leave in the evaluation")


@contextlib.contextmanager
def replayed(begin: Selected, recorded: Selected, start: Start, *, timeout_seconds: float) -> Iterator[Replay]:
    """Train from one snapshot to the next in a scratch directory, which is removed on leaving.

    Args:
        begin: Where to go on from.
        recorded: What it should come to.
        start: How the run was started.
        timeout_seconds: After which it is given up.

    Raises:
        ResumableTrainerError: The script fails, or never comes to that snapshot, or not in time.
        SnapshotWriteError: There is no room for the copy.
    """
    sweep(begin.run.resolve().parent, _PREFIX)
    name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    scratch = begin.run.resolve().parent / name
    with tempfile.TemporaryDirectory(prefix="resumable-trainer-replay-") as notes:
        try:
            copy = scratch / "run"
            fork(begin, copy)
            trial = Trial(
                command=start.command.to_json(),
                trace=str(Path(notes) / "trace.jsonl"),
                scratch=str(scratch),
                run=str(start.directory),
                replay_to=recorded.manifest.name,
                kill=_notice(recorded),
            )
            with Nursery(start.command.cwd, timeout_seconds=timeout_seconds) as nursery:
                result = nursery.carry_out(trial)
            how = "made" if result.code == ExitCode.PREEMPTED else result.trace.facts.get("replay")
            if how != "made":
                reason = "it went past it" if how == "passed" else f"exit code {result.code}\n{result.output}"
                raise ResumableTrainerError(
                    f"the replay never came to {recorded.manifest.name}: {reason}",
                    path=begin.run,
                    found=how,
                    expected=recorded.manifest.name,
                    hint="has the script, or its data, changed since? diff and the drift lines of a resume tell",
                )
            yield Replay(begin, recorded, select(copy, recorded.manifest.name))
        finally:
            with contextlib.suppress(OSError):
                if scratch.exists():
                    remove_tree(Files(), scratch)
