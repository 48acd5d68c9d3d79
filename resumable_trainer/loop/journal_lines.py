"""How grave a line for a person is, and how systemd's journal is told: `<N>` before a line, see sd-daemon(3).

The journal says which stream is its own: `JOURNAL_STREAM` holds the device and inode of it. A stream that was
redirected since is not marked. Free of torch.
"""

from __future__ import annotations

import os
import sys

ERROR, WARNING, INFO = 3, 4, 6
_WRONG = ("warning", "drift", "damaged", "diverged")


def priority(line: str) -> int:
    """Of a line of the screen, by its first word."""
    return WARNING if line.startswith(_WRONG) else INFO


def marked(text: str, number: int) -> str:
    """Text as standard error is to get it: with the priority before each line, if the journal reads it."""
    if not _is_read_by_journal():
        return text
    return "\n".join(f"<{number}>{line}" for line in text.split("\n"))


def _is_read_by_journal() -> bool:
    named = os.environ.get("JOURNAL_STREAM")
    if not named:
        return False
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return named == f"{found.st_dev}:{found.st_ino}"
