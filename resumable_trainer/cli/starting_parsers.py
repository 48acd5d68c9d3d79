"""Parsers of the commands that start trainings."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from resumable_trainer.cli.parsing import add_command, add_json, add_run_dir

if TYPE_CHECKING:
    from resumable_trainer.cli.parsing import Commands


def add(commands: Commands) -> None:
    """Declare `run`, `resume` and `doctor`."""
    _add_run(commands)
    _add_resume(commands)
    _add_doctor(commands)


def _add_run(commands: Commands) -> None:
    parser = add_command(
        commands,
        "run",
        "start a training script, or continue it where it has snapshots",
        description="Start a training script, or continue it where it has snapshots. Options come before the script;"
        " everything behind it is the script's own.",
        examples="resumable-trainer run train.py --lr 0.1\n"
        "  resumable-trainer run --run-dir runs/a -m my.training\n"
        "  resumable-trainer run --fresh train.py      set the old line aside, begin anew",
    )
    parser.add_argument("--run-dir", metavar="DIR", help="for a script that names none (default: runs/<script>)")
    parser.add_argument("--fresh", action="store_true", help="set all snapshots aside (nothing is deleted) and begin")
    parser.add_argument("--from", dest="which", default="latest", help="latest, best, a STEP or epoch:N")
    _add_starting(parser)
    _add_target(parser)


def _add_resume(commands: Commands) -> None:
    parser = add_command(
        commands,
        "resume",
        "start the recorded command of a run again",
        description="Start the recorded command of a run again, in its directory; it continues.",
        examples="resumable-trainer resume --from latest\n  resumable-trainer resume runs/pima --from 400\n"
        "  resumable-trainer resume runs/pima --from epoch:10   newer snapshots are set aside, not deleted",
    )
    add_run_dir(parser)
    parser.add_argument("--from", dest="which", default="latest", help="latest, best, a STEP or epoch:N")
    _add_starting(parser)


def _add_doctor(commands: Commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        "does this job resume exactly? kills it to find out; exit 0 only if it does",
        description="Run the script for a few steps without interruption, then again with kills in nasty places and"
        " resumes, compare everything, and say whether this job resumes exactly; if not, what differs and why. Works in"
        " a scratch directory beside the run directory; an existing run is not touched. What the script itself writes"
        " elsewhere, it writes.",
        examples="resumable-trainer doctor train.py --lr 0.1\n"
        "  resumable-trainer doctor --batches 20 -m my.training\n\n"
        "exit code 0 only if every resume was exact, 1 if one was not, 70 if the script fails by itself",
    )
    parser.add_argument("--epochs", type=_count, default=3, metavar="N", help="epochs to train (default: 3)")
    parser.add_argument("--batches", type=_count, default=6, metavar="N", help="batches per loop (default: 6)")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="seconds per start (default: 1800)")
    parser.add_argument("--keep", action="store_true", help="leave the scratch directory to be looked at")
    add_json(parser)
    _add_target(parser)


def _add_starting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict", action="store_true", help="refuse (78) if what the numbers depend on has changed")
    parser.add_argument(
        "--if-running", choices=["fail", "skip"], default="fail", help="skip: exit 0 quietly if the run is held"
    )
    parser.add_argument(
        "--relaunch", action="store_true", help="start the script even though the run is done and its sources unchanged"
    )
    parser.add_argument("--json", action="store_true", help="if nothing is to be started, say so as JSON")
    parser.add_argument("--quiet", action="store_true", help="if nothing is to be started, say nothing")
    _add_staying_alive(parser)


def _add_staying_alive(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-event",
        metavar="COMMAND",
        help="run COMMAND with JSON on standard input when the run has started, is preempted, has stopped early, has"
        " finished, is failing, has quarantined a snapshot or diverged; not recorded: give it at each start",
    )
    group = parser.add_argument_group("staying alive without a service manager")
    group.add_argument(
        "--restart", action="store_true", help="start the training again after preemptions, failures and hangs"
    )
    group.add_argument("--max-failures", type=int, metavar="N", help="restarts after failures (default: no limit)")
    group.add_argument("--max-preemptions", type=int, metavar="N", help="after preemptions (default: no limit)")
    group.add_argument(
        "--max-stuck", type=int, default=5, metavar="N", help="failures in a row without durable progress (default: 5)"
    )
    group.add_argument(
        "--hang-timeout",
        type=float,
        metavar="S",
        help="seconds without a sign of life until the training has learned its own limit (default: 1800, from its"
        " first sign of life on)",
    )
    group.add_argument("--backoff", type=float, default=1.0, metavar="S", help="first wait; doubles (default: 1)")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", dest="module", action="store_true", help="TARGET is a module, as in python -m")
    parser.add_argument("target", metavar="TARGET", help="SCRIPT.py, or MODULE after -m")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script")


def _count(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError("at least 2")
    return number
