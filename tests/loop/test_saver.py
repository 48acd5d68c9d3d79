"""Which failure of the disk is said, which is tried again, and which is an error in the end."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from resumable_trainer import SnapshotPolicy, SnapshotWriteError, StateManager
from resumable_trainer.durable.files import Files
from resumable_trainer.loop.saver import Saver
from resumable_trainer.manager import Facts
from resumable_trainer.snapshot.layout import Position

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Disk(Files):
    """Refuses every write while it is full."""

    is_full = False

    def write(self, fd: int, data: Any) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, data)


class NoRows:
    """A journal in which nothing is."""

    whole_file = None

    def sync(self) -> None:
        """Nothing is to be made durable."""


class Scene:
    """A saver, its disk, a clock that stands, and all lines that were said."""

    def __init__(self, directory: Path, policy: SnapshotPolicy) -> None:
        self.disk, self.now = Disk(), 0.0
        self.said: list[str] = []
        self.manager = StateManager(directory, state={"model": torch.nn.Linear(2, 2)}, files=self.disk)
        self.saver = Saver(self.manager, policy, rows=NoRows(), clock=lambda: self.now, say=self.said.extend)

    def save(self, step: int, how: str = "save") -> None:
        staged = self.manager.stage(self.manager.capture())
        getattr(self.saver, how)(staged, Facts(Position(0, step, step)))

    def let_it_end(self) -> None:
        for thread in threading.enumerate():
            if thread.name.startswith("snapshot "):
                thread.join()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path / "run", SnapshotPolicy(background=True, every_epochs=None, every_seconds=10.0))
    with scene.manager:
        yield scene


def test_a_failure_in_the_background_is_said_at_the_next_look_and_the_recovery_once(scene: Scene) -> None:
    scene.disk.is_full = True
    scene.save(1)
    scene.let_it_end()
    scene.saver.poll()
    (line,) = scene.said
    assert "step-000000001" in line
    assert line.endswith("training goes on, and the next snapshot tries again")
    scene.saver.poll()
    assert len(scene.said) == 1
    scene.disk.is_full = False
    scene.save(2)
    assert len(scene.said) == 1, "it is not known to be durable yet"
    scene.let_it_end()
    scene.saver.poll()
    assert scene.said[1:] == ["saved   step-000000002, after 1 that failed"]
    scene.saver.poll()
    scene.saver.close()
    assert len(scene.said) == 2


def test_a_look_at_a_snapshot_in_flight_says_nothing_and_waits_for_nothing(scene: Scene) -> None:
    go_on = threading.Event()
    scene.disk.sync = lambda fd: (go_on.wait(10), None)[1]  # type: ignore[method-assign]
    scene.save(1)
    scene.saver.poll()
    assert scene.manager.is_writing
    go_on.set()
    scene.saver.settle()
    assert not scene.manager.is_writing
    assert scene.said == []


def test_the_newest_state_that_is_not_durable_is_an_error_on_leaving(scene: Scene) -> None:
    scene.disk.is_full = True
    scene.save(1)
    with pytest.raises(SnapshotWriteError, match="No space left on device"):
        scene.saver.close()


def test_after_a_failed_attempt_the_clock_of_the_policy_starts_anew(scene: Scene) -> None:
    scene.now = 9.0
    assert not scene.saver.is_due_after_batch(1)
    scene.now = 10.0
    assert scene.saver.is_due_after_batch(1)
    scene.disk.is_full = True
    scene.save(1)
    scene.saver.settle()
    assert not scene.saver.is_due_after_batch(2)
    scene.now = 20.0
    assert scene.saver.is_due_after_batch(2)


@pytest.mark.parametrize("how", ["save", "save_now", "save_last"])
def test_only_what_is_saved_before_leaving_is_an_error_at_once(scene: Scene, how: str) -> None:
    scene.disk.is_full = True
    if how == "save_now":
        with pytest.raises(SnapshotWriteError, match="No space left on device"):
            scene.save(1, how)
    else:
        scene.save(1, how)
        scene.saver.settle()
        assert len(scene.said) == 1
        scene.disk.is_full = False
        if how == "save_last":
            scene.saver.close()
            assert scene.manager.latest == "step-000000001", "what is owed is made good"


def test_an_end_that_is_owed_is_not_written_after_a_newer_state(scene: Scene) -> None:
    """A run goes on after its end where the script asks for more epochs."""
    scene.disk.is_full = True
    scene.save(1, "save_last")
    scene.disk.is_full = False
    scene.save(2)
    scene.saver.close()
    assert scene.manager.store.names() == ["step-000000002"]
