"""What is done while faults strike: every way in which a run changes its directory.

Each scenario has a durable base, and an act that the real package carries out and that acknowledges each
snapshot once the package has called it durable. The states are functions of the step alone, so that what
a recovery gives back can be compared with what must have been saved, without asking the package.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from resumable_trainer import EarlyStopping, Run, SnapshotPolicy, StateManager
from resumable_trainer.durable import files
from resumable_trainer.durable.files import BLOCK_BYTES
from resumable_trainer.manager import Facts
from resumable_trainer.snapshot import tensors, unchanged
from resumable_trainer.snapshot.layout import Position
from resumable_trainer.snapshot.retention import to_delete
from resumable_trainer.state import staging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Acknowledge = Callable[[str], None]

KEEP = 3
EPOCHS, BATCHES = 3, 2
_policy = SnapshotPolicy(every_steps=1, keep_last=KEEP, background=False)


@dataclass(frozen=True)
class Scenario:
    """One way in which a run directory is changed.

    Attributes:
        name: Of the scenario.
        prepare: Makes the run directory as it is before.
        act: Changes it; acknowledges what is durable.
        durable_before: Snapshots that are durable before the act; newest last.
        is_run: Whether it is a whole training by `Run`, or snapshots by `StateManager`.
        gives_up: Snapshots that the act may take out of the line (going back).
    """

    name: str
    prepare: Callable[[Path], None]
    act: Callable[[Path, Acknowledge], None]
    durable_before: tuple[str, ...] = ()
    is_run: bool = False
    gives_up: tuple[str, ...] = ()


# -- snapshots by StateManager ------------------------------------------------------------------------


class Values:
    """A part whose whole state is a function of the step."""

    def __init__(self, step: int = -1) -> None:
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        step = self.step
        return {
            "weights": torch.arange(24.0).reshape(4, 6) * (step + 1),
            "moments": [torch.full((5,), step, dtype=torch.float64), torch.tensor(step)],
            "words": {"at": f"step {step}", "odd": [None, True, step / 7]},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["moments"][1].item())
        self.loaded = state


def name_of(step: int) -> str:
    """Of the snapshot at a step, within the first epoch."""
    return f"step-{step:09d}"


def manager_of(directory: Path, values: Values) -> StateManager:
    """As a script would make it."""
    retain = partial(to_delete, keep_last=KEEP, keep_best=0, keep_every=None)
    return StateManager(directory, state={"values": values}, retain=retain)


def save(manager: StateManager, values: Values, step: int, *, background: bool = False) -> None:
    """The state of a step, with generators that belong to it."""
    values.step = step
    torch.manual_seed(step)
    manager.snapshot(epoch=0, batch=step, step=step, background=background)


def _prepare(directory: Path, *steps: int) -> None:
    values = Values()
    with manager_of(directory, values) as manager:
        for step in steps:
            save(manager, values, step)


def _saved(*steps: int) -> Callable[[Path], None]:
    return lambda directory: _prepare(directory, *steps)


def _act(directory: Path, acknowledge: Acknowledge, *, steps: tuple[int, ...], which: str = "latest") -> None:
    values = Values()
    with manager_of(directory, values) as manager:
        if manager.store.names():
            manager.restore(which)
        for step in steps:
            save(manager, values, step)
            acknowledge(name_of(step))


def _act_unchanged(directory: Path, acknowledge: Acknowledge) -> None:
    """A file that is the same each time is linked from the third snapshot on."""
    values = Values()
    with mock.patch.object(unchanged, "WORTH_BYTES", 0), manager_of(directory, values) as manager:
        manager.restore()
        for values.step in (3, 4, 5):
            torch.manual_seed(values.step)
            staged = manager.stage(manager.capture({"loop": {"same": torch.arange(40)}}))
            manager.write(staged, Facts(Position(0, values.step, values.step)), background=False)
            acknowledge(name_of(values.step))


def _act_past_the_cache(directory: Path, acknowledge: Acknowledge) -> None:
    """A file is large from two blocks on: it goes past the page cache where it may, and its tail through it."""
    values = Values()
    with (
        mock.patch.object(files, "LARGE_BYTES", 2 * BLOCK_BYTES),
        mock.patch.multiple(tensors, LARGE_BYTES=2 * BLOCK_BYTES, _GATHER_BYTES=BLOCK_BYTES),
        mock.patch.object(staging, "_HUGE_BYTES", BLOCK_BYTES),  # staged in pages
        manager_of(directory, values) as manager,
    ):
        manager.restore()
        for values.step in (3, 4):
            torch.manual_seed(values.step)
            staged = manager.stage(manager.capture({"loop": {"large": torch.arange(5000) * values.step}}))
            manager.write(staged, Facts(Position(0, values.step, values.step)), background=False)
            acknowledge(name_of(values.step))


def _act_in_background(directory: Path, acknowledge: Acknowledge) -> None:
    values = Values()
    with manager_of(directory, values) as manager:
        manager.restore()
        for step in (3, 4):
            save(manager, values, step, background=True)
            if step > 3:
                acknowledge(name_of(step - 1))  # waited for before the next one began
        manager.wait()
        acknowledge(name_of(4))


def _prepare_sweep(directory: Path) -> None:
    _prepare(directory, 1, 2)
    root = directory / "snapshots"
    shutil.copytree(root / name_of(2), root / f".tmp-{name_of(3)}-1-aaaa")
    shutil.copytree(root / name_of(1), root / f".trash-{name_of(0)}-bbbb")
    (directory / ".tmp-run.json-cccc").write_text("{")


def _prepare_damaged(directory: Path) -> None:
    _prepare(directory, 1, 2, 3)
    path = directory / "snapshots" / name_of(3) / "values.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)


# -- whole trainings by Run ---------------------------------------------------------------------------


class Training:
    """A training small enough to be run thousands of times, with a row per step and early stopping."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.data = (torch.arange(12.0).reshape(4, 3) / 12, torch.ones(4, 1))

    def train(self, directory: Path, *, acknowledge: Acknowledge = lambda name: None, die_at: int | None = None) -> Run:
        state = {"model": self.model, "optimizer": self.optimizer}
        stopping = EarlyStopping("test_loss", mode="min", patience=10)
        with Run(directory, state=state, snapshots=_policy, early_stopping=stopping, progress=False) as run:
            seen = _Durable(run, acknowledge)
            for _ in run.epochs(EPOCHS):
                seen.tell()
                for inputs, targets in run.batches(self.data, batch_size=2, shuffle=True):
                    seen.tell()
                    noise = torch.rand(2, 1) / 10
                    loss = (self.model(inputs) + noise - targets).square().mean()
                    self.optimizer.zero_grad()
                    loss.backward()
                    self.optimizer.step()
                    run.log(loss=loss)
                    if die_at == run.step:
                        raise Died
                with torch.no_grad():
                    run.log_epoch(test_loss=(self.model(self.data[0]) - self.data[1]).square().mean())
            seen.tell()
        return run


