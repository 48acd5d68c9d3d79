"""The comparison with peers: it catches what is known to break, and it knows the calls that peers make."""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import comparison
import ptrace
from lab import Lab, scratch_directory
from model import Model, UnmodelledCallError, materialise
from peers import OWN
from seeded import seeded

if TYPE_CHECKING:
    from collections.abc import Callable

REASON = ptrace.why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(300)]
IN_PLACE, REPLACED = "torch.save, in place", "torch.save, os.replace"


@pytest.fixture(scope="module")
def rows() -> dict[str, comparison.Row]:
    with scratch_directory() as scratch:
        lab = Lab(long=False, seed=5, scratch=scratch)
        found = comparison.compare(lab, names=(IN_PLACE, REPLACED, OWN), effort=comparison.TINY)
    return {row.peer: row for row in found}


def test_a_save_in_place_does_not_survive_a_kill(rows: dict[str, comparison.Row]) -> None:
    assert rows[IN_PLACE].violations("L1") > 0
    assert rows[IN_PLACE].violations("L2") > 0


def test_a_save_that_is_renamed_survives_a_kill_but_not_power_loss(rows: dict[str, comparison.Row]) -> None:
    assert rows[REPLACED].violations("L1") == 0
    assert rows[REPLACED].violations("L3") > 0
    assert rows[REPLACED].tallies["L3"].verdicts["lost"] > 0


def test_torch_load_believes_flipped_bits(rows: dict[str, comparison.Row]) -> None:
    assert rows[REPLACED].violations("L7") > 0


def test_the_package_breaks_nothing(rows: dict[str, comparison.Row]) -> None:
    assert rows[OWN].is_clean, rows[OWN]
    assert all(tally.tried > 5 for tally in rows[OWN].tallies.values())
    assert rows[OWN].tallies["L7"].verdicts.keys() == {"old"}  # damage is passed over, with nothing done by hand


@pytest.mark.parametrize(
    ("fault", "layer"),
    [("written in place", "L1"), ("parent directory not synced", "L3"), ("no digest check", "L7")],
)
def test_the_package_gets_no_zero_as_a_gift(fault: str, layer: str) -> None:
    effort = replace(comparison.TINY, states=replace(comparison.TINY.states, num_states=40))
    with scratch_directory() as scratch, seeded(fault):
        (row,) = comparison.compare(
            Lab(long=False, seed=5, scratch=scratch), names=(OWN,), layers=(layer,), effort=effort
        )
    assert row.violations(layer) > 0
    assert not row.is_clean


def traced(act: Callable[[], object], directory: Path) -> list[ptrace.Call]:
    outcome = ptrace.trace(lambda acknowledge: ptrace.void(act()), under=directory, data=True)
    assert outcome.status == 0, outcome.error
    return outcome.calls


def test_the_model_follows_writes_in_pieces_and_copies_within_the_kernel(tmp_path: Path) -> None:
    source, directory, again = tmp_path / "source", tmp_path / "run", tmp_path / "again"
    source.write_bytes(bytes(range(256)) * 20)
    again.mkdir()

    def act() -> None:
        directory.mkdir()
        taken = os.open(source, os.O_RDONLY)
        fd = os.open(directory / "pieces", os.O_CREAT | os.O_WRONLY)
        os.writev(fd, [b"one ", b"", b"two "])
        os.writev(fd, [b"three"])
        os.sendfile(fd, taken, 7, 3000)
        os.lseek(fd, 5, os.SEEK_SET)
        os.writev(fd, [b"over", b"written"])
        copy = os.open(directory / "copy", os.O_CREAT | os.O_WRONLY)
        os.copy_file_range(taken, copy, 100, 5)
        os.copy_file_range(taken, copy, 300, 0, 50)

    model = Model(tmp_path / "nothing", directory, traced(act, directory))
    materialise(model.disk(model.ops), again)
    for name in ("pieces", "copy"):
        assert (again / "run" / name).read_bytes() == (directory / name).read_bytes()
        assert (directory / name).stat().st_size > 300


def written_through_memory(path: Path) -> None:
    path.write_bytes(bytes(100))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 100) as memory:
        memory[:3] = b"new"


@pytest.mark.parametrize("act", [written_through_memory, lambda path: os.rename(path.parents[1] / "outside", path)])
def test_what_a_trace_cannot_show_is_said_and_not_skipped(act: Callable[[Path], object], tmp_path: Path) -> None:
    base, directory = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    directory.mkdir()
    (tmp_path / "outside").write_text("from outside")
    calls = traced(lambda: act(directory / "file"), directory)
    with pytest.raises(UnmodelledCallError):
        Model(base, directory, calls)


def test_a_peer_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Lightning, TMPDIR on same disk"
    monkeypatch.setitem(sys.modules, "lightning", None)
    with scratch_directory() as scratch:
        lab = Lab(long=False, seed=5, scratch=scratch)
        (row,) = comparison.compare(lab, names=(name,))
    assert "not installed" in str(row.skipped)
    assert f"{name}: not installed here" in comparison.table([row])


def test_the_table_marks_broken_promises_and_is_given_as_json(rows: dict[str, comparison.Row]) -> None:
    broken = comparison.Row(OWN, {"L3": comparison.Tally(Counter(old=1, wrong=2, lost=1))})
    assert "3/4 ! (2 wrong, 1 lost)" in comparison.table([broken])
    assert "!" not in comparison.table([rows[OWN]]).splitlines()[1]
    told = json.loads(comparison.as_json([*rows.values()], Lab(long=False, seed=5, scratch=Path())))
    assert [peer["peer"] for peer in told["peers"]] == [IN_PLACE, REPLACED, OWN]
    assert told["peers"][1]["layers"]["power loss"]["verdicts"]["lost"] > 0
