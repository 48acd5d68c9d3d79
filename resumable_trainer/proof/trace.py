"""What a trial's run told on its way, and where two traces part. Pure, and free of torch.

A trace is a file of JSON lines, appended to by the trial and its workers; a kill leaves whole lines.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LENGTH = ".__len__()"
"""How long a container is, as a path in it."""
ITEMS = ".items()"
"""What a long container holds here and there, as a path in it."""

Key = tuple[str, int, int, int]
"""Place, epochs finished, batches finished in the epoch, how many times before with these counts."""


@dataclass(frozen=True)
class Moment:
    """A place of a run, and what could be seen there.

    Attributes:
        key: Which.
        seconds: Since the run was let go from the moment before; the looking itself does not count.
        data: Digest of the batch about to be given; None where there is none.
        samples: Digests of its samples; empty if it does not tell them apart.
        state: Digest by "section/name" of everything that a snapshot would hold.
        variables: (kind, digest) by path of what the user's code holds beside the parts.
    """

    key: Key
    seconds: float
    data: str | None = None
    samples: tuple[str, ...] = ()
    state: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The place, for people."""
        place, epoch, batch, _ = self.key
        return {
            "batch": f"before batch {batch + 1} of epoch {epoch + 1}",
            "batches": f"after the last batch of epoch {epoch + 1}",
            "evaluating": f"in the evaluation of epoch {epoch + 1}",
            "logged": f"after the evaluation of epoch {epoch + 1}",
            "epoch": f"at the end of epoch {epoch}",
        }[place]


@dataclass
class Trace:
    """What one trial, or a chain of them, has told.

    Attributes:
        moments: In order.
        opened: One entry for each launch: "resumed_from", "variables", "seconds", "drawn", ....
        facts: Everything else that was said once, by name.
        calls: Places in the user's code that read a clock or list a directory, by function.
    """

    moments: list[Moment] = field(default_factory=list)
    opened: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    calls: dict[str, list[str]] = field(default_factory=dict)

    def followed_by(self, later: Trace) -> Trace:
        """Both, the later one as the next launch of a chain."""
        return Trace(
            self.moments + later.moments,
            self.opened + later.opened,
            {**self.facts, **later.facts},
            {name: [*self.calls.get(name, []), *later.calls.get(name, [])] for name in {**self.calls, **later.calls}},
        )

    def by_key(self) -> dict[Key, Moment]:
        """Its moments; of one met several times the first."""
        found: dict[Key, Moment] = {}
        for moment in self.moments:
            found.setdefault(moment.key, moment)
        return found


def plain_path(path: str) -> str:
    """The variable that a path leads to, without what was looked at in it."""
    return path.removesuffix(LENGTH).removesuffix(ITEMS)


def read_trace(path: Path) -> Trace:
    """Read what a trial has written; nothing if it never came to that."""
    trace = Trace()
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        kind = row.pop("row")
        if kind == "moment":
            trace.moments.append(_moment(row))
        elif kind == "opened":
            trace.opened.append(row)
        elif kind == "call":
            trace.calls.setdefault(row["function"], []).append(row["where"])
        else:
            trace.facts[kind] = row["value"]
    return trace


def _moment(row: dict[str, Any]) -> Moment:
    place, epoch, batch, number = row.pop("key")
    variables = {path: (kind, digest) for path, (kind, digest) in row.pop("variables", {}).items()}
    samples = tuple(row.pop("samples", ()))
    return Moment((place, epoch, batch, number), samples=samples, variables=variables, **row)


@dataclass(frozen=True)
class Divergence:
    """The first moment at which a trace is not what it should be.

    Attributes:
        moment: As it was.
        expected: As it should have been; None if the undisturbed run never came there.
        data: Whether another batch was given.
        state: Names of the state that differ.
    """

    moment: Moment
    expected: Moment | None
    data: bool
    state: tuple[str, ...]


def first_difference(trace: Trace, expected: Trace) -> Divergence | None:
    """Where a trace is not as expected; None if every moment of it is."""
    wanted = expected.by_key()
    return next((found for m in trace.moments if (found := compare(m, wanted.get(m.key))) is not None), None)


def cut_short(trace: Trace, expected: Sequence[Moment]) -> Divergence | None:
    """The first of the expected moments that a run never came to (early stopping, data that ran out); None: all met."""
    met = trace.by_key()
    missing = next((moment for moment in expected if moment.key not in met), None)
    return None if missing is None else Divergence(missing, None, data=False, state=())


def compare(moment: Moment, expected: Moment | None) -> Divergence | None:
    """What differs between two moments with the same key; None if nothing does."""
    if expected is None:
        return Divergence(moment, None, data=False, state=())
    names = dict.fromkeys([*expected.state, *moment.state])
    state = tuple(name for name in names if moment.state.get(name) != expected.state.get(name))
    data = moment.data != expected.data
    return Divergence(moment, expected, data=data, state=state) if data or state else None


def pairs_part_at(one: Trace, other: Trace) -> int | None:
    """How many moments two traces of the same start share before they part; None if they never do."""
    for number, (a, b) in enumerate(zip(one.moments, other.moments, strict=False)):
        if a.key != b.key or compare(a, b) is not None:
            return number
    shorter = min(len(one.moments), len(other.moments))
    return None if len(one.moments) == len(other.moments) else shorter


def same_samples_in_another_order(divergence: Divergence, expected: Trace) -> bool:
    """Whether the samples of a wrong batch are known from other batches of the undisturbed run."""
    known = {sample for moment in expected.moments for sample in moment.samples}
    found = divergence.moment.samples
    return bool(found) and divergence.data and sum(sample in known for sample in found) * 2 > len(found)


def longest_gap_seconds(trace: Trace) -> float:
    """The longest time between two places at which a notice is followed."""
    longest = since = 0.0
    for moment in trace.moments:
        since += moment.seconds
        if moment.key[0] != "logged":
            longest, since = max(longest, since), 0.0
    return longest
