"""A large state goes to the disk as it lies in memory, past the page cache; and comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from resumable_trainer import StateManager
from resumable_trainer.durable.files import BLOCK_BYTES
from resumable_trainer.state.compare import same_bytes

if TYPE_CHECKING:
    from pathlib import Path

ROWS, WIDTH = 17_000, 1001  # 68 MB; no power of two anywhere


@pytest.mark.parametrize("staging", ["copy", "overlapped"])
def test_a_large_state_goes_past_the_page_cache_and_comes_back(
    tmp_path: Path, past_cache: list[int], staging: Any
) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, ROWS), nn.Linear(3, 1))
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()
    saved = [tensor.clone() for tensor in tensors(model, optimizer)]
    with StateManager(tmp_path / "run", state={"model": model, "optimizer": optimizer}, staging=staging) as manager:
        for step in (1, 2):  # the second into memory that is there
            past_cache.clear()
            manager.snapshot(epoch=0, batch=step, step=step)
            manager.wait()
            assert sum(past_cache) == sum(size // BLOCK_BYTES * BLOCK_BYTES for size in data_bytes(tmp_path / "run"))
        with torch.no_grad():
            for tensor in tensors(model, optimizer):
                tensor.zero_()
        manager.restore()
    assert all(map(same_bytes, tensors(model, optimizer), saved))


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    inner = [value for state in optimizer.state.values() for value in state.values()]
    return [parameter.data for parameter in model.parameters()] + inner


def data_bytes(run: Path) -> list[int]:
    """Of each large file of the newest snapshot: how many follow its header."""
    newest = max((run / "snapshots").glob("step-*"))
    files = [path.read_bytes() for path in newest.glob("*.safetensors")]
    return [len(data) - 8 - int.from_bytes(data[:8], "little") for data in files if len(data) > 1 << 20]
