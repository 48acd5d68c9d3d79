"""`verify` over the files beside the snapshots."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from small import Small

from resumable_trainer.cli.main import main
from resumable_trainer.durable.journal import encode_row
from resumable_trainer.metrics.account import NOTED, Account

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """With a state of its account noted behind all that has happened."""
    Small().train(tmp_path / "run", epochs=1)
    path = tmp_path / "run/events.jsonl"
    account, upto = Account.read_up_to(path)
    with path.open("ab") as file:
        file.write(encode_row({"event": NOTED, **account.noted(upto)}))
    return tmp_path / "run"


def verify(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object], str]:
    code = main(["verify", str(run)])
    text = capsys.readouterr().out
    assert main(["verify", "--json", str(run)]) == code
    return code, json.loads(capsys.readouterr().out), text


def test_events_that_are_sound_are_said_to_be_and_a_torn_last_line_is_no_damage(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run / "events.jsonl").open("ab") as file:
        file.write(b'{"event":"laun')
    code, fields, text = verify(run, capsys)
    assert (code, fields["valid"], fields["events"]) == (0, True, {"valid": True, "reason": None})
    assert "metrics.jsonl: valid\nevents.jsonl: valid\n" in text


def test_a_damaged_line_that_nobody_has_to_read_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "events.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first.replace(b'"', b"\xff", 1), *others]))
    assert main(["status", str(run)]) == 0, "goes on from what was noted behind it"
    capsys.readouterr()
    code, fields, text = verify(run, capsys)
    assert (code, fields["valid"]) == (65, False)
    assert "events.jsonl: DAMAGED: " in text
    assert "line 1 is damaged" in text


def test_events_without_end_are_damaged_and_not_read_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "events.jsonl").open("ab") as file:
        file.truncate(1 << 40)
    assert main(["verify", str(run)]) == 65
    assert "events.jsonl: DAMAGED: " in capsys.readouterr().out
    (run / "events.jsonl").unlink()
    assert main(["verify", str(run)]) == 0
    assert "events" not in capsys.readouterr().out
