"""Signals: who gets them, when they are followed, and what they do not break."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from typing import TYPE_CHECKING

import endings
import pytest
import torch
from small import Small
from torch.utils.data import DataLoader, TensorDataset

from resumable_trainer import Preempted, Run, SnapshotPolicy
from resumable_trainer.loop.notices import notices
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_notice_is_left_over() -> Iterator[None]:
    yield
    notices.reset()


def square(number: int) -> int:
    return number * number


@pytest.mark.parametrize("notice_at", [2, 5, 8])
def test_a_notice_in_an_evaluation_at_the_top_of_an_epoch_loses_no_training(tmp_path: Path, notice_at: int) -> None:
    def train(directory: Path, notice_at: int | None = None) -> None:
        small, evaluated = Small(), 0
        with Run(directory, state=small.state, progress=False, snapshots=SnapshotPolicy(every_epochs=9)) as run:
            for _ in run.epochs(3):
                for _ in run.evaluating(small.data, batch_size=4):
                    evaluated += 1
                    if evaluated == notice_at:
                        os.kill(os.getpid(), signal.SIGTERM)
                small.train_epoch(run)

    train(tmp_path / "whole")
    with pytest.raises(Preempted):
        train(tmp_path / "run", notice_at)
    notices.reset()
    # Nothing was trained before the first; the others are followed after the first batch of their epoch.
    steps = {2: [], 5: ["step-000000005"], 8: ["step-000000009"]}
    assert Store(tmp_path / "run").names() == steps[notice_at]
    train(tmp_path / "run")
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


def test_a_run_within_a_run_leaves_the_outer_ones_handlers(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Run(tmp_path / "outer", state=Small().state, progress=False):
        handler = signal.getsignal(signal.SIGTERM)
        with Run(tmp_path / "inner", state=Small().state, progress=False):
            pass
        assert signal.getsignal(signal.SIGTERM) == handler != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_forked_child_can_be_terminated(tmp_path: Path) -> None:
    """A pool that closes terminates its processes and waits for their end."""
    with Run(tmp_path / "run", state=Small().state, progress=False):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        os.kill(child.pid or 0, signal.SIGINT)  # Ctrl-C goes to the whole group: that one is the trainer's
        os.kill(child.pid or 0, signal.SIGUSR1)
        child.join(0.2)
        assert child.is_alive()
        child.terminate()
        child.join(30)
        assert child.exitcode == -signal.SIGTERM
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.map(square, range(4)) == [0, 1, 4, 9]


def test_workers_of_the_scripts_own_loader_go_on_after_ctrl_c(tmp_path: Path) -> None:
    data = TensorDataset(torch.arange(64.0))
    with Run(tmp_path / "run", state=Small().state, progress=False):
        batches = iter(DataLoader(data, batch_size=8, num_workers=1, multiprocessing_context="fork"))
        next(batches)
        for number in (signal.SIGINT, signal.SIGUSR1):
            os.kill(batches._workers[0].pid, number)  # type: ignore[attr-defined]
        assert len(list(batches)) == 7
        del batches
