"""A notice to save and go on is followed within an evaluation, with the state as it was before that began."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import endings
import pytest
import torch
from small import Killed, Small

from resumable_trainer import Preempted, Run, SnapshotPolicy
from resumable_trainer.loop import held
from resumable_trainer.loop.notices import notices
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ALL = SnapshotPolicy(keep_last=99)
HERE = Path(__file__).parent


@pytest.fixture(params=[held.COPY_UP_TO_BYTES, 0], ids=["copied", "digested"])
def held_as(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held.HeldState.__init__, "__kwdefaults__", {"copy_up_to_bytes": request.param})


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    Small().train(tmp_path / "whole", snapshots=ALL)
    return endings.ending(tmp_path / "whole")


def kill() -> None:
    raise Killed


def ask_to_save() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def names(directory: Path) -> list[str]:
    return Store(directory).names()


def at(numbers: Sequence[int], what: Callable[[], object]) -> Callable[[Run], None]:
    """Something to do at some of the batches of evaluation, counted over all epochs from 0."""
    seen: list[int] = []

    def hook(run: Run) -> None:
        seen.append(len(seen))
        if seen[-1] in numbers:
            what()

    return hook


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("number", [0, 1, 3, 4, 7])
@pytest.mark.usefixtures("held_as")
def test_the_state_of_before_is_saved_and_the_run_goes_on(
    tmp_path: Path, whole: dict[str, bytes], number: int, background: bool
) -> None:
    policy = SnapshotPolicy(keep_last=99, background=background)
    Small(at_evaluation=at([number], ask_to_save)).train(tmp_path / "run", snapshots=policy)
    step, epoch = 4 * (number // 3 + 1), number // 3 + 1
    expected = [f"step-{4 * n:09d}-epoch-{n:06d}" for n in (1, 2, 3)]
    expected.insert(epoch - 1, f"step-{step:09d}")
    assert names(tmp_path / "run") == expected
    for name in expected:
        Store(tmp_path / "run").verify(name)
    assert endings.differing(whole, endings.ending(tmp_path / "run")) == []
    assert not notices.save
    assert not notices.pending


@pytest.mark.parametrize("number", [0, 1, 3, 7])
@pytest.mark.usefixtures("held_as")
def test_who_is_killed_later_in_the_same_evaluation_goes_on_from_there(
    tmp_path: Path, whole: dict[str, bytes], number: int
) -> None:
    """The evaluation is made again, and draws what it drew."""

    once, again = at([number], ask_to_save), at([number + 1], kill)
    small = Small(at_evaluation=lambda run: (once(run), again(run))[0])
    with pytest.raises(Killed):
        small.train(tmp_path / "run", snapshots=ALL)
    step = 4 * (number // 3 + 1)
    assert names(tmp_path / "run")[-1] == f"step-{step:09d}"
    run = (other := Small()).train(tmp_path / "run", snapshots=ALL)
    assert run.resumed_from == f"step-{step:09d}"
    assert len(other.seen) == 12 - step, "nothing is trained again"
    assert endings.differing(whole, endings.ending(tmp_path / "run")) == []


@pytest.mark.parametrize("others", [[3, 4], [4]])
@pytest.mark.usefixtures("held_as")
def test_a_sigterm_after_it_leaves_with_the_very_same_state(
    tmp_path: Path, whole: dict[str, bytes], others: list[int]
) -> None:
    asks = at(others, ask_to_save)
    leaves = at([4], lambda: os.kill(os.getpid(), signal.SIGTERM))  # with a request to save beside it
    with pytest.raises(Preempted):
        Small(at_evaluation=lambda run: (asks(run), leaves(run))[0]).train(tmp_path / "run", snapshots=ALL)
    assert names(tmp_path / "run") == ["step-000000004-epoch-000001", "step-000000008"]
    notices.reset()
    Small().train(tmp_path / "run", snapshots=ALL)
    assert endings.differing(whole, endings.ending(tmp_path / "run")) == []


def draw_and_change(small: Small) -> None:
    """An evaluation by somebody who forgot `model.eval()`: dropout draws, BatchNorm learns."""
    small.model.train()
    with torch.no_grad():
        small.model(small.data[0])


@pytest.mark.parametrize("staging", ["copy", "overlapped"])
def test_an_evaluation_that_draws_and_changes_the_state_is_repeated_exactly(tmp_path: Path, staging: str) -> None:
    def train(directory: Path, *, asks_at: Sequence[int] = (), killed_at: Sequence[int] = ()) -> None:
        small = Small()
        ask, end = at(asks_at, ask_to_save), at(killed_at, kill)

        def evaluated(run: Run) -> None:
            draw_and_change(small)
            ask(run)
            end(run)

        small.at_evaluation = evaluated
        small.train(directory, snapshots=SnapshotPolicy(keep_last=99, staging=staging))  # type: ignore[arg-type]

    train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "run", asks_at=[3, 4], killed_at=[5])
    assert names(tmp_path / "run")[-1] == "step-000000008"
    train(tmp_path / "run", asks_at=[1])
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


def test_a_large_state_that_evaluation_has_changed_is_saved_at_the_epochs_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing wrong is saved, and it is not looked again and again whether it can be had."""
    monkeypatch.setattr(held.HeldState.__init__, "__kwdefaults__", {"copy_up_to_bytes": 0})
    looked: list[int] = []
    look = held.HeldState.again
    monkeypatch.setattr(held.HeldState, "again", lambda *args: (looked.append(1), look(*args))[1])

    def train(directory: Path, *, asks_at: Sequence[int] = ()) -> None:
        small = Small()
        ask = at(asks_at, ask_to_save)

        def evaluated(run: Run) -> None:
            draw_and_change(small)
            ask(run)

        small.at_evaluation = evaluated
        small.train(directory, snapshots=SnapshotPolicy(every_epochs=9))

    train(tmp_path / "whole")
    train(tmp_path / "run", asks_at=[3])
    assert len(looked) == 1
    assert names(tmp_path / "run") == ["step-000000008-epoch-000002", "step-000000012-epoch-000003"]
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


