"""What `diff` finds between snapshots, and that it says no more and no less."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from small import Small

from resumable_trainer import EarlyStopping, SnapshotPolicy, StateManager
from resumable_trainer.cli.main import main
from resumable_trainer.report import difference

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

KEEP_ALL = {"snapshots": SnapshotPolicy(keep_last=99)}


class Values:
    """A part that holds whatever it is given."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state


def save(directory: Path, *, epoch: int = 0, batch: int = 0, step: int = 0, **parts: Any) -> None:
    with StateManager(directory, state=parts) as manager:
        manager.snapshot(epoch=epoch, batch=batch, step=step).wait()


def diff(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["diff", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def section(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(s for s in found["sections"] if s["name"] == name)


def test_two_runs_of_the_same_training_are_the_same_though_their_lineage_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        Small().train(tmp_path / name)
    code, found = diff(capsys, tmp_path / "a", tmp_path / "b")
    assert (code, found["same"], found["facts"]) == (0, True, [])
    assert found["rows"] == {"a": 15, "b": 15, "is_same": True, "first_different": None}
    assert all(s["same"] for s in found["sections"])
    assert {"run_id", "created"} <= {change["place"] for change in found["lineage"]}
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.endswith("the same state, metrics and position\n")


def test_two_snapshots_of_one_run_differ_in_what_was_trained_between_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Small().train(tmp_path / "a", early_stopping=EarlyStopping("test_accuracy", patience=9), **KEEP_ALL)
    code, found = diff(capsys, f"{tmp_path}/a:epoch:1", "best")
    assert (code, found["a"]["snapshot"], found["b"]["snapshot"]) == (
        1, "step-000000004-epoch-000001", "step-000000012-epoch-000003",
    )  # fmt: skip
    facts = {change["place"]: (change.get("a"), change.get("b")) for change in found["facts"]}
    assert facts["position.epoch"] == (1, 3)
    assert facts["metrics.test_accuracy"] == (0.0, 2.0)
    assert facts["outcome"] == (None, "finished")
    assert not any(place.startswith(("settings", "depends_on")) for place in facts)
    assert found["rows"] == {"a": 5, "b": 15, "is_same": False, "first_different": 6}
    weights = [load_file(f"{found[side]['path']}/model.safetensors")["0.weight"] for side in "ab"]
    weight = next(t for t in section(found, "model")["tensors"] if t["place"] == "0.weight")
    assert (weight["a"], weight["b"], weight["elements"]) == ("F32[4, 3]", "F32[4, 3]", 12)
    assert weight["distance"] == {
        "differing": int((weights[0] != weights[1]).sum()),
        "largest": (weights[0].double() - weights[1].double()).abs().max().item(),
        "not_finite": 0,
    }
    assert {t["place"].partition(".")[0] for t in section(found, "generators")["tensors"]} <= {"torch", "python"}
    assert section(found, "modes")["same"]


def test_the_largest_difference_and_the_number_of_elements_are_those_of_the_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(difference, "_PIECE_ELEMENTS", 7)  # so that the difference lies in a later piece
    a, b = torch.zeros(4, 5), torch.zeros(4, 5)
    b[3, 4], b[0, 0] = -2.5, 1.0
    tied = torch.ones(3)
    save(tmp_path / "a", x=Values(t=a, same=tied, tied=tied, wide=torch.ones(2), cast=torch.ones(2)))
    save(tmp_path / "b", x=Values(t=b, same=tied, tied=tied, wide=torch.ones(3), cast=torch.ones(2).bfloat16()))
    code, found = diff(capsys, tmp_path / "a", tmp_path / "b")
    tensors = {t["place"]: t for t in section(found, "x")["tensors"]}
    assert code == 1
    assert tensors.keys() == {"t", "wide", "cast"}
    assert tensors["t"]["distance"] == {"differing": 2, "largest": 2.5, "not_finite": 0}
    assert (tensors["wide"]["a"], tensors["wide"]["b"], tensors["wide"]["distance"]) == ("F32[2]", "F32[3]", None)
    assert (tensors["cast"]["a"], tensors["cast"]["b"]) == ("F32[2]", "BF16[2]")
    assert tensors["cast"]["distance"]["differing"] == 0
    assert section(found, "x")["num_tensors"] == 5
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    text = capsys.readouterr().out
    assert "x: 3 of 5 tensors differ, in 2 elements" in text
    assert "2 of 20" in text
    assert "F32[2] -> F32[3]" in text


def test_values_are_compared_to_the_bit_and_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = {"n": None, "t": (1, 2), "d": {3: "x"}}
    save(tmp_path / "a", x=Values(**same, zero=0.0, kind=1, gone=True, long=[1, 2], keys={1: 5}), y=Values())
    save(tmp_path / "b", x=Values(**same, zero=-0.0, kind=1.0, new="z", long=[1, 2, 3], keys={1: 6}), z=Values())
    code, found = diff(capsys, tmp_path / "a", tmp_path / "b")
    values = {v["place"]: {k: w for k, w in v.items() if k != "place"} for v in section(found, "x")["values"]}
    assert code == 1
    assert values == {
        "zero": {"a": 0.0, "b": -0.0},
        "kind": {"a": 1, "b": 1.0},
        "gone": {"a": True},
        "new": {"b": "z"},
        "long.2": {"b": 3},
        "keys.1": {"a": 5, "b": 6},
    }
    assert (section(found, "y")["only_in"], section(found, "z")["only_in"]) == ("a", "b")


def test_a_snapshot_is_named_by_run_step_epoch_or_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Small().train(tmp_path / "runs" / "a", **KEEP_ALL)
    path = "runs/a/snapshots/step-000000004-epoch-000001"
    for words in ("4", ":4", "epoch:1", "runs/a:4", "runs/a:epoch:1", path, f"{tmp_path}/{path}/"):
        code, found = diff(capsys, path, words)
        assert (code, found["b"]["snapshot"]) == (0, "step-000000004-epoch-000001"), words
    assert diff(capsys, "runs/a", "latest")[0] == 0
    for words in ("7", "runs/b", "runs/b:4", "runs/a:7", "best"):
        assert main(["diff", "runs/a", words]) == 66, words
        assert "Traceback" not in capsys.readouterr().err


def test_a_damaged_snapshot_is_not_compared_and_latest_is_the_newest_that_verifies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Small().train(tmp_path / "a", **KEEP_ALL)
    victim = tmp_path / "a/snapshots/step-000000012-epoch-000003/model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    assert main(["diff", str(victim.parent), str(tmp_path / "a")]) == 65
    assert "model.safetensors has" in capsys.readouterr().err
    assert main(["diff", f"{tmp_path}/a:8", str(tmp_path / "a")]) == 0
    assert "passed over step-000000012-epoch-000003: model.safetensors has" in capsys.readouterr().out
