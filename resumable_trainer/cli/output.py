"""Text tables and units for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.errors import UsageError
from resumable_trainer.report.summary import most_recent, require_run

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def run_directory(args: argparse.Namespace) -> Path:
    """The run that was named, or the most recent one.

    Raises:
        NotFoundError: There is none such.
        UsageError: The name is empty.
    """
    if args.run_dir is None:
        return most_recent()
    if not args.run_dir:  # a variable that is not set must not mean some run or other
        raise UsageError(
            "the run directory's name is empty", hint="leave it out to mean the most recent run below runs/"
        )
    return require_run(Path(args.run_dir))


def directory_to_forget(args: argparse.Namespace) -> Path:
    """The same, absolute; one that was named may be gone: what was installed for it must be removable all the same."""
    return Path(args.run_dir).resolve() if args.run_dir else run_directory(args).resolve()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [list(header), *([("" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [
        all(isinstance(row[column], int | float) for row in rows) and bool(rows) for column in range(len(header))
    ]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def size(num_bytes: int) -> str:
    """Bytes in a unit that fits: 19.2 kB."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
