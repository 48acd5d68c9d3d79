"""History: the metric journal as columns by name.

A view over rows that are already on disk (or about to be): reading costs one pass over the
journal and happens only when asked for, never while training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.journal import read_rows
from resumable_trainer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

POSITION_COLUMNS = ("row", "step", "epoch", "batch")
_SPECIAL_FLOATS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


class History:
    """Rows of a run's metric journal, oldest first.

    Args:
        rows: Dictionaries with `"row"` (`"step"` or `"epoch"`), `"step"`, `"epoch"`, `"batch"` and values.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows = [_with_special_floats(row) for row in rows]

    @classmethod
    def read(cls, path: Path) -> History:
        """The history in a `metrics.jsonl`; empty where there is none yet."""
        return cls(read_rows(path)) if path.exists() else cls([])

    def __len__(self) -> int:
        return len(self._rows)

    def names(self, row: str) -> list[str]:
        """Metric names in the rows of one kind (`"step"` or `"epoch"`), in order of appearance."""
        found: dict[str, None] = {}
        for record in self._of(row):
            found.update(dict.fromkeys(record))
        return [name for name in found if name not in POSITION_COLUMNS]

    def steps(self, name: str) -> list[float]:
        """One value per training batch that logged `name`; also `"step"`, `"epoch"`, `"batch"`."""
        return self._column("step", name)

    def epochs(self, name: str) -> list[float]:
        """One value per epoch row that holds `name`: means of the step metrics, and what was logged."""
        return self._column("epoch", name)

    def to_records(self) -> list[dict[str, Any]]:
        """All rows as dictionaries, as `pandas.DataFrame.from_records` takes them."""
        return [dict(record) for record in self._rows]

    def plot(self, path: str | Path, *, title: str | None = None) -> Path:
        """Draw every metric over the epochs into a PNG, SVG or PDF (needs the extra `[plot]`)."""
        from resumable_trainer.metrics.plot import draw

        return draw(self, path, title=title)

    def _of(self, row: str) -> Iterable[dict[str, Any]]:
        return (record for record in self._rows if record["row"] == row)

    def _column(self, row: str, name: str) -> list[float]:
        values = [record[name] for record in self._of(row) if name in record]
        if not values and self._rows and name not in POSITION_COLUMNS:
            raise UsageError(
                f"history: no {row} row holds {name!r}",
                found=name,
                expected=self.names(row),
                hint=f"{row} rows hold: {', '.join(self.names(row)) or 'nothing yet'}",
            )
        return values


def _with_special_floats(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinities; the journal writes them as strings."""
    for name, value in row.items():
        if name != "row" and isinstance(value, str):
            row[name] = _SPECIAL_FLOATS[value]
    return row
