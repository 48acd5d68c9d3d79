"""A notice while the loop waits for data: the wait is broken off, and nothing that was trained is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import endings
import jobs
import pytest
import torch
from torch.utils.data import DataLoader

from resumable_trainer import Preempted, Run, SnapshotPolicy
from resumable_trainer.loop.notices import notices
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

LONG = 40.0  # seconds; a load that is waited for to its end fails the test by its time limit


class Slow(jobs.Augmented):
    """Takes its time when a sample is loaded for the n-th time, unless a file is there."""

    def __init__(self, rows: int, *, flag: Path, at: int) -> None:
        super().__init__(rows)
        self.flag, self.at, self.loaded = flag, at, 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.loaded += 1
        sample = super().__getitem__(index)  # draws
        if self.loaded == self.at and not self.flag.exists():
            time.sleep(LONG)
        return sample


def notify() -> None:
    """Soon, from another thread: by then the loop waits for data; if it does not yet, all comes out the same."""
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()


def train(directory: Path, flag: Path, *, at: int, sampler: bool = False, workers: int = 0, **more: Any) -> None:
    """`at` is the sample, of 8 a batch, whose load is slow; each of `workers` counts its own."""
    trained = (at - 1) // 8 * max(1, workers)
    model = jobs.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = Slow(48, flag=flag, at=at)
    loader: DataLoader[Any] = DataLoader(data, batch_size=8, shuffle=True, num_workers=workers, **more)
    if sampler:
        loader = DataLoader(data, batch_sampler=jobs.CountingSampler(48, 8))
    state = {"model": model, "optimizer": optimizer}
    with Run(directory, state=state, snapshots=SnapshotPolicy(every_epochs=9), progress=False) as run:
        for _ in run.epochs(3):
            if trained == run.step == 0 and not flag.exists():
                notify()
            for inputs, labels in run.batches(loader):
                if run.step == trained - 1 and not flag.exists():
                    notify()
                optimizer.zero_grad()
                loss = torch.nn.functional.binary_cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                run.log(loss=loss)


def broken_and_resumed(tmp_path: Path, expected: list[str] | None, train: Callable[..., None], **how: Any) -> None:
    """A run whose wait is broken, resumed to its end, against one that was let be."""
    (tmp_path / "never").touch()
    train(tmp_path / "whole", tmp_path / "never", **how)
    began = time.monotonic()
    with pytest.raises(Preempted):
        train(tmp_path / "run", tmp_path / "flag", **how)
    assert time.monotonic() - began < LONG / 2, "the load was waited for"
    names = Store(tmp_path / "run").names()
    assert len(names) == 1 if expected is None else names == expected
    notices.reset()
    (tmp_path / "flag").touch()
    train(tmp_path / "run", tmp_path / "flag", **how)
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


@pytest.mark.parametrize("at", [13, 19, 48])
def test_a_notice_in_a_slow_load_saves_what_was_trained_and_resumes_in_bits(tmp_path: Path, at: int) -> None:
    broken_and_resumed(tmp_path, [f"step-{(at - 1) // 8:09}"], train, at=at)


def test_a_notice_in_the_very_first_load_is_followed_at_once(tmp_path: Path) -> None:
    broken_and_resumed(tmp_path, [], train, at=1)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_in_a_slow_load_neither_hold_up_the_snapshot_nor_stay(tmp_path: Path, persistent: bool) -> None:
    before = set(_children())
    # How many batches the other worker has ready, and training takes, before the notice comes: two or three.
    broken_and_resumed(tmp_path, None, train, at=9, workers=2, persistent_workers=persistent)
    assert set(_children()) <= before


def test_a_first_load_is_waited_for_if_the_epoch_before_could_not_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going over the samplers again would give another order: they count how often they were asked."""
    monkeypatch.setattr("test_waiting.LONG", 1.0)
    (tmp_path / "never").touch()
    train(tmp_path / "whole", tmp_path / "never", at=49, sampler=True)
    with pytest.raises(Preempted):
        train(tmp_path / "run", tmp_path / "flag", at=49, sampler=True)
    assert Store(tmp_path / "run").names() == ["step-000000007"]
    notices.reset()
    (tmp_path / "flag").touch()
    train(tmp_path / "run", tmp_path / "flag", at=49, sampler=True)
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


def _children() -> list[str]:
    return [child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()]
