"""Each job killed a few times; `scripts/kill_campaign.py` does the same hundreds of times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import endings
import jobs
import pytest
import torch
from torch import nn

from resumable_trainer import Run, SnapshotPolicy

CAMPAIGN = Path(__file__).resolve().parents[2] / "scripts" / "kill_campaign.py"


@pytest.mark.long  # scripts/test runs a longer one by itself
@pytest.mark.timeout(600)
def test_a_short_campaign_over_all_jobs_finds_no_difference() -> None:
    command = [sys.executable, str(CAMPAIGN), "--kills", "21", "--fresh", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 differences" in done.stdout


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    jobs.by_loader(str(tmp_path / "none"))
    jobs.by_loader_with_workers(str(tmp_path / "two"))
    assert endings.differing(endings.ending(tmp_path / "none"), endings.ending(tmp_path / "two")) == []


def test_a_training_that_leaks_is_found_to_differ(tmp_path: Path) -> None:
    """The comparison can fail: a value that lives in the script alone is lost by a resume."""

    def train(directory: Path, kill: int | None = None) -> None:
        torch.manual_seed(0)
        model, leak = nn.Linear(2, 1), 1.0
        policy = SnapshotPolicy(every_steps=1)
        with Run(directory, state={"model": model}, snapshots=policy, progress=False) as run:
            for _ in run.epochs(1):
                for _ in run.batches(range(6)):
                    leak *= 0.9
                    with torch.no_grad():
                        model.weight.mul_(leak)
                    if run.step == kill:
                        raise KeyboardInterrupt

    train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", 3)
    train(tmp_path / "run")
    differing = endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run"))
    assert "model.safetensors" in differing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_resumes_exactly(tmp_path: Path) -> None:
    def train(directory: Path, kill: int | None = None) -> None:
        model = jobs.network().cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        data = tuple(tensor.cuda() for tensor in jobs.table(96))
        policy = SnapshotPolicy(every_steps=2)
        state = {"model": model, "optimizer": optimizer}
        with Run(directory, state=state, snapshots=policy, progress=False) as run:
            for _ in run.epochs(3):
                for inputs, labels in run.batches(data, batch_size=8, shuffle=True):
                    optimizer.zero_grad()
                    loss = nn.functional.binary_cross_entropy(model(inputs), labels)
                    loss.backward()
                    optimizer.step()
                    run.log(loss=loss)
                    if run.step == kill:
                        raise KeyboardInterrupt

    train(tmp_path / "whole")
    for kill in (5, 17, 30):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", kill)
    train(tmp_path / "run")
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []
