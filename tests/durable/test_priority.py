"""The writer in the background yields to training; nobody else's priority is touched."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from resumable_trainer import StateManager
from resumable_trainer.durable import priority
from resumable_trainer.durable.files import Files
from resumable_trainer.durable.priority import move_anywhere, yield_to_training

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


# -- the core of the disk ---------------------------------------------------------------------------------

MOVED = "import os, sys; from pathlib import Path; from resumable_trainer.durable import priority as p;"
MOVED += " p.move_to_core_of_disk(Path(sys.argv[1]), system=Path(sys.argv[2])); print(*sorted(os.sched_getaffinity(0)))"


def moved(directory: Path, interrupts: dict[str, str] | None) -> set[int]:
    """Where a process may run that has moved, given the interrupts of each line of the disk by core."""
    system = directory / "system"
    device = os.stat(directory).st_dev
    controller = system / "sys" / "devices" / "controller"
    disk = controller / "virtio" / "block" / "disk"
    disk.mkdir(parents=True)
    if interrupts is not None:
        (system / "sys" / "dev" / "block").mkdir(parents=True)
        (system / "sys" / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}").symlink_to(disk)
        for number, counts in interrupts.items():
            (controller / "msi_irqs" / number).mkdir(parents=True)
            line = system / "sys" / "kernel" / "irq" / number
            line.mkdir(parents=True)
            (line / "per_cpu_count").write_text(f"{counts}\n")
    done = subprocess.run(
        [sys.executable, "-c", MOVED, directory, system], capture_output=True, text=True, check=True, timeout=60
    )
    return set(map(int, done.stdout.split()))


def by_core(**counts: int) -> str:
    """Counts by core; the others have none."""
    return ",".join(str(counts.get(f"core_{core}", 0)) for core in range(max(os.sched_getaffinity(0)) + 1))


several_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core only")


@several_cores
@pytest.mark.parametrize("number", [0, -1])
def test_who_commits_small_snapshots_runs_where_the_disk_interrupts(tmp_path: Path, number: int) -> None:
    core = sorted(os.sched_getaffinity(0))[number]
    few, many = by_core(**{f"core_{core}": 3}), by_core(**{f"core_{core}": 5000})
    assert moved(tmp_path, {"35": few, "36": many}) == {core}


@several_cores
@pytest.mark.parametrize("case", ["spread", "none yet", "no such disk", "nonsense", "a core of others"])
def test_it_stays_where_it_is_if_no_core_is_the_disks(tmp_path: Path, case: str) -> None:
    one, *_, last = mine = sorted(os.sched_getaffinity(0))
    spread = by_core(**{f"core_{one}": 500, f"core_{last}": 500})
    foreign = ",".join(["0"] * (last + 1) + ["7000"])
    cases = {"spread": {"1": spread}, "none yet": {"1": by_core()}, "no such disk": None}
    cases |= {"nonsense": {"1": "no numbers"}, "a core of others": {"1": foreign}}
    assert moved(tmp_path, cases[case]) == set(mine)


@several_cores
def test_who_is_waited_for_may_run_anywhere() -> None:
    mine = os.sched_getaffinity(0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        os.sched_setaffinity(process.pid, {min(mine)})
        move_anywhere(process.pid)
        assert os.sched_getaffinity(process.pid) == mine
        process.communicate(b"\n")
    move_anywhere(process.pid)  # it is gone
