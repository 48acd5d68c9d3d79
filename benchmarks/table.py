"""The table: rows of ratios with their goals, as text, Markdown and JSON.

A ratio is formed round by round from measurements taken next to each other, and then the median and the quartiles of
the rounds are shown: what disturbs the machine for a minute disturbs both sides of a round.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# How the two sides of a row are compared: ours / theirs, theirs / ours, ours - theirs.
Comparison = Literal["ratio", "times faster", "difference"]
_MARGINS = {"ratio": "", "times faster": " x", "difference": " s"}


@dataclass(frozen=True)
class Goal:
    """What a row must show.

    Attributes:
        limit: The number.
        at_least: Whether it is the least that is wanted, not the most.
    """

    limit: float
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        """Whether a measured value is good enough; exactly, nothing rounded in its favour."""
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Side:
    """One side of a row.

    Attributes:
        name: What was measured.
        values: One for each round.
        unit: "s" or "B"; "" for plain numbers.
        durability: What its saves had reached when they were called done: "none", "page cache", "synced",
            "synced and verified" (synced, and checked by digest when it is read); "" where nothing is saved.
        exact: Whether it resumes exactly; None where that is not the question, or is not known.
    """

    name: str
    values: tuple[float, ...]
    unit: str = "s"
    durability: str = ""
    exact: bool | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        group: The group of measurements that it belongs to.
        what: What was done.
        ours: Our side; None if nothing could be measured.
        theirs: What it is held against; None for a measurement that stands alone.
        comparison: How.
        goal: What it must show; None for a line that informs.
        bound: The part of our side that nobody can do without, measured in the same rounds; None if it is not known.
        skipped: Why nothing could be measured; None if it was.
        note: What a reader must know to read it right.
    """

    group: str
    what: str
    ours: Side | None = None
    theirs: Side | None = None
    comparison: Comparison = "ratio"
    goal: Goal | None = None
    bound: Side | None = None
    skipped: str | None = None
    note: str = ""

    @property
    def spread(self) -> Spread | None:
        """Of what is compared, round by round; None where there are not two sides."""
        return self._compared(self.ours)

    @property
    def at_best(self) -> float | None:
        """What would be measured if our side were as fast as its bound; None where no bound is known."""
        spread = self._compared(self.bound)
        return None if spread is None else spread.median

    def _compared(self, side: Side | None) -> Spread | None:
        if side is None or self.theirs is None:
            return None
        compare = _COMPARE[self.comparison]
        return Spread.of([compare(a, b) for a, b in zip(side.values, self.theirs.values, strict=True)])

    @property
    def verdict(self) -> str:
        """`met`, `NOT met`, `not measured`, or nothing where there is no goal."""
        if self.goal is None:
            return ""
        if self.spread is None:
            return "not measured"
        return "met" if self.goal.is_met(self.spread.median) else "NOT met"

    @property
    def is_beyond_bound(self) -> bool:
        """Whether not even the bound meets the goal."""
        return self.goal is not None and self.at_best is not None and not self.goal.is_met(self.at_best)


def _over(a: float, b: float) -> float:
    return a / b if b else float("inf")


_COMPARE: dict[str, Callable[[float, float], float]] = {
    "ratio": _over,
    "times faster": lambda ours, theirs: _over(theirs, ours),
    "difference": lambda ours, theirs: ours - theirs,
}


@dataclass
class Report:
    """All rows of a run, and where they were measured.

    Attributes:
        facts: Machine, versions, options, load: names and values as they are to be shown.
        rows: In the order in which they were measured.
    """

    facts: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def text(self) -> str:
        """For a terminal."""
        facts = [f"{name:<12} {value}" for name, value in self.facts.items()]
        cells = [_HEADER, *map(_cells, self.rows)]
        widths = [max(len(line[place]) for line in cells) for place in range(len(_HEADER))]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        return "\n".join([*facts, "", *lines, "", *_notes(self.rows), *_LEGEND, self.summary()])

    def markdown(self) -> str:
        """For `bench-results.md`."""
        facts = [f"- {name}: {value}" for name, value in self.facts.items()]
        lines = [_HEADER, tuple("---" for _ in _HEADER), *map(_cells, self.rows)]
        table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        notes = [f"- {line}" for line in [*_notes(self.rows), *_LEGEND]]
        head = ["# Results of scripts/bench", "", "Written by `scripts/bench --write`, never by hand.", ""]
        return "\n".join([*head, *facts, "", *table, "", *notes, "", self.summary(), ""])

    def to_json(self) -> dict[str, Any]:
        """Every single measurement."""
        return {"facts": self.facts, "rows": [_row_json(row) for row in self.rows]}

    def summary(self) -> str:
        """How many goals are met."""
        verdicts = [row.verdict for row in self.rows if row.goal is not None]
        counts = [f"{verdicts.count(word)} {word}" for word in ("met", "NOT met", "not measured")]
        beyond = sum(row.verdict == "NOT met" and row.is_beyond_bound for row in self.rows)
        return f"{len(verdicts)} goals: {', '.join(counts)}; of those not met {beyond} are out of reach even at best"