def test_where_nothing_is_held_the_next_boundary_saves(tmp_path: Path) -> None:
    """In an evaluation at the top of an epoch, and in one within a training batch."""

    def train(directory: Path, *, asks_at: Sequence[int] = ()) -> None:
        small, ask = Small(), at(asks_at, ask_to_save)
        with Run(directory, state=small.state, progress=False, snapshots=SnapshotPolicy(every_epochs=9)) as run:
            for _ in run.epochs(2):
                for _ in run.evaluating(small.data, batch_size=4):
                    ask(run)
                for _ in run.batches(small.data, batch_size=6):
                    for _ in run.evaluating(small.data, batch_size=4):
                        ask(run)
                    run.log(drawn=torch.rand(1))

    train(tmp_path / "whole")
    for number, step in {0: 1, 3: 1, 6: 2, 9: 3, 12: 3, 15: 4}.items():
        train(tmp_path / f"run-{number}", asks_at=[number])
        assert names(tmp_path / f"run-{number}")[0] == f"step-{step:09d}", number
        assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / f"run-{number}")) == []


@pytest.mark.parametrize("asks_at", [[0], [2], [5], [1, 5], [7, 8]])
def test_evaluations_within_and_after_each_other_and_between_loops_over_batches(
    tmp_path: Path, asks_at: list[int]
) -> None:
    """The same position may be saved before the first evaluation alone: what comes after it is repeated."""

    def train(directory: Path, *, asks_at: Sequence[int] = (), killed_at: Sequence[int] = ()) -> None:
        small = Small()
        ask, end = at(asks_at, ask_to_save), at(killed_at, kill)

        def evaluate(run: Run) -> None:
            for _ in run.evaluating(small.data, batch_size=6):
                torch.rand(2)
                for _ in run.evaluating(small.data, batch_size=12):
                    ask(run)
                    end(run)
                ask(run)
                end(run)

        with Run(directory, state=small.state, progress=False, snapshots=ALL) as run:
            for _ in run.epochs(2):
                small.train_epoch(run)
                evaluate(run)
                small.optimizer.param_groups[0]["lr"] *= 0.5  # must not happen twice
                small.train_epoch(run)
                evaluate(run)
                run.log_epoch(drawn=torch.rand(1))

    train(tmp_path / "whole")
    for killed in range(asks_at[-1] + 1, asks_at[-1] + 4):
        directory = tmp_path / f"run-{killed}"
        with pytest.raises(Killed):
            train(directory, asks_at=asks_at, killed_at=[killed])
        train(directory)
        assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(directory)) == [], killed


def test_what_is_noted_of_it_is_when_the_state_was_taken(tmp_path: Path) -> None:
    """What is evaluated between that and a kill is lost, and is to be accounted so."""
    taken: list[float] = []
    small = Small(at_evaluation=at([3], lambda: (taken.append(time.time()), ask_to_save())))
    small.train(tmp_path / "run", snapshots=ALL)
    rows = map(json.loads, (tmp_path / "run/events.jsonl").read_text().splitlines())
    row = next(row for row in rows if row.get("snapshot") == "step-000000008")
    assert row["taken"] <= time.strftime("%Y-%m-%dT%H:%M:%S.999+00:00", time.gmtime(taken[0]))
    assert row["stall_seconds"] > 0


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small import Small
from resumable_trainer import SnapshotPolicy

where, seen = Path(sys.argv[2]), []

def evaluation(run):
    seen.append(run.epoch)
    if len(seen) == 4 and sys.argv[3:]:
        (where / "evaluates").touch()
        while not (where / "asked").exists():
            time.sleep(0.01)
    if len(seen) == 5 and sys.argv[3:]:
        time.sleep(600)

Small(width=300, at_evaluation=evaluation).train(where / "run", snapshots=SnapshotPolicy(keep_last=99))
"""


def test_a_process_that_is_killed_in_the_evaluation_it_saved_in_loses_nothing(tmp_path: Path) -> None:
    def start(directory: Path, *waits: str) -> subprocess.Popen[bytes]:
        directory.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(HERE), str(directory), *waits])

    def until(path: Path) -> None:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline, path
            time.sleep(0.01)

    training = start(tmp_path / "cut", "waits")
    try:
        until(tmp_path / "cut/evaluates")
        training.send_signal(signal.SIGUSR1)
        (tmp_path / "cut/asked").touch()
        until(tmp_path / "cut/run/snapshots/step-000000008")
    finally:
        training.kill()
        training.wait()
    assert start(tmp_path / "whole").wait(120) == 0
    assert start(tmp_path / "cut").wait(120) == 0
    assert endings.differing(endings.ending(tmp_path / "whole/run"), endings.ending(tmp_path / "cut/run")) == []
