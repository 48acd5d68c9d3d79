"""A data-loader worker that dies while the state is restored or saved: told afterwards, and taken for nothing else."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from resumable_trainer import StateManager, StateMismatchError
from resumable_trainer.data.worker_deaths import told_afterwards

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class WorkerDiedError(RuntimeError):
    """As torch's handler raises it."""


@pytest.fixture(autouse=True)
def as_torch_does() -> Iterator[None]:
    def raise_it(number: int, frame: object) -> None:
        raise WorkerDiedError("DataLoader worker is killed by signal: Killed.")

    before = signal.signal(signal.SIGCHLD, raise_it)
    yield
    signal.signal(signal.SIGCHLD, before)


class Deadly:
    """A part during whose saving or restoring a worker dies."""

    def __init__(self) -> None:
        self.value, self.kills = 0, False

    def _strike(self) -> None:
        if self.kills:
            os.kill(os.getpid(), signal.SIGCHLD)

    def state_dict(self) -> dict[str, Any]:
        self._strike()
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._strike()
        self.value = state["value"]


def test_a_restore_goes_through_and_then_the_death_is_told(tmp_path: Path) -> None:
    deadly, layer = Deadly(), nn.Linear(2, 2)
    with StateManager(tmp_path / "run", state={"deadly": deadly, "layer": layer}) as manager:
        deadly.value, weight = 3, layer.weight.detach().clone()
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
        deadly.value, deadly.kills = 4, True
        nn.init.zeros_(layer.weight)
        found = manager.find()
        with pytest.raises(WorkerDiedError):
            manager.apply(found)
        assert deadly.value == 3
        assert torch.equal(layer.weight, weight)
        deadly.kills = False
        assert manager.store.names() == ["step-000000001"]
        assert manager.restore().snapshot == "step-000000001"


def test_reading_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resumable_trainer.snapshot import reader

    unflatten = reader.unflatten

    def struck(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGCHLD)
        return unflatten(*args)

    deadly = Deadly()
    with StateManager(tmp_path / "run", state={"deadly": deadly}) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
        found = manager.find()
        monkeypatch.setattr(reader, "unflatten", struck)
        with pytest.raises(WorkerDiedError):
            manager.apply(found)
    assert not (tmp_path / "run/quarantine").exists()


def test_a_snapshot_is_captured_whole_and_then_the_death_is_told(tmp_path: Path) -> None:
    deadly = Deadly()
    with StateManager(tmp_path / "run", state={"deadly": deadly}) as manager:
        deadly.kills = True
        with pytest.raises(WorkerDiedError):
            manager.capture()
        deadly.kills = False
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
        assert manager.latest == "step-000000001"


def test_what_fails_by_itself_says_so(tmp_path: Path) -> None:
    class Refusing(Deadly):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict(state)
            raise KeyError("value")

    part = Refusing()
    with StateManager(tmp_path / "run", state={"part": part}) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
        found, part.kills = manager.find(), True
        with pytest.raises(StateMismatchError, match="does not take back its saved state: KeyError"):
            manager.apply(found)
    with pytest.raises(WorkerDiedError):  # the handler stands again
        os.kill(os.getpid(), signal.SIGCHLD)


def test_within_each_other_and_in_other_threads_it_is_told_once_and_where_it_belongs() -> None:
    told: list[int] = []
    signal.signal(signal.SIGCHLD, lambda number, frame: told.append(number))

    @told_afterwards
    def inner() -> None:
        os.kill(os.getpid(), signal.SIGCHLD)

    @told_afterwards
    def outer() -> None:
        inner()
        inner()
        assert not told

    outer()
    assert told == [signal.SIGCHLD]
    thread = threading.Thread(target=told_afterwards(lambda: None))
    thread.start()
    thread.join()
    assert told == [signal.SIGCHLD]
