"""Entries of a crontab that start a run at boot and every few minutes; a start that finds it held or done does nothing.

Cron's environment is nearly empty and `%` means a new line: paths are absolute, `%` is escaped. What is printed would
be mailed, or lost: output goes to `cron.log` in the run directory, and only an ending that needs a person prints a
line; being done, preempted or killed from outside is none, as the next start goes on. Entries stand between marks, so
that taking them out again touches nothing else.
"""

from __future__ import annotations

import re
import shlex
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resumable_trainer.errors import ExitCode, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

_SILENT = (ExitCode.DONE, ExitCode.PREEMPTED, 128 + signal.SIGKILL, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class Entry:
    """What is to be started.

    Attributes:
        directory: The run directory, absolute.
        python: The interpreter's path.
        minutes: How often it is tried.
        strict: Refuse on drift.
    """

    directory: Path
    python: str
    minutes: int = 5
    strict: bool = False


def block(entry: Entry) -> str:
    """The lines, between their marks.

    Raises:
        SettingsError: The interval cannot be written, or a path cannot stand in a line.
    """
    if not 1 <= entry.minutes <= 59:
        raise SettingsError(f"cron: every {entry.minutes} minutes cannot be written, it must be 1 to 59")
    if any(c in str(entry.directory) + entry.python for c in "\n\r\0"):
        raise SettingsError(f"cron: {str(entry.directory)!r} cannot stand in a line of a crontab")
    strict = ["--strict"] if entry.strict else []
    command = [entry.python, "-m", "resumable_trainer", "resume", str(entry.directory), "--if-running", "skip"]
    log = shlex.quote(str(entry.directory / "cron.log"))
    silent = "|".join(str(int(code)) for code in _SILENT)
    line = (  # in braces, as the shell itself tells of a child that was killed
        f"{{ {shlex.join([*command, '--quiet', *strict])}; c=$?; }} >> {log} 2>&1;"
        f' case $c in {silent}) ;; *) echo "exit $c, see" {log};; esac'
    ).replace("%", "\\%")
    begin, end = _marks(entry.directory)
    return f"{begin}\n@reboot {line}\n*/{entry.minutes} * * * * {line}\n{end}\n"


def with_entry(crontab: str, entry: Entry) -> str:
    """A crontab with this run's lines, in place of older ones of the same run."""
    rest = without_entry(crontab, entry.directory)
    return rest + ("" if not rest or rest.endswith("\n") else "\n") + block(entry)


def without_entry(crontab: str, directory: Path) -> str:
    """A crontab without this run's lines; every other byte as it was.

    Raises:
        SettingsError: One of the two marks is gone: which lines are ours cannot be told.
    """
    begin, end = _marks(directory)
    lines, kept, within = re.findall(r"[^\n]*\n|[^\n]+", crontab), [], False
    for line in lines:
        mark = line.rstrip("\n")
        if mark == (end if not within else begin):
            raise SettingsError(f"the crontab's marks of {directory} do not fit: take the lines out by hand")
        if mark == begin:
            within = True
        if not within:
            kept.append(line)
        if mark == end:
            within = False
    if within:
        raise SettingsError(f"the crontab's marks of {directory} do not fit: take the lines out by hand")
    return "".join(kept)


def _marks(directory: Path) -> tuple[str, str]:
    return f"# >>> resumable-trainer {directory}", f"# <<< resumable-trainer {directory}"
