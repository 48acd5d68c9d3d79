"""`diff`: what two snapshots differ in. Exit code 0 if they are the same, 1 if they differ, as `diff` has it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from resumable_trainer.cli.output import table
from resumable_trainer.report.difference import compare
from resumable_trainer.report.selection import select_by_words

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from resumable_trainer.report.difference import Difference, RowsDifference, SectionDifference, ValueChange
    from resumable_trainer.report.numbers import Distance
    from resumable_trainer.snapshot.selected import Selected

_DIFFERENT = 1
_MAX_LINES = 20


def run(args: argparse.Namespace) -> int:
    """Print what differs; 0 if nothing does."""
    a = select_by_words(args.a)
    b = select_by_words(args.b, beside=a.run)
    found = compare(a, b)
    print(
        json.dumps(difference_as_json(a, b, found), indent=2) if args.json else "\n".join(difference_lines(a, b, found))
    )
    return 0 if found.is_same else _DIFFERENT


def difference_as_json(a: Selected, b: Selected, found: Difference) -> dict[str, Any]:
    """What `diff --json` prints."""
    return {
        "same": found.is_same,
        "a": _side(a),
        "b": _side(b),
        "facts": [_change(change) for change in found.facts],
        "rows": asdict(found.rows),
        "sections": [
            {**asdict(section), "same": section.is_same, "values": [_change(change) for change in section.values]}
            for section in found.sections
        ],
        "lineage": [_change(change) for change in found.lineage],
    }


def _side(selected: Selected) -> dict[str, Any]:
    return {"run_dir": str(selected.run), "snapshot": selected.manifest.name, "path": str(selected.path)}


def _change(change: ValueChange) -> dict[str, Any]:
    return {"place": change.place, **change.sides}


def difference_lines(a: Selected, b: Selected, found: Difference) -> list[str]:
    """What `diff` prints."""
    lines = [f"A  {a.path}", f"B  {b.path}"]
    for side in (a, b):
        lines += [f"passed over {name}: {reason}" for name, reason in side.skipped.items()]
    lines += ["", *_changes(found.facts), _rows(found.rows)]
    for section in found.sections:
        lines += _section(section)
    lines += ["", "lineage (does not count):", *(f"  {line}" for line in _changes(found.lineage))]
    verdict = "the same state, metrics and position" if found.is_same else "they differ"
    return [*lines, "", verdict]


def _changes(changes: Sequence[ValueChange]) -> list[str]:
    lines = [
        f"{change.place}: {_value(change.sides, 'a')} -> {_value(change.sides, 'b')}" for change in changes[:_MAX_LINES]
    ]
    return lines + _more(len(changes))


def _value(sides: dict[str, Any], side: str) -> str:
    return json.dumps(sides[side]) if side in sides else "(none)"


def _rows(rows: RowsDifference) -> str:
    if rows.is_same:
        return f"metric rows: the same, {rows.a or 0}"
    where = f", the first that differs is {rows.first_different}" if rows.first_different else ""
    return f"metric rows: {rows.a} -> {rows.b}{where}"


def _section(section: SectionDifference) -> list[str]:
    if section.only_in is not None:
        return [f"{section.name}: only in {section.only_in.upper()}"]
    if section.is_same:
        return [f"{section.name}: the same, {section.num_tensors} tensors"]
    if section.name == "generators":
        places = [change.place for change in section.tensors] + [change.place for change in section.values]
        names = dict.fromkeys(place.partition(".")[0] for place in places)
        return [f"generators: {', '.join(names)} differ"]
    elements = sum(change.distance.differing for change in section.tensors if change.distance is not None)
    lines = [f"{section.name}: {len(section.tensors)} of {section.num_tensors} tensors differ, in {elements} elements"]
    rows = [
        [f"  {change.place}", _kinds(change.a, change.b), *_distance(change.distance, change.elements)]
        for change in section.tensors[:_MAX_LINES]
    ]
    if rows:
        header = ["  tensor", "dtype, shape", "differing", "largest", "not finite"]
        lines += [table(header, rows), *_more(len(section.tensors))]
    return lines + [f"  {line}" for line in _changes(section.values)]


def _kinds(a: str, b: str) -> str:
    return a if a == b else f"{a} -> {b}"


def _distance(apart: Distance | None, elements: int) -> list[object]:
    if apart is None:
        return ["other shape", "", ""]
    largest = "" if apart.largest is None else f"{apart.largest:.6g}"
    return [f"{apart.differing} of {elements}", largest, apart.not_finite or ""]


def _more(count: int) -> list[str]:
    return [f"  and {count - _MAX_LINES} more (--json lists all)"] if count > _MAX_LINES else []
