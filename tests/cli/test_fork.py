"""Forks and moved runs from the command line, each command a process of its own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from test_commands import command, listing, write_script

if TYPE_CHECKING:
    from pathlib import Path


def test_fork_resume_and_move(tmp_path: Path) -> None:
    """One story, as starting a training costs seconds."""
    write_script(tmp_path)
    assert command(tmp_path, "run", "train.py").returncode == 0
    before = listing(tmp_path / "runs/mine")

    forked = command(
        tmp_path, "fork", "runs/mine", "runs/fork", "--from", "epoch:1", "--json", PYTHONPROFILEIMPORTTIME="1"
    )
    assert forked.returncode == 0, forked.stderr
    assert "| torch" not in forked.stderr
    assert json.loads(forked.stdout)["snapshot"] == "step-000000004-epoch-000001"
    assert command(tmp_path, "fork", "runs/mine", "runs/fork").returncode == 2
    assert command(tmp_path, "fork", "runs/mine", "runs/other", "--from", "5").returncode == 66
    status = json.loads(command(tmp_path, "status", "runs/fork", "--json").stdout)
    assert (status["state"], status["step"]) == ("interrupted", 4)
    assert status["forked_from"]["snapshot"] == "step-000000004-epoch-000001"
    assert "origin  forked from step-000000004-epoch-000001 of " in command(tmp_path, "status", "runs/fork").stdout
    assert "origin    forked from step-" in command(tmp_path, "show", "runs/fork").stdout
    assert json.loads(command(tmp_path, "show", "runs/fork", "--json").stdout)["forked_from"] == status["forked_from"]

    # The script names runs/mine: `resume` leads it to the fork, also the second time, and after a move.
    resumed = command(tmp_path, "resume", "runs/fork")
    assert resumed.returncode == 0, resumed.stderr
    assert "resume  step-000000004-epoch-000001" in resumed.stderr
    assert listing(tmp_path / "runs/mine") == before
    assert json.loads(command(tmp_path, "status", "runs/fork", "--json").stdout)["state"] == "finished"
    same = command(tmp_path, "diff", "runs/mine", "runs/fork")
    assert same.returncode == 0, same.stdout

    (tmp_path / "runs/fork").rename(tmp_path / "runs/moved")
    for epochs in (4, 5):
        write_script(tmp_path, epochs=epochs)
        assert command(tmp_path, "resume", "runs/moved").returncode == 0
        assert json.loads(command(tmp_path, "status", "runs/moved", "--json").stdout)["epoch"] == epochs
    assert listing(tmp_path / "runs/mine") == before
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mine", "moved"]

    # The plain command goes to the run that the script names, whatever else came from it.
    write_script(tmp_path, epochs=3)
    again = command(tmp_path, "run", "--relaunch", "train.py")
    assert again.returncode == 0, again.stderr
    assert "step-000000012-epoch-000003" in again.stderr
