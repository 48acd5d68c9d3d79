"""Files that hold what an earlier snapshot's hold are linked; only bytes decide, and no block is in all snapshots."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from resumable_trainer import StateManager
from resumable_trainer.durable.files import Files
from resumable_trainer.snapshot import unchanged as unchanged_module
from resumable_trainer.snapshot.exporting import export_safetensors
from resumable_trainer.snapshot.retention import to_delete
from resumable_trainer.snapshot.selected import select
from resumable_trainer.snapshot.unchanged import Unchanged
from resumable_trainer.state.compare import differences

if TYPE_CHECKING:
    from pathlib import Path

FROZEN = "model.frozen.safetensors"


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(600, 600, bias=False), nn.Linear(600, 3))
    net[0].requires_grad_(False)
    return net


def manager_of(directory: Path, part: Any, *, keep: int = 99, files: Files | None = None) -> StateManager:
    retain = partial(to_delete, keep_last=keep, keep_best=0, keep_every=None)
    return StateManager(directory, state={"model": part}, retain=retain, files=files)


def train(net: nn.Module) -> None:
    with torch.no_grad():
        net[1].weight.add_(1)  # type: ignore[union-attr,operator]


def save(manager: StateManager, net: nn.Module, *steps: int) -> None:
    for step in steps:
        train(net)
        manager.snapshot(epoch=0, batch=step, step=step, background=False)


def number(directory: Path, step: int, name: str = FROZEN) -> int:
    return os.stat(directory / f"snapshots/step-{step:09d}" / name).st_ino


def numbers(directory: Path, *steps: int) -> list[int]:
    return [number(directory, step) for step in steps]


def test_what_is_frozen_is_linked_and_every_snapshot_is_whole(tmp_path: Path) -> None:
    net = model()
    with manager_of(tmp_path, net) as manager:
        save(manager, net, *range(1, 8))
        expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        found = numbers(tmp_path, *range(1, 8))
        assert len(set(found)) == 2
        assert all(a != b for a, b in itertools.pairwise(found)), "neighbours never share a file"
        assert len({number(tmp_path, step, "model.safetensors") for step in range(1, 8)}) == 7
        for name in manager.store.names():
            manager.store.verify(name)
        train(net)
        manager.restore()
        assert differences(expected, dict(net.state_dict()), place="model") == []
        export_safetensors(select(tmp_path, "latest"), "model", tmp_path / "out.safetensors")


def test_one_rotten_block_leaves_every_other_snapshot(tmp_path: Path) -> None:
    net = model()
    with manager_of(tmp_path, net) as manager:
        save(manager, net, 1, 2, 3, 4, 5)
    with (tmp_path / "snapshots/step-000000005" / FROZEN).open("r+b") as file:
        file.seek(1000)
        file.write(b"rot")
    with manager_of(tmp_path, net) as manager:
        report = manager.restore()
        assert report.snapshot == "step-000000004"
        assert list(report.quarantined) == ["step-000000005"]


def test_only_the_bytes_decide(tmp_path: Path) -> None:
    net = model()
    with manager_of(tmp_path, net) as manager:
        save(manager, net, 1, 2, 3)
        version = net[0].weight._version  # type: ignore[index]
        net[0].weight.data[5, 5] += 1  # type: ignore[index]
        assert net[0].weight._version == version, "no version tells of it"  # type: ignore[index]
        expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        save(manager, net, 4)
        assert number(tmp_path, 4) not in numbers(tmp_path, 1, 2, 3)
        manager.store.verify("step-000000004")
        train(net)
        net[0].weight.data.zero_()  # type: ignore[index]
        manager.restore()
        assert torch.equal(net[0].weight, expected["0.weight"])  # type: ignore[index]


def test_a_file_of_the_same_length_is_not_the_same_file(tmp_path: Path) -> None:
    net = model()
    with manager_of(tmp_path, net) as manager:
        for step in range(1, 9):
            if step in (2, 5):
                net[0].weight.data.add_(1)  # type: ignore[index]
            save(manager, net, step)
            manager.store.verify(f"step-{step:09d}")


def test_neighbours_do_not_share_a_file_either_when_the_one_between_is_gone(tmp_path: Path) -> None:
    net = model()
    with manager_of(tmp_path, net) as manager:
        save(manager, net, 1, 2, 3)
        manager.store.delete("step-000000002")
        save(manager, net, 4)
        assert number(tmp_path, 1) == number(tmp_path, 3) != number(tmp_path, 4)


def test_a_file_that_was_the_same_the_last_time_is_linked_though_nothing_says_that_it_is_frozen(tmp_path: Path) -> None:
    net = nn.Linear(600, 600)
    with manager_of(tmp_path, net) as manager:
        for step in range(1, 6):
            manager.snapshot(epoch=0, batch=step, step=step, background=False)
    found = [number(tmp_path, step, "model.safetensors") for step in range(1, 6)]
    assert len(set(found)) == 2
    assert found[4] == found[2] != found[3]


def test_small_files_are_always_written(tmp_path: Path) -> None:
    net = nn.Linear(60, 60)
    net.requires_grad_(False)
    with manager_of(tmp_path, net) as manager:
        for step in range(1, 6):
            manager.snapshot(epoch=0, batch=step, step=step, background=False)
    assert len({number(tmp_path, step, "model.safetensors") for step in range(1, 6)}) == 5


def test_where_one_snapshot_is_kept_its_file_is_linked_on(tmp_path: Path) -> None:
    net = model()
    with manager_of(tmp_path, net, keep=1) as manager:
        save(manager, net, 1)
        first = number(tmp_path, 1)
        save(manager, net, 2)
        assert number(tmp_path, 2) != first
        second = number(tmp_path, 2)
        save(manager, net, 3)
        assert number(tmp_path, 3) == second
        save(manager, net, 4)
        assert number(tmp_path, 4) == second


def test_the_first_snapshot_of_a_process_is_written_in_full(tmp_path: Path) -> None:
    net = model()
    for steps in ((1, 2, 3), (4, 5, 6)):
        with manager_of(tmp_path, net) as manager:
            manager.restore()
            save(manager, net, *steps)
    found = numbers(tmp_path, *range(1, 7))
    assert found[3] not in found[:3]
    assert found[4] == found[2]
    assert found[5] == found[3]


def test_a_file_serves_so_many_snapshots_and_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unchanged_module, "MAX_USES", 2)
    net = model()
    with manager_of(tmp_path, net, keep=3) as manager:
        found = []
        for step in range(1, 20):
            save(manager, net, step)
            found.append(number(tmp_path, step))
    assert all(a != b for a, b in itertools.pairwise(found))
    runs = [len(list(group)) for _, group in itertools.groupby(found[::2])]
    assert max(runs) == 3
    assert len(runs) > 2


class NoLinks(Files):
    def __init__(self, number: int) -> None:
        self.number, self.tried = number, 0

    def link(self, source: Path, target: Path) -> None:
        self.tried += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOENT, errno.EIO])
def test_a_file_system_that_refuses_links_gets_files(tmp_path: Path, code: int) -> None:
    net, files = model(), NoLinks(code)
    with manager_of(tmp_path, net, files=files) as manager:
        save(manager, net, 1, 2, 3)
        assert files.tried == 1
        assert len(set(numbers(tmp_path, 1, 2, 3))) == 3
        for name in manager.store.names():
            manager.store.verify(name)


@pytest.mark.parametrize("what", ["gone", "short", "a link", "a directory"])
def test_a_file_that_is_not_what_it_was_is_never_linked(tmp_path: Path, what: str) -> None:
    net = model()
    with manager_of(tmp_path, net) as manager:
        save(manager, net, 1, 2)
        path = tmp_path / "snapshots/step-000000001" / FROZEN
        if what == "short":
            os.truncate(path, 100)
        else:
            path.unlink()
        if what == "a link":
            path.symlink_to(tmp_path / "snapshots/step-000000002" / FROZEN)
        elif what == "a directory":
            path.mkdir()
        save(manager, net, 3, 4)
        manager.store.verify("step-000000003")
        manager.store.verify("step-000000004")
        assert (tmp_path / "snapshots/step-000000003" / FROZEN).is_file()
        assert not (tmp_path / "snapshots/step-000000003" / FROZEN).is_symlink()


def test_deleting_one_snapshot_takes_nothing_from_another(tmp_path: Path) -> None:
    net = model()
    with manager_of(tmp_path, net) as manager:
        save(manager, net, 1, 2, 3, 4)
        assert number(tmp_path, 1) == number(tmp_path, 3)
        manager.store.delete("step-000000001")
        manager.quarantine("step-000000002", "for the test")
        for name in ("step-000000003", "step-000000004"):
            manager.store.verify(name)
        shutil.rmtree(tmp_path / "quarantine")
        manager.store.verify("step-000000004")


def test_going_back_begins_anew(tmp_path: Path) -> None:
    net = model()
    with manager_of(tmp_path, net) as manager:
        save(manager, net, 1, 2, 3)
        first = number(tmp_path, 1)
        manager.restore("1")
        save(manager, net, 4, 5)
        assert number(tmp_path, 4) != first
        assert number(tmp_path, 5) == first
        assert manager.restore().snapshot == "step-000000005"


def test_thawing_and_freezing_move_tensors_between_files_and_restore_exactly(tmp_path: Path) -> None:
    net = model()
    with manager_of(tmp_path, net) as manager:
        for step, trained in enumerate((False, True, False, False), start=1):
            net[0].requires_grad_(trained)  # type: ignore[index]
            save(manager, net, step)
            there = (tmp_path / f"snapshots/step-{step:09d}" / FROZEN).exists()
            assert there is not trained
            expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            with torch.no_grad():
                net[0].weight.zero_()  # type: ignore[index]
            manager.restore()
            assert differences(expected, dict(net.state_dict()), place="model") == []
            assert net[0].weight.requires_grad is trained  # type: ignore[index]


def test_a_part_that_has_the_name_of_such_a_file_keeps_it(tmp_path: Path) -> None:
    net, other = model(), nn.Linear(3, 3)
    with StateManager(tmp_path, state={"model": net, "model.frozen": other}) as manager:
        save(manager, net, 1)
        expected = [t.clone() for t in (*net.state_dict().values(), *other.state_dict().values())]
        with torch.no_grad():
            for parameter in (*net.parameters(), *other.parameters()):
                parameter.zero_()
        manager.restore()
        found = [*net.state_dict().values(), *other.state_dict().values()]
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class OwnState(nn.Linear):
    """Frozen, with a state that does not hold its parameters as tensors."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"weight": self.weight.tolist(), "bias": self.bias.detach()}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self.weight.copy_(torch.tensor(state["weight"]))


def test_a_module_whose_state_is_its_own_may_be_frozen(tmp_path: Path) -> None:
    net = OwnState(3, 3)
    net.requires_grad_(False)
    with manager_of(tmp_path, net) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
        manager.store.verify("step-000000001")


def test_nothing_is_likely_before_there_is_a_snapshot() -> None:
    unchanged = Unchanged()
    unchanged.start_from(None, {})
    assert not unchanged.is_likely(FROZEN)
