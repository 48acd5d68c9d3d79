"""Loops as people write them: several at once, left in the middle, caught, kept, entered again."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import endings
import pytest
from small import Killed, Small

from resumable_trainer import Preempted, Run, SnapshotPolicy, UsageError
from resumable_trainer.loop.notices import notices
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

EVERY_STEP = SnapshotPolicy(every_steps=1, keep_last=2)


@pytest.fixture(autouse=True)
def no_notice_is_left_over() -> Iterator[None]:
    yield
    notices.reset()


def opened(directory: Path, small: Small) -> Run:
    return Run(directory, state=small.state, progress=False, snapshots=EVERY_STEP)


@pytest.mark.parametrize("notice_at", [1, 3, 4, 6])
def test_a_notice_in_an_evaluation_behind_two_loops_saves_the_end_of_the_second(tmp_path: Path, notice_at: int) -> None:
    def train(directory: Path, notice_at: int | None = None) -> None:
        small, evaluated = Small(), 0
        with Run(directory, state=small.state, progress=False) as run:
            for epoch in run.epochs(3):
                small.train_epoch(run)
                for _ in run.batches(small.data, batch_size=4):
                    run.log(again=epoch)
                for _ in run.evaluating(small.data, batch_size=4) if epoch != 1 else ():
                    evaluated += 1
                    if evaluated == notice_at:
                        os.kill(os.getpid(), signal.SIGTERM)
                run.log_epoch(test_accuracy=epoch)

    train(tmp_path / "whole")
    # An epoch that follows one without evaluation holds no state for it: there the notice waits for the end.
    with pytest.raises(Preempted) if notice_at <= 3 else contextlib.nullcontext():
        train(tmp_path / "run", notice_at)
    notices.reset()
    train(tmp_path / "run")
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


def test_two_loops_over_batches_at_the_same_time_are_refused(tmp_path: Path) -> None:
    def train() -> None:
        small = Small()
        with opened(tmp_path / "run", small) as run:
            for _ in run.epochs(1):
                both = run.batches(small.data, batch_size=3), run.batches(small.data, batch_size=4)
                for _ in zip(*both, strict=False):
                    pass

    with pytest.raises(UsageError, match="two at the same time"):
        train()


def test_a_loop_over_batches_within_another_is_refused(tmp_path: Path) -> None:
    def train() -> None:
        small = Small()
        with opened(tmp_path / "run", small) as run:
            for _ in run.epochs(1):
                for _ in run.batches(small.data, batch_size=3):
                    for _ in run.batches(small.data, batch_size=4):
                        pass

    with pytest.raises(UsageError, match="one loop over batches at a time"):
        train()


def test_a_notice_that_the_script_catches_does_not_end_the_run(tmp_path: Path) -> None:
    small = Small(at_step=lambda run: os.kill(os.getpid(), signal.SIGTERM) if run.step == 2 else None)
    left = []

    def train() -> None:
        with opened(tmp_path / "run", small) as run:
            try:
                for _ in run.epochs(3):
                    small.train_epoch(run)
            except SystemExit:
                left.append(run.outcome)

    with pytest.raises(Preempted) as leaving:
        train()
    assert leaving.value.code == 75
    assert left == [None]
    assert Store(tmp_path / "run").names()[-1] == "step-000000003"


def test_a_break_counts_though_the_iterator_is_kept(tmp_path: Path) -> None:
    """`bar = tqdm(run.epochs(9))` and `bar = tqdm(run.batches(data))` keep theirs."""

    def train(directory: Path, keep: Callable[[Iterator[object]], object]) -> list[int]:
        small, kept, steps = Small(), [], []
        with opened(directory, small) as run:
            kept.append(keep(run.epochs(5)))
            for epoch in kept[0]:
                kept.append(keep(run.batches(small.data, batch_size=5)))
                for inputs, _ in kept.pop():
                    run.log(sum=inputs.sum())
                    if run.batch == 2:
                        break
                steps.append(run.step)
                if epoch == 2:
                    break
        assert run.outcome == "finished"
        return steps

    # The iterator of the batches goes away at the next one: by then its last batch has been counted.
    assert train(tmp_path / "kept", lambda iterator: iterator) == [3, 6, 9]
    for _ in range(2):
        train(tmp_path / "whole", lambda iterator: (item for item in iterator))
    assert endings.differing(endings.ending(tmp_path / "kept"), endings.ending(tmp_path / "whole")) == []


def test_iterators_of_an_earlier_entering_change_nothing_when_they_go(tmp_path: Path) -> None:
    """In a notebook the last traceback keeps them, until the next one takes its place."""
    Small().train(tmp_path / "whole", snapshots=EVERY_STEP)
    small, kept = Small(), []
    run = opened(tmp_path / "run", small)
    with contextlib.suppress(Killed), run:
        kept.append(run.epochs(3))
        for _ in kept[0]:
            kept.append(run.batches(small.data, batch_size=3, shuffle=True))
            for _ in kept[1]:
                raise Killed
    small.at_step = lambda run: kept.clear() if run.step == 2 else None
    with run:
        for epoch in run.epochs(3):
            small.model.train()
            small.train_epoch(run)
            for _ in run.evaluating(small.data, batch_size=4):
                Small.at_evaluation(run)
            run.log_epoch(test_accuracy=float(epoch))
    assert (run.step, run.outcome) == (12, "finished")
    assert Store(tmp_path / "run").names() == Store(tmp_path / "whole").names()


def test_iterators_of_a_run_that_was_left_say_so(tmp_path: Path) -> None:
    small = Small()
    with opened(tmp_path / "run", small) as run:
        epochs = run.epochs(3)
        next(epochs)
        batches = run.batches(small.data, batch_size=3)
        next(batches)
    for iterator in (batches, epochs):
        with pytest.raises(UsageError, match="has been left"):
            next(iterator)


@pytest.mark.parametrize("kill", [5, 7])
def test_a_second_loop_over_epochs_goes_on_where_it_was_though_the_first_was_left_by_break(
    tmp_path: Path, kill: int
) -> None:
    def train(directory: Path, kill: int | None = None) -> list[str]:
        small, phases = Small(), []
        with opened(directory, small) as run:
            for _ in run.epochs(3):
                phases.append("warm-up")
                small.train_epoch(run)
                break
            for _ in run.epochs(4):
                phases.append("training")
                for inputs, _ in run.batches(small.data, batch_size=3):
                    run.log(sum=inputs.sum())
                    if run.step == kill:
                        raise Killed
        return phases

    assert train(tmp_path / "whole") == ["warm-up", "training", "training", "training"]
    with pytest.raises(Killed):
        train(tmp_path / "run", kill)
    assert train(tmp_path / "run") == ["training"] * 3
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


def test_the_history_can_be_read_when_the_run_is_over(tmp_path: Path) -> None:
    run = Small().train(tmp_path / "run", epochs=2)
    assert run.history.epochs("test_accuracy") == [0.0, 1.0]
