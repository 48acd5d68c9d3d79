"""Files from an enemy are refused in words of ours, or do no harm (L8, short form)."""

from __future__ import annotations

import os
import random
import subprocess
from typing import TYPE_CHECKING

import hostile_files
import pytest
from hostile_files import Watch, all_cases, in_child
from lab import Count, Lab, scratch_directory

from resumable_trainer.snapshot import tree, verify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(900)
# Each was wrong once.
FOUND = (
    "header of 18446744073709551615 bytes, it says",
    "header is bytes that are no text",
    "generation 10^3000",
    "step 10^3000",
    "another position than its name says",
    "a metric that is a word",
    "format 1.0",
    "$enum 6: ['numpy', 'f2py.crackfortran', 'x']",
    "$timedelta 0: [1000000000000000000]",
    "$npscalar 0: []",
    "generators 2: {}",
    "gradients 2: {}",
    "state.json is a terabyte, and listed so",
    "run.json is a FIFO",
    "run.json is a terabyte of nothing",
    "events.jsonl is a terabyte of nothing",
    "metrics.jsonl is a FIFO",
    'event 6: b\'{"event":"finished"}\\n\'',
)
STARTS = ("$set 5", "$dict 7", "$float 3", "$deque 1", "$tensor 34", "$ndarray 5", "lists 'xxx", "identity 9")


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory() as directory:
        yield directory


def numbers_of(*names: str) -> list[int]:
    found = [number for number, case in enumerate(all_cases()) if case.name in names or case.name.startswith(STARTS)]
    assert {all_cases()[number].name for number in found} >= set(names)
    return found


def test_there_are_hundreds_of_them_and_no_two_are_the_same() -> None:
    names = [(case.group, case.name) for case in all_cases()]
    assert len(set(names)) == len(names) >= 800


def test_none_of_a_drawn_sample_does_harm(scratch: Path) -> None:
    count = hostile_files.run(Lab(long=False, seed=random.randrange(2**32), scratch=scratch))
    assert count.violations == []
    assert count.tried > 100


def test_those_that_did_harm_once_do_none(scratch: Path) -> None:
    numbers = numbers_of(*FOUND)
    count = hostile_files.open_all(scratch, numbers)
    assert count.violations == []
    assert count.tried == len(numbers)


def opened(scratch: Path, name: str) -> list[str]:
    """Violations of one case, with whatever has been changed in this process."""
    hostile_files.make_sound(scratch)
    (number,) = (number for number, case in enumerate(all_cases()) if case.name == name)
    found: Count = hostile_files.judge(scratch, number)
    return found.violations


def test_a_reader_that_follows_links_is_found_out(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seeded import seeded

    with seeded("links followed"):
        broken = opened(scratch, "state.json is a link to a copy outside")
    assert any("should have been refused" in line for line in broken)


def test_a_verdict_without_the_manifest_s_digests_is_found_out(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "verify_file", lambda path, name, entry: None)
    assert opened(scratch, "100,000 files that are not there")


def test_a_door_that_never_opens_is_found_out(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile_files.make_sound(scratch)
    monkeypatch.setattr(hostile_files, "CPU_SECONDS", 1)
    monkeypatch.setattr(verify, "verify_file", lambda path, name, entry: all(iter(lambda: True, False)))
    assert hostile_files.judge(scratch, 0).violations[0].endswith("a door took more than 1 s of CPU")


def test_an_enum_that_is_imported_is_found_out(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.setitem(tree._DECODERS, "$enum", lambda reader, encoded: importlib.import_module(encoded[0]))
    assert any("on the side: import" in line for line in opened(scratch, "$enum 9: ['antigravity', 'Comic', 'x']"))


@pytest.mark.parametrize(
    ("deed", "seen"),
    [
        (lambda run: subprocess.run(["true"]), "subprocess.Popen"),
        (lambda run: (run.parent / "new").touch(), "open"),
        (lambda run: os.mkdir(run.parent / "new"), "os.mkdir"),
        (lambda run: os.kill(os.getppid(), 18), "os.kill"),
        (lambda run: (run / "..").joinpath("new").write_text("x"), "open"),
        (lambda run: (run / "new").touch(), None),
        (lambda run: os.kill(os.getpid(), 0), None),
        (lambda run: [].append(bytearray(8 << 30)), "MemoryError"),
        (lambda run: os.kill(os.getpid(), 9), "ended with status -9"),
    ],
)
def test_what_a_file_might_bring_about_is_seen(tmp_path: Path, deed: object, seen: str | None) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = in_child(lambda: [deed(run)][:0], tmp_path)  # type: ignore[operator]
    assert bool(lines) == (seen is not None)
    assert seen is None or any(seen in line for line in lines), lines


def test_the_hook_is_quiet_once_it_is_off(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.is_on = False
    watch("os.system", ("x",))
    assert watch.seen == []
