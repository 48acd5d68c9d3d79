"""`resumable-trainer`: the parser, and errors turned into one line and an exit code.

Declarations are light, and a command's module is imported when it runs: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import sys
from typing import TYPE_CHECKING

from resumable_trainer.cli import looking_parsers, service_parsers, starting_parsers
from resumable_trainer.cli.parsing import AnyOrderParser

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXAMPLES = """examples:
  resumable-trainer run train.py --lr 0.1        start, or continue where it was killed
  resumable-trainer resume --from latest         continue the most recent run below runs/
  resumable-trainer resume runs/pima --from best go back to the best snapshot
  resumable-trainer status                       where does it stand, and who runs it
  resumable-trainer list runs/pima --json        its snapshots, verified

exit codes: 0 done, 2 usage, 65 no valid snapshot, 66 no such run or snapshot, 69 held by another process,
            70 the training code failed, 74 not saved, 75 preempted (run again), 78 settings, 79 diverged,
            130 interrupted
"""

# They read snapshots without the lock: of a run that trains, one may go in the middle. None prints before it has
# read all, so it can begin anew.
_READING = ("list", "status", "show", "verify", "diff", "fork", "export")
_ATTEMPTS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    _print_every_name()
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the edge of the process; what is not ours is raised again
        return _report(error)


def _print_every_name() -> None:
    """A name that the terminal's encoding does not have is shown escaped: it is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _run(args: argparse.Namespace) -> int:
    module = importlib.import_module(f"resumable_trainer.cli.{args.command}_cmd")
    if args.command in _READING:
        from resumable_trainer.errors import SnapshotGoneError

        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(SnapshotGoneError):
                return int(module.run(args))
    return int(module.run(args))


def _report(error: Exception) -> int:
    from resumable_trainer.errors import ExitCode, ResumableTrainerError

    if isinstance(error, ResumableTrainerError):
        _complain(error)
        return int(error.exit_code)
    if isinstance(error, OSError):
        _complain(error)
        return int(ExitCode.USAGE if error.errno == errno.ENAMETOOLONG else ExitCode.NOT_SAVED)
    if isinstance(error, ValueError):
        _complain(error)
        return int(ExitCode.NO_VALID_SNAPSHOT)
    raise error


def _complain(error: Exception) -> None:
    from resumable_trainer.loop.journal_lines import ERROR, marked

    print(marked(f"resumable-trainer: {error}", ERROR), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resumable-trainer",
        description="Start, continue and look at trainings that survive being killed at any instant.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=AnyOrderParser)
    starting_parsers.add(commands)
    looking_parsers.add(commands)
    service_parsers.add(commands)
    return parser
