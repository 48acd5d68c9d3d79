"""The lines that a person reads at the start of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from resumable_trainer import Run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def advised(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("advice")]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_fresh_run_is_told_of_the_fused_optimizer_and_a_resumed_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Callable[..., torch.optim.Optimizer]
) -> None:
    for launch, expected in enumerate((1, 0)):
        model = nn.Linear(2, 1)
        state = {"model": model, "optimizer": kind(model.parameters(), lr=0.1)}
        with Run(tmp_path / "run", state=state) as run:
            for _ in run.epochs(launch + 1):
                for _ in run.batches(range(2)):
                    pass
        lines = advised(capsys)
        assert len(lines) == expected
        assert all(f"{kind.__name__}(..., fused=True)" in line for line in lines)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"differentiable": True}])
def test_who_has_chosen_a_way_of_updating_gets_no_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, bool]
) -> None:
    model = nn.Linear(2, 1)
    state = {"model": model, "optimizer": torch.optim.Adam(model.parameters(), **options)}
    with Run(tmp_path / "run", state=state):
        assert advised(capsys) == []


def test_an_optimizer_without_a_fused_form_gets_no_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(2, 1)
    with Run(tmp_path / "run", state={"model": model, "optimizer": torch.optim.RMSprop(model.parameters())}):
        assert advised(capsys) == []
