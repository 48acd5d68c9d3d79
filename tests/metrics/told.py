"""Events of runs: of one that was killed once, and any at all."""

from __future__ import annotations

import datetime
from typing import Any

from hypothesis import strategies as st

BEGIN = 1_800_000_000.0


def at(second: float) -> str:
    return datetime.datetime.fromtimestamp(BEGIN + second, datetime.UTC).isoformat(timespec="milliseconds")


def event(kind: str, second: float, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": at(second), **fields}


KILLED_ONCE = [
    event("launched", 5, started=at(2), generation=1, previous=None),
    event("training", 10, step=0),
    event("committed", 21, snapshot="a", taken=at(20), stall_seconds=0.5, step=100),
    event("launched", 45, started=at(40), generation=2, previous={"generation": 1, "step": 150, "seen": at(30)}),
    event("resumed", 46, snapshot="a", step=100),
    event("training", 50, step=100),
    event("committed", 60, snapshot="b", taken=at(58), stall_seconds=0.25, step=200),
    event("finished", 60, outcome="finished", step=200),
    event("exited", 61, code=0),
]

_PLAIN = st.one_of(
    st.none(), st.integers(-5, 300), st.floats(), st.text(max_size=4), st.sampled_from(["a", "b", "hang"])
)
ROWS = st.lists(
    st.builds(
        lambda kind, second, fields: {"event": kind, "time": second if second is None else at(second), **fields},
        st.sampled_from(
            [
                "launched",
                "training",
                "resumed",
                "committed",
                "diverged",
                "preempted",
                "failed",
                "finished",
                "exited",
                "ended",
                "paced",
                "pruned",
                "odd",
            ]
        ),
        st.one_of(st.none(), st.floats(0, 1000)),
        st.dictionaries(
            st.sampled_from(
                [
                    "step",
                    "snapshot",
                    "taken",
                    "started",
                    "stall_seconds",
                    "leaving_seconds",
                    "code",
                    "result",
                    "action",
                    "outcome",
                    "longest_gap_seconds",
                    "back_to",
                    "generation",
                    "previous",
                ]
            ),
            st.one_of(
                _PLAIN,
                st.floats(0, 1000).map(at),
                st.dictionaries(st.sampled_from(["seen", "step", "generation"]), _PLAIN),
            ),
        ),
    ),
    max_size=30,
)
