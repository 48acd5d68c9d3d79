"""`runs`: all runs below a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.cli.output import table
from resumable_trainer.errors import NotFoundError
from resumable_trainer.report import prometheus
from resumable_trainer.report.overview import Line, overview

if TYPE_CHECKING:
    import argparse

_WIDTH = 80


def run(args: argparse.Namespace) -> int:
    """Print the runs."""
    root = Path(args.root)
    if not root.is_dir():
        raise NotFoundError(f"{root} is no directory", path=root)
    lines = overview(root)
    if args.prometheus is not None:
        prometheus.write(lines, Path(args.prometheus))
        return 0
    if args.json:
        print(json.dumps([line.to_json() for line in lines], indent=2))
    elif lines:
        print(_table(root, lines))
    else:
        print(f"there is no run below {root}")
    return 0


def _table(root: Path, lines: list[Line]) -> str:
    header = ("run", "state", "step", "epoch", "best", "goodput", "holder")
    rows = [[shown(_name(root, line)), *_cells(line)] for line in lines]
    others = max(len(row) for row in table(header[1:], [row[1:] for row in rows]).splitlines())
    widest = max(8, _WIDTH - others - 2)
    return table(header, [[_shortened(row[0], widest), *row[1:]] for row in rows])


def _cells(line: Line) -> list[str]:
    at, best = (line.newest.position, line.newest.best) if line.newest is not None else (None, None)
    share = line.goodput.share if line.goodput is not None else None
    return [
        shown(line.state.replace("_", " "))[:13],
        str(at.step) if at else "",
        str(at.epoch) if at else "",
        f"{best.value:.4g}" if best else "",
        f"{share:.0%}" if share is not None else "",
        _shortened(shown(f"{line.holder.pid}@{line.holder.host}"), 14) if line.holder is not None else "",
    ]


def _name(root: Path, line: Line) -> str:
    return str(line.directory.relative_to(root)) if line.directory != root else str(root)


def shown(name: str) -> str:
    """A name as it can be shown: control characters, and what is no text, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else "..." + name[3 - width :]
