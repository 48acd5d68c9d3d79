"""Running averages: the mean of each step metric over the epoch under way.

Weighted by the samples of each batch, so that a short last batch counts for what it holds and the
mean is comparable with a test metric measured over a whole set. Sums are kept in float64 and added
in the order of the batches: continued after a resume, they give the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class RunningAverages:
    """Weighted sums by metric name; cost: an addition per value."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, int] = {}

    def add_column(self, name: str, values: Sequence[float], weights: Sequence[int]) -> None:
        """Add one metric's values of several batches, one after the other."""
        total = self._sums.get(name, 0.0)
        for value, weight in zip(values, weights, strict=True):
            total += float(value) * weight
        self._sums[name] = total
        self._weights[name] = self._weights.get(name, 0) + sum(weights)

    def means(self) -> dict[str, float]:
        """The mean of each metric so far, in the order in which they first came."""
        return {name: total / self._weights[name] for name, total in self._sums.items() if self._weights[name]}

    def clear(self) -> None:
        """Forget everything: a new epoch begins."""
        self._sums.clear()
        self._weights.clear()

    def state_dict(self) -> dict[str, list[list[object]]]:
        """Plain values that `load_state_dict` takes back exactly."""
        return {"sums": [[name, total, self._weights[name]] for name, total in self._sums.items()]}

    def load_state_dict(self, state: Mapping[str, list[list[object]]]) -> None:
        """Continue where `state_dict` was taken."""
        self.clear()
        for name, total, weight in state["sums"]:
            assert isinstance(name, str)
            assert isinstance(total, float)
            assert isinstance(weight, int)
            self._sums[name] = total
            self._weights[name] = weight
