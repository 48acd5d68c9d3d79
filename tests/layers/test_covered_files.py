"""The files whose branch coverage is held at 100 %."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COVERAGE = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coverage"]


def test_every_file_that_is_measured_is_there() -> None:
    """One that was renamed would drop out of the table without a word."""
    for pattern in COVERAGE["run"]["include"]:
        assert (ROOT / pattern.removeprefix("*/")).is_file(), pattern


def test_all_branches_are_asked_for_and_nothing_but_imports_for_types_is_left_out() -> None:
    assert COVERAGE["run"]["branch"] is True
    assert COVERAGE["report"]["fail_under"] == 100
    assert COVERAGE["report"]["exclude_lines"] == ["if TYPE_CHECKING:"]
