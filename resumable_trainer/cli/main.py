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

from resumable_trainer.cli import service_parsers

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXAMPLES = """examples:
  resumable-trainer run train.py --lr 0.1        start, or continue where it was killed
  resumable-trainer resume --from latest         continue the most recent run below runs/
  resumable-trainer resume runs/pima --from best go back to the best snapshot
  resumable-trainer status                       where does it stand, and who runs it
  resumable-trainer list runs/pima --json        its snapshots, verified

exit codes: 0 done, 2 usage, 65 no valid snapshot, 66 no such run or snapshot, 69 held by another process,
            70 the training code failed, 74 not saved, 75 preempted (run again), 78 settings, 130 interrupted
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
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_resume(commands)
    _add_doctor(commands)
    _add_looking(commands, "list", "the snapshots of a run, verified", "resumable-trainer list runs/pima")
    _add_looking(commands, "status", "where a run stands, and who runs it", "resumable-trainer status --json")
    show = _add_looking(commands, "show", "what is in one snapshot", "resumable-trainer show runs/pima best")
    show.add_argument("which", nargs="?", default="latest", help="latest, best, a STEP, epoch:N or a name")
    _add_verify(commands)
    _add_diff(commands)
    _add_fork(commands)
    _add_prune(commands)
    _add_export(commands)
    _add_import(commands)
    plot = _add_looking(commands, "plot", "draw the curves of a run", "resumable-trainer plot runs/pima -o pima.svg")
    plot.add_argument("-o", "--output", metavar="FILE", help="PNG, SVG or PDF (default: RUN_DIR/history.png)")
    stop = _add_looking(
        commands, "stop", "ask the process that runs it to save and leave", "resumable-trainer stop --timeout 60"
    )
    _add_systemd(commands)
    service_parsers.add(commands)
    stop.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds to wait (default: 300)")
    return parser


def _add_systemd(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "systemd",
        help="a run as a unit of systemd: started at boot, watched, restarted",
        description="Units for a run that was started once: a template for all, and what is particular to this one.",
        epilog="examples:\n  resumable-trainer systemd print runs/pima\n"
        "  sudo resumable-trainer systemd install runs/pima\n  resumable-trainer systemd install --user runs/pima",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action, text in (
        ("print", "show the units"),
        ("install", "write, enable and start them"),
        ("remove", "stop and remove them"),
        ("ended", "note how the training ended; for the units"),
    ):
        _add_systemd_options(actions.add_parser(action, help=text, description=f"{text.capitalize()}."))


def _add_systemd_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="default: the most recent run below runs/")
    parser.add_argument("--user", action="store_true", help="units of the user manager")
    parser.add_argument(
        "--strict", action="store_true", help="refuse to continue if what numbers depend on has changed"
    )
    parser.add_argument("--no-start", action="store_true", help="install: enable it for the next boot, do not start it")
    parser.add_argument(
        "--hang-timeout",
        type=int,
        default=1800,
        metavar="S",
        help="silence that counts as a hang, until the pace of the run has been learned (default: 1800)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def _add_looking(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="default: the most recent run below runs/")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    return parser


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_looking(
        commands,
        "verify",
        "check every byte; --replay: train a stretch once more and compare",
        "resumable-trainer verify                            exit 65 if anything is damaged\n"
        "  resumable-trainer verify runs/pima --replay          from the last snapshot but one to the last\n"
        "  resumable-trainer verify runs/pima --replay --from 400   exit 1 if it does not come to the same",
    )
    parser.add_argument(
        "--replay", action="store_true", help="train a copy from one snapshot to the next, and compare both"
    )
    parser.add_argument("--from", dest="which", help="with --replay: latest, best, a STEP or epoch:N to begin from")
    parser.add_argument("--timeout", type=float, default=86400.0, metavar="S", help="of the replay (default: a day)")


def _add_diff(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "diff",
        help="what two snapshots differ in; exit 0 if nothing, 1 if something",
        description="What two snapshots differ in: position, metrics, settings, every part tensor by tensor,"
        " generators. Exit code 0 if they are the same, 1 if they differ. Which launch wrote them, and when, does not"
        " count.",
        epilog="examples:\n  resumable-trainer diff 400 latest            two snapshots of the most recent run\n"
        "  resumable-trainer diff runs/a:best latest    two snapshots of runs/a\n"
        "  resumable-trainer diff runs/a runs/b         the newest of two runs\n"
        "  resumable-trainer diff runs/a:epoch:3 runs/b:epoch:3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = "RUN_DIR, RUN_DIR:WHICH, WHICH (latest, best, a STEP, epoch:N), or the path of a snapshot"
    parser.add_argument("a", metavar="A", help=words)
    parser.add_argument("b", metavar="B", help="the same; WHICH alone is looked for in the run of A")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def _add_fork(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "fork",
        help="a new run from any snapshot of another",
        description="Make a new run from a copy of a snapshot, with its metrics so far and its lineage recorded. The"
        " other run is not touched, and may be training.",
        epilog="examples:\n  resumable-trainer fork runs/pima runs/pima-2 --from best\n"
        "  resumable-trainer resume runs/pima-2               the same command, continuing the fork\n"
        "  resumable-trainer fork runs/a/set-aside/line-1/step-000000400 runs/b",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="RUN_DIR, RUN_DIR:WHICH, or the path of a snapshot")
    parser.add_argument("new_run", metavar="NEW_RUN", help="the new run directory; the name must be free")
    parser.add_argument("--from", dest="which", help="latest, best, a STEP or epoch:N (default: latest)")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def _add_prune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_looking(
        commands, "prune", "delete snapshots that need not stay", "resumable-trainer prune runs/pima --dry-run"
    )
    parser.description = (
        "Delete snapshots that need not stay: without options, those that the run itself would delete. The newest that"
        " verifies always stays, what is damaged too, and the best unless --keep-best 0 is given."
    )
    parser.add_argument("--keep-last", type=int, metavar="N", help="how many of the newest stay (at least 1)")
    parser.add_argument("--keep-best", type=int, metavar="N", help="how many of the best stay besides")
    parser.add_argument("--keep-every", type=int, metavar="N", help="each N-th epoch's stays besides; 0 for none")
    parser.add_argument("--quarantine", action="store_true", help="delete what lies in quarantine/ too")
    parser.add_argument("--set-aside", action="store_true", help="delete what was set aside too")
    parser.add_argument("--dry-run", action="store_true", help="say what would go and what it frees; change nothing")


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_looking(
        commands,
        "export",
        "the weights of a snapshot as a file for other programs",
        "resumable-trainer export runs/pima -o pima.safetensors\n"
        '  and in Python: model.load_state_dict(safetensors.torch.load_file("pima.safetensors"))',
    )
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the new file")
    parser.add_argument(
        "--from", dest="which", help="best, latest, a STEP or epoch:N (default: best if there is one, else latest)"
    )
    parser.add_argument("--part", help="which part (default: model, or the only one that looks like a model)")
    parser.add_argument(
        "--format",
        choices=["safetensors", "torch"],
        default="safetensors",
        help="torch: a file of torch.save, which torch.load(weights_only=True) reads",
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "import",
        help="a new run from a checkpoint of torch.save or safetensors",
        description="Make a new run from a checkpoint that something else wrote. Only tensors and plain values are"
        " taken (torch.load with weights_only, and nothing less). Generators, the place in the data and early stopping"
        " are not in such a file and begin anew.",
        epilog="examples:\n  resumable-trainer import old.pt runs/new --epoch 10 --step 7000\n"
        "  resumable-trainer import lightning.ckpt runs/new --strip model. --map scheduler=\n"
        "  resumable-trainer import old.pt runs/new --map model=net --map optimizer=opts.0",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="the checkpoint")
    parser.add_argument("new_run", metavar="NEW_RUN", help="the new run directory; the name must be free")
    parser.add_argument("--epoch", type=int, metavar="N", help="epochs that are complete (default: as the file says)")
    parser.add_argument("--step", type=int, metavar="N", help="batches trained since the start (as the file says)")
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="batches of the epoch under way")
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="NAME=KEY",
        help="KEY of the file (a.b or a.0 below it) becomes part NAME; an empty KEY leaves the part out",
    )
    parser.add_argument(
        "--strip", action="append", default=[], metavar="PREFIX", help="take PREFIX off the names of a model's tensors"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


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


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "run",
        help="start a training script, or continue it where it has snapshots",
        description="Start a training script, or continue it where it has snapshots. Options come before the script;"
        " everything behind it is the script's own.",
        epilog="examples:\n  resumable-trainer run train.py --lr 0.1\n"
        "  resumable-trainer run --run-dir runs/a -m my.training\n"
        "  resumable-trainer run --fresh train.py      set the old line aside, begin anew",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run-dir", metavar="DIR", help="for a script that names none (default: runs/<script>)")
    parser.add_argument("--fresh", action="store_true", help="set all snapshots aside (nothing is deleted) and begin")
    parser.add_argument("--from", dest="which", default="latest", help="latest, best, a STEP or epoch:N")
    _add_starting(parser)
    _add_target(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", dest="module", action="store_true", help="TARGET is a module, as in python -m")
    parser.add_argument("target", metavar="TARGET", help="SCRIPT.py, or MODULE after -m")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="does this job resume exactly? kills it to find out; exit 0 only if it does",
        description="Run the script for a few steps without interruption, then again with kills in nasty places and"
        " resumes, compare everything, and say whether this job resumes exactly; if not, what differs and why. Works in"
        " a scratch directory beside the run directory; an existing run is not touched. What the script itself writes"
        " elsewhere, it writes.",
        epilog="examples:\n  resumable-trainer doctor train.py --lr 0.1\n"
        "  resumable-trainer doctor --batches 20 -m my.training\n\n"
        "exit code 0 only if every resume was exact, 1 if one was not, 70 if the script fails by itself",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--epochs", type=_count, default=3, metavar="N", help="epochs to train (default: 3)")
    parser.add_argument("--batches", type=_count, default=6, metavar="N", help="batches per loop (default: 6)")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="seconds per start (default: 1800)")
    parser.add_argument("--keep", action="store_true", help="leave the scratch directory to be looked at")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    _add_target(parser)


def _number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("at least 0")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError("more than 0")
    return seconds


def _count(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError("at least 2")
    return number


def _add_resume(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "resume",
        help="start the recorded command of a run again",
        description="Start the recorded command of a run again, in its directory; it continues.",
        epilog="examples:\n  resumable-trainer resume --from latest\n  resumable-trainer resume runs/pima --from 400\n"
        "  resumable-trainer resume runs/pima --from epoch:10   newer snapshots are set aside, not deleted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="default: the most recent run below runs/")
    parser.add_argument("--from", dest="which", default="latest", help="latest, best, a STEP or epoch:N")
    _add_starting(parser)
