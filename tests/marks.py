"""Parameters of tests of which one or some stand for all by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from _pytest.mark.structures import ParameterSet


def by_default(usual: Collection[str], names: Iterable[str]) -> list[ParameterSet]:
    """All names; those that are not usual are tested by `scripts/test --long` only."""
    return [pytest.param(name, marks=() if name in usual else pytest.mark.long) for name in names]
