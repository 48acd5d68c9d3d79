"""What a run's events come to is the same for who reads them all and for who goes on from what was noted of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from told import BEGIN, KILLED_ONCE, ROWS, at, event

from resumable_trainer.durable.journal import encode_row, read_rows
from resumable_trainer.metrics import account as account_module
from resumable_trainer.metrics.account import NOTED, Account, newest_noted

if TYPE_CHECKING:
    from pathlib import Path


def add(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("ab") as file:
        file.writelines(map(encode_row, rows))


def note(path: Path, account: Account, upto: int, **fields: Any) -> None:
    add(path, {"event": NOTED, **account.noted(upto), **fields})


def known(account: Account, **when: float | None) -> Any:
    """All that is asked of an account."""
    goodput = account.goodput(**when)
    counts = account.interrupted, account.ran_seconds, account.said, account.longest_gap_seconds
    return json.dumps([goodput.to_json(), goodput.seconds, list(goodput.interruptions), *counts])


MOMENTS = st.one_of(st.none(), st.floats(BEGIN, BEGIN + 2000))


@given(
    rows=ROWS, remembered=st.integers(1, 3), noted_after=st.sets(st.integers(0, 30)), late=st.integers(0, 2),
    now=MOMENTS, seen=MOMENTS,
)  # fmt: skip
def test_who_goes_on_from_a_state_that_was_noted_comes_to_the_same_as_who_reads_all(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    remembered: int,
    noted_after: set[int],
    late: int,
    now: float | None,
    seen: float | None,
) -> None:
    """Wherever states are noted, to the last bit; also where others have noted something meanwhile."""
    path = tmp_path_factory.mktemp("run") / "events.jsonl"
    waiting: list[tuple[int, Account, int]] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(account_module, "_REMEMBERED", remembered)
        for number, row in enumerate(rows):
            add(path, row)
            if number in noted_after:
                waiting.append((number + late, *Account.read_up_to(path)))
            while waiting and waiting[0][0] <= number:
                note(path, *waiting.pop(0)[1:], time=row["time"])
        found = Account.read(path)
    whole = Account.of(read_rows(path) if path.exists() else ())
    assert known(found, now=now) == known(whole, now=now)
    assert known(found, seen=seen) == known(whole, seen=seen)


def test_what_lies_behind_a_state_that_was_noted_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    add(path, *KILLED_ONCE[:6])
    note(path, *Account.read_up_to(path))
    add(path, *KILLED_ONCE[6:])
    expected = known(Account.of(KILLED_ONCE))
    assert known(Account.read(path)) == expected
    content = path.read_bytes()
    path.write_bytes(b"damage" + content[6:])
    assert known(Account.read(path)) == expected
    path.write_bytes(content[:-20])
    assert Account.read(path).launches[-1].ended == BEGIN + 60, "a torn last line"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: row.update(version=0),
        lambda row: row.pop("version"),
        lambda row: row.update(upto=row["upto"] - 1),
        lambda row: row.update(upto=10**15),
        lambda row: row.update(upto=-1),
        lambda row: row.update(upto=str(row["upto"])),
        lambda row: row.pop("upto"),
        lambda row: row.update(account=None),
        lambda row: row["account"].pop("ran_seconds") and row["account"].pop("launches") and row.pop("account"),
        lambda row: row["account"].update(launches=[{}]),
        lambda row: row["account"].update(interrupted="often"),
        lambda row: row["account"]["settled"]["seconds"].pop("hung"),
        lambda row: row["account"]["launches"][0].update(began="x"),
        lambda row: row.update(event="odd", other={"event": NOTED}),
    ],
)
def test_a_state_that_cannot_be_gone_on_from_is_passed_over(tmp_path: Path, spoil: Any) -> None:
    """The one before it is taken, and without one all is read."""
    path = tmp_path / "events.jsonl"
    add(path, *KILLED_ONCE[:6])
    account, upto = Account.read_up_to(path)
    for _ in range(2):
        row = {"event": NOTED, **account.noted(upto)}
        spoil(row)
        add(path, row)
        assert newest_noted(path) == (Account(), 0)
    add(path, *KILLED_ONCE[6:])
    assert known(Account.read(path)) == known(Account.of(KILLED_ONCE))
    content = path.read_bytes()
    path.write_bytes(content[:upto])
    note(path, account, upto)
    with path.open("ab") as file:
        file.write(content[upto:])
    assert newest_noted(path)[1] == upto
    assert known(Account.read(path)) == known(Account.of(KILLED_ONCE))


@pytest.mark.parametrize(("resumed", "is_read_whole"), [("s3", True), ("s11", False), ("s12", False)])
def test_a_launch_that_goes_on_from_a_snapshot_that_is_forgotten_has_all_read_again(
    tmp_path: Path, resumed: str, is_read_whole: bool
) -> None:
    path = tmp_path / "events.jsonl"
    add(path, event("launched", 0, generation=1), event("training", 1))
    add(path, *(event("committed", 10 * n, snapshot=f"s{n}", taken=at(10 * n), step=n) for n in range(1, 13)))
    for _ in range(2):  # the second holds no more than the first
        note(path, *Account.read_up_to(path))
    add(path, event("launched", 200, generation=2, previous={"generation": 1, "seen": at(150)}))
    add(path, event("resumed", 201, snapshot=resumed, step=int(resumed[1:])))
    found = Account.read(path)
    assert found.launches[-1].is_abridged is found.launches[0].is_abridged is False or not is_read_whole
    assert found.launches[0].is_abridged is not is_read_whole
    assert found.goodput().seconds["repeated"] == 150 - 10 * int(resumed[1:])
    assert found.goodput().steps_repeated == 12 - int(resumed[1:])


def test_a_snapshot_that_is_taken_again_after_going_back_is_among_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    add(path, event("launched", 0), event("training", 1))
    add(path, *(event("committed", 10 * n, snapshot=f"s{n}") for n in range(1, 13)))
    add(path, event("diverged", 125, action="rollback", back_to="s1"), event("training", 126))
    add(path, event("committed", 130, snapshot="s2"))
    note(path, *Account.read_up_to(path))
    assert list(newest_noted(path)[0].launches[0].taken)[-2:] == ["s12", "s2"]