class Died(BaseException):
    """Stands for a kill in the preparation of a scenario."""


class _Durable:
    """Acknowledges what the run has called durable since it was asked last."""

    def __init__(self, run: Run, acknowledge: Acknowledge) -> None:
        self._manager, self._acknowledge, self._told = run._keeper.manager, acknowledge, run._keeper.manager.latest

    def tell(self) -> None:
        latest = self._manager.latest
        if latest is not None and latest != self._told:
            self._told = latest
            self._acknowledge(latest)


def _prepare_killed(directory: Path) -> None:
    """Killed within the second epoch, with rows in the journal that no snapshot counts."""
    with contextlib.suppress(Died):
        Training().train(directory, die_at=3)
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(b'{"row":"step","step":3,"epoch":1,"batch":1,"loss":0.5}\n{"row":"st')


def _train(directory: Path, acknowledge: Acknowledge) -> None:
    Training().train(directory, acknowledge=acknowledge)


def _nothing(directory: Path) -> None:
    """No run directory yet."""


def _scenarios() -> Iterator[Scenario]:
    yield Scenario("first snapshot", _nothing, partial(_act, steps=(1,)))
    yield Scenario("n-th snapshot", _saved(1, 2), partial(_act, steps=(3,)), (name_of(1), name_of(2)))
    yield Scenario("several, synchronous", _saved(1), partial(_act, steps=(2, 3)), (name_of(1),))
    yield Scenario("in the background", _saved(1, 2), _act_in_background, (name_of(1), name_of(2)))
    before = tuple(name_of(step) for step in (1, 2, 3))
    yield Scenario("retention", _saved(1, 2, 3), partial(_act, steps=(4, 5)), before)
    yield Scenario("unchanged files", _saved(1, 2), _act_unchanged, (name_of(1), name_of(2)))
    yield Scenario("past the page cache", _saved(1, 2), _act_past_the_cache, (name_of(1), name_of(2)))
    yield Scenario("sweep at the start", _prepare_sweep, partial(_act, steps=(3,)), (name_of(1), name_of(2)))
    yield Scenario("quarantine", _prepare_damaged, partial(_act, steps=(4,)), (name_of(1), name_of(2)))
    yield Scenario("going back", _saved(1, 2, 3), partial(_act, steps=(4,), which="1"), before, gives_up=before[1:])
    yield Scenario("lock take-over", _saved(1), partial(_act, steps=()), (name_of(1),))
    yield Scenario("a run's beginning", _nothing, _train, is_run=True)
    yield Scenario("journal rewind", _prepare_killed, _train, (name_of(3),), is_run=True)


SCENARIOS = {scenario.name: scenario for scenario in _scenarios()}
