"""Data that can only be read from their beginning: finding a place again may take as long as an epoch did."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small import Killed, Small
from torch.utils.data import DataLoader, IterableDataset

from resumable_trainer import Preempted, Run, SnapshotPolicy
from resumable_trainer.loop.heartbeat import FLOOR_VARIABLE
from resumable_trainer.loop.notices import notices
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KILLED_AT = 8


@dataclass
class Stream(IterableDataset[torch.Tensor]):
    """Ten batches; tells when each is about to be read."""

    about_to_read: Callable[[int], None] = lambda number: None
    num_read: int = field(default=0)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(10):
            self.about_to_read(number)
            self.num_read += 1
            yield torch.full((4, 3), float(number))


def plain(stream: Stream) -> Any:
    return stream


def loaded(stream: Stream) -> DataLoader[torch.Tensor]:
    return DataLoader(stream, batch_size=None)


def train(directory: Path, data: Any, *, kill: bool = False) -> None:
    small = Small()
    with Run(directory, state=small.state, snapshots=SnapshotPolicy(every_steps=1), progress=False) as run:
        for _ in run.epochs(1):
            for inputs in run.batches(data):
                if kill and run.batch == KILLED_AT:
                    raise Killed
                small.optimizer.zero_grad()
                small.model(inputs).square().mean().backward()
                small.optimizer.step()


@pytest.fixture(params=[plain, loaded])
def as_data(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Stream], Any]:
    """A way to hand a stream over; the run has been killed within its epoch."""
    as_data: Callable[[Stream], Any] = request.param
    with pytest.raises(Killed):
        train(tmp_path / "run", as_data(Stream()), kill=True)
    return as_data


def test_each_batch_that_is_read_again_is_a_sign_of_life(
    tmp_path: Path, as_data: Callable[[Stream], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    signs = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)

        def count(number: int) -> None:
            signs.append(0)
            while True:
                try:
                    signs[-1] += b"WATCHDOG=1" in listener.recv(10_000)
                except BlockingIOError:
                    return

        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "600000000")
        monkeypatch.setenv(FLOOR_VARIABLE, "0.000001")
        train(tmp_path / "run", as_data(Stream(count)))
    assert all(signs[1 : KILLED_AT + 1])


def test_a_notice_does_not_wait_until_all_is_read_again(tmp_path: Path, as_data: Callable[[Stream], Any]) -> None:
    def notify(number: int) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before, stream = Store(tmp_path / "run").names(), Stream(notify)
    with pytest.raises(Preempted) as left:
        train(tmp_path / "run", as_data(stream))
    assert f"on the way to its place in the data | saved as {before[-1]} |" in left.value.message
    notices.reset()
    assert stream.num_read == 3
    assert Store(tmp_path / "run").names() == before
    train(tmp_path / "run", as_data(Stream()))
    assert Store(tmp_path / "run").names()[-1] == "step-000000010-epoch-000001"
