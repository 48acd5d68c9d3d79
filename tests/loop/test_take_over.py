"""A run takes up a snapshot that no `Run` wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from small import Small

from resumable_trainer import StateManager
from resumable_trainer.state.compare import differences

if TYPE_CHECKING:
    from pathlib import Path


def saved_by_a_manager(directory: Path, *, epoch: int, batch: int, step: int) -> Small:
    small = Small()
    small.optimizer.zero_grad()
    small.model(small.data[0]).sum().backward()
    small.optimizer.step()
    with StateManager(directory, state=small.state) as manager:
        manager.snapshot(epoch=epoch, batch=batch, step=step)
    return small


@pytest.mark.parametrize(
    ("at", "seen"),
    [
        ({"epoch": 2, "batch": 0, "step": 8}, [(2, 0), (2, 1), (2, 2), (2, 3)]),
        ({"epoch": 1, "batch": 3, "step": 7}, [(1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]),
        ({"epoch": 0, "batch": 0, "step": 0}, [(e, b) for e in range(3) for b in range(4)]),
    ],
)
def test_a_run_goes_on_where_a_manager_alone_has_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], at: dict[str, int], seen: list[tuple[int, int]]
) -> None:
    before = saved_by_a_manager(tmp_path / "run", **at)
    then = [torch.clone(tensor) for tensor in before.model.state_dict().values()]
    after = Small()
    found: list[list[torch.Tensor]] = []
    after.model.register_forward_pre_hook(
        lambda module, _: found.append([torch.clone(t) for t in module.state_dict().values()])
    )
    run = after.train(tmp_path / "run", epochs=3, progress=None)
    assert differences(then, found[0], place="model") == [], "the first batch sees the saved weights"
    assert after.seen == seen
    assert (run.step, run.epoch, run.outcome) == (at["step"] + len(seen), 3, "finished")
    assert [row["step"] for row in run.history.to_records() if row["row"] == "step"] == [
        at["step"] + number for number in range(len(seen))
    ]
    line = "resume  not in the snapshot, so it begins anew: the loop's record (averages, best, early stopping)"
    assert line in capsys.readouterr().err.splitlines()
    again = Small()
    assert again.train(tmp_path / "run", epochs=3, progress=None).step == run.step
    assert again.seen == []
    assert "begins anew" not in capsys.readouterr().err