_HEADER = (
    *("group", "what", "ours", "against", "theirs", "measured", "quartiles", "goal", "", "at best"),
    "saved: ours / theirs",
)
_LEGEND = (
    "ours, theirs: medians. measured: median over the rounds of ours / theirs; of theirs / ours where it says x;"
    " of ours - theirs where it says s. quartiles: of the same.",
    "at best: the same with the named part of our side's work, which nobody can do without, in place of our side.",
    "saved: what a save had reached when it counted as done; (inexact): measured, a resumed run ends in other bits.",
)


def _cells(row: Row) -> tuple[str, ...]:
    spread, ours, theirs = row.spread, row.ours, row.theirs
    measured = quartiles = ""
    if spread is not None:
        measured = _number(spread.median) + _MARGINS[row.comparison]
        quartiles = f"{_number(spread.low)} to {_number(spread.high)}"
    elif ours is not None:
        alone = Spread.of(ours.values)
        quartiles = f"{quantity(alone.low, ours.unit)} to {quantity(alone.high, ours.unit)}"
    return (
        row.group,
        row.what,
        "-" if ours is None else quantity(Spread.of(ours.values).median, ours.unit),
        "" if theirs is None else theirs.name,
        "" if theirs is None else quantity(Spread.of(theirs.values).median, theirs.unit),
        measured if row.skipped is None else f"skipped: {row.skipped}",
        quartiles,
        _goal(row),
        row.verdict,
        _at_best(row),
        _saved(ours, theirs),
    )


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    words = "at least" if row.goal.at_least else "at most"
    return f"{words} {row.goal.limit:.3g}{_MARGINS[row.comparison]}"


def _at_best(row: Row) -> str:
    if row.at_best is None or row.bound is None:
        return ""
    return f"{_number(row.at_best)}{_MARGINS[row.comparison]} ({row.bound.name})"


def _saved(ours: Side | None, theirs: Side | None) -> str:
    sides = [
        "-" if side is None or not side.durability else side.durability + (" (inexact)" if side.exact is False else "")
        for side in (ours, theirs)
    ]
    return "" if sides == ["-", "-"] else " / ".join(sides)


def _notes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(f"{row.group}: {row.what}: {row.note}" for row in rows if row.note))


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def quantity(value: float, unit: str) -> str:
    """A measured value with the unit that suits its size."""
    if unit == "s":
        for factor, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
            if abs(value) >= factor or name == "us":
                return f"{value / factor:.3g} {name}"
    if unit == "B":
        for factor, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")):
            if abs(value) >= factor or name == "B":
                return f"{value / factor:.3g} {name}"
    return f"{value:.3g}"


def _row_json(row: Row) -> dict[str, Any]:
    spread = row.spread
    return {
        "group": row.group,
        "what": row.what,
        "comparison": row.comparison,
        "ours": _side_json(row.ours),
        "theirs": _side_json(row.theirs),
        "measured": None if spread is None else {"median": spread.median, "low": spread.low, "high": spread.high},
        "goal": None if row.goal is None else {"limit": row.goal.limit, "at_least": row.goal.at_least},
        "verdict": row.verdict,
        "bound": _side_json(row.bound),
        "at_best": row.at_best,
        "skipped": row.skipped,
        "note": row.note,
    }


def _side_json(side: Side | None) -> dict[str, Any] | None:
    return None if side is None else {**vars(side), "values": list(side.values)}
