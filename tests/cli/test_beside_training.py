"""Commands that only look, beside a training whose retention goes on; and which run a start means."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from small import Small
from test_commands import command

from resumable_trainer import SnapshotPolicy
from resumable_trainer.cli.main import main
from resumable_trainer.durable.lock import RunLock
from resumable_trainer.snapshot import raw, store
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SCRIPT = """
import sys
from torch import nn
from resumable_trainer import Run
model = nn.Linear(2, 1)
with Run(None, state={"model": model}) as run:
    for epoch in run.epochs(2):
        for step in run.batches(range(2)):
            pass
"""


def run_with_many(directory: Path) -> Path:
    Small().train(directory, epochs=2, snapshots=SnapshotPolicy(keep_last=99, every_steps=2))
    return directory


def first_deleting(doomed: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, before whose first call retention takes a snapshot away."""

    def called(*args: Any, **kwargs: Any) -> Any:
        if doomed.exists():
            Store(doomed.parents[1]).delete(doomed.name)
        return function(*args, **kwargs)

    return called


LOOKING = {
    "list": ["list", "runs/a"],
    "status": ["status", "runs/a"],
    "verify": ["verify", "runs/a"],
    "show": ["show", "runs/a"],
    "diff": ["diff", "runs/a", "runs/a:2"],
    "export": ["export", "runs/a", "-o", "out"],
    "fork": ["fork", "runs/a", "new"],
}


@pytest.mark.parametrize("which", ["oldest", "newest"])
@pytest.mark.parametrize("word", LOOKING)
@pytest.mark.parametrize("at", [(store, "verify"), (store, "read_manifest"), (raw.RawTensorFile, "__init__")])
def test_a_snapshot_that_is_deleted_while_it_is_looked_at_is_no_error_and_no_damage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    word: str,
    which: str,
    at: tuple[Any, str],
) -> None:
    run = run_with_many(tmp_path / "runs" / "a")
    names = Store(run).names()
    doomed = run / "snapshots" / (names[-1] if which == "newest" else names[1])
    place, name = at
    monkeypatch.setattr(place, name, first_deleting(doomed, getattr(place, name)))
    monkeypatch.chdir(tmp_path)
    assert main([*LOOKING[word], "--json"]) == (1 if word == "diff" else 0)
    said = capsys.readouterr()
    assert "DAMAGED" not in said.out
    assert not said.err
    json.loads(said.out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_one_that_was_named_and_is_gone_is_said_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_many(tmp_path / "runs" / "a")
    monkeypatch.setattr(store, "verify", first_deleting(Store(run).path(Store(run).names()[0]), store.verify))
    assert main(["show", str(run), "2"]) == 66
    assert "has no snapshot '2'" in capsys.readouterr().err


def test_another_run_directory_means_another_run_of_the_same_command(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    assert command(tmp_path, "run", "--run-dir", "runs/a", "train.py").returncode == 0
    again = command(tmp_path, "run", "--run-dir", "runs/a", "train.py")
    assert "already finished" in again.stdout
    with RunLock(tmp_path / "runs" / "a" / "run.lock").held_again():  # and it does not matter who holds the first
        other = command(tmp_path, "run", "--run-dir", "runs/b", "train.py")
    assert other.returncode == 0, other.stderr
    assert "finished: 2 epochs" in other.stderr
    assert json.loads(command(tmp_path, "status", "runs/b", "--json").stdout)["state"] == "finished"


@pytest.mark.parametrize("word", ["list", "status", "show", "verify", "prune", "plot", "stop", "resume"])
def test_an_empty_name_and_one_that_cannot_be_are_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    run_with_many(tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    assert main([word, ""]) == 2, "a variable that is not set does not mean the most recent run"
    assert main([word, "x" * 300]) == 66
    assert not capsys.readouterr().out


def test_a_name_that_the_terminal_cannot_show_is_shown_escaped(tmp_path: Path) -> None:
    run_with_many(tmp_path / "n\u00e9")
    found = command(tmp_path, "status", "n\u00e9", PYTHONIOENCODING="ascii")
    assert found.returncode == 0, found.stderr
    assert "run     n\\xe9" in found.stdout
