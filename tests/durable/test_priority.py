"""The writer in the background yields to training; nobody else's priority is touched."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from resumable_trainer import StateManager
from resumable_trainer.durable import priority
from resumable_trainer.durable.files import Files
from resumable_trainer.durable.priority import yield_to_training

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts priorities by thread")


def mine() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def in_thread(act: Callable[[], None]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


class Noting(Files):
    def __init__(self) -> None:
        self.priorities: set[int] = set()

    def create(self, path: Path) -> int:
        self.priorities.add(mine())
        return super().create(path)


@pytest.mark.parametrize("background", [True, False])
def test_only_a_snapshot_in_the_background_is_written_with_low_priority(tmp_path: Path, background: bool) -> None:
    files, before = Noting(), mine()
    with StateManager(tmp_path, state={"layer": torch.nn.Linear(2, 2)}, files=files) as manager:
        files.priorities.clear()
        manager.snapshot(epoch=0, batch=1, step=1, background=background).wait()
    assert files.priorities == {max(before, 10) if background else before}
    assert mine() == before


def test_a_thread_that_has_a_lower_priority_keeps_it() -> None:
    found: list[int] = []

    def act() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        yield_to_training()
        found.append(mine())

    in_thread(act)
    assert found == [15]


def test_a_system_that_refuses_or_counts_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def refused(*_: int) -> None:
        raise PermissionError

    before = mine()
    with monkeypatch.context() as patch:
        patch.setattr(os, "setpriority", refused)
        in_thread(lambda: (yield_to_training(), found.append(mine()))[0])
    with monkeypatch.context() as patch:
        patch.setattr(priority.sys, "platform", "darwin")
        in_thread(lambda: (yield_to_training(), found.append(mine()))[0])
    assert found == [before, before]
