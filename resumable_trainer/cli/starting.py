"""Starting a training script inside this process: what `run` and `resume` share.

The process that a service manager started becomes the training: the signal handlers stand and the
lock is taken before the script, and with it torch, is loaded.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumable_trainer.cli.restarting import prepare
from resumable_trainer.durable.files import Files, remove_tree
from resumable_trainer.durable.lock import RunLock
from resumable_trainer.errors import ExitCode, NotFoundError, RunHeldError
from resumable_trainer.loop import heartbeat, launch
from resumable_trainer.loop.notices import install_excepthook, notices
from resumable_trainer.loop.script import run_script
from resumable_trainer.report.summary import DEFAULT_ROOT, is_run, runs_below, summarize
from resumable_trainer.snapshot.layout import RUN_LOCK, parse_name
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping

    from resumable_trainer.loop.launch import Command

_DONE = {"finished": "finished", "stopped_early": "stopped early"}  # how a run ended, in words


def command_of(args: argparse.Namespace) -> Command:
    """The command named by TARGET, `-m` and the arguments behind it."""
    script = None if args.module else str(Path(args.target).resolve())
    module = args.target if args.module else None
    return launch.Command(sys.executable, script, module, tuple(args.args), str(Path.cwd()))


def check_target(command: Command) -> None:
    """Refuse what cannot be started.

    Raises:
        NotFoundError: The script or its working directory is not there.
    """
    if not Path(command.cwd).is_dir():
        raise NotFoundError(
            f"the working directory {command.cwd} of the recorded command is gone",
            path=command.cwd,
            hint="start the script by hand from where it is now, with --run-dir for the run directory",
        )
    if command.script is not None and not Path(command.script).is_file():
        raise NotFoundError(f"the script {command.script} is not there", path=command.script)


def go_on_as(python: str, arguments: list[str]) -> None:
    """Become the interpreter that a command was recorded with, with the same command line; return if we are it.

    Compared by name, not by what a link leads to: the python of a virtual environment is a link to another's.
    """
    if Path(python).exists() and Path(python).absolute() != Path(sys.executable).absolute():
        os.execv(python, [python, "-m", "resumable_trainer", *arguments])  # noqa: S606 - no shell is wanted


def directories_of(command: Command) -> list[Path]:
    """Run directories that this command is recorded in, as far as they can be found without running it.

    A script that names its own directory is not run to learn which: looked at are the runs below
    `runs/`, and every argument and every string in the script that names a run's directory. A run
    that was moved or forked is not found: the script would open another, only `resume` leads there.
    """
    found: dict[Path, None] = {}
    for candidate in _candidates(command):
        path = Path(command.cwd) / candidate
        if is_run(path):
            recorded = launch.recorded_start(path)
            if recorded is not None and recorded.directory == path.resolve() and recorded.command.same_work(command):
                found[path.resolve()] = None
    return list(found)


def _candidates(command: Command) -> Iterator[str]:
    yield from map(str, runs_below(Path(command.cwd) / DEFAULT_ROOT))
    for argument in command.args:
        yield argument.partition("=")[2] if argument.startswith("-") and "=" in argument else argument
    yield from _strings_in(command.script)


def _strings_in(script: str | None) -> Iterator[str]:
    for node in ast.walk(_tree_of(script)):
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str) and 0 < len(value) < 500 and value.isprintable():
            yield value


def directory_to_be(command: Command, default: Path) -> Path | None:
    """The run directory that a script started for the first time will open, if its text says so.

    It does if there is a single `Run(...)`, `Trainer(...)` or `StateManager(...)` in it whose
    directory is written out, or left to the command line. Then the lock can be taken before torch is
    imported, and of twenty starts at once nineteen are refused at once.
    """
    calls = [node for node in ast.walk(_tree_of(command.script)) if isinstance(node, ast.Call) and _opens_run(node)]
    if len(calls) != 1:
        return None
    call = calls[0]
    named = [keyword.value for keyword in call.keywords if keyword.arg in ("directory", "run_dir")] or call.args[:1]
    if any(keyword.arg is None for keyword in call.keywords) or any(isinstance(a, ast.Starred) for a in call.args):
        return None
    if not named:
        return default
    value = named[0].value if isinstance(named[0], ast.Constant) else ...
    if value is None:
        return default
    return Path(command.cwd) / value if isinstance(value, str) and value.isprintable() and value else None


def _opens_run(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in ("Run", "StateManager", "Trainer")


def _tree_of(script: str | None) -> ast.Module:
    """A script's syntax tree; an empty one if it has none: starting it will tell."""
    try:
        return ast.parse(Path(script).read_bytes()) if script is not None else ast.Module([], [])
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def start(command: Command, directories: list[Path], target: Path | None, args: argparse.Namespace) -> int:
    """Start the command, unless it is done already.

    Args:
        command: What to start.
        directories: Run directories known to belong to it.
        target: The run directory that was asked for by name.
        args: The command line.

    Returns:
        The exit code.
    """
    fresh = bool(getattr(args, "fresh", False))
    if not fresh and not args.relaunch and args.which == "latest":
        done = [path for path in directories if launch.command_is_done(path, command)]
        if done and len(done) == len(directories):
            heartbeat.nothing_to_do()
            return int(ExitCode.DONE) if args.quiet else _say_done(done[-1], as_json=args.json)
    _check_which(directories, target, args.which)
    handover = launch.process.handover
    handover.command, handover.strict, handover.fresh, handover.which = command, args.strict, fresh, args.which
    handover.target = target or (directories[0] if len(directories) == 1 else None)
    prepare(args)
    notices.install()
    try:
        _take_locks(directories, command)
    except RunHeldError:
        if args.if_running == "skip":
            return int(ExitCode.DONE)
        raise
    install_excepthook(launch.process.note_failure)
    code = run_script(command)
    launch.process.record_exit(code)
    _release_unused_locks()
    if target is not None and target.resolve() not in launch.process.opened:
        print(f"resumable-trainer: the script never opened {target}", file=sys.stderr)
    return code


def _say_done(directory: Path, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(summarize(directory).to_json()))
        return int(ExitCode.DONE)
    state, ended = _end_as_noted(directory) or _end_as_saved(directory)
    print(f"{directory}: already {_DONE.get(state, 'done')}{ended} | nothing to do")
    raised = "the patience" if state == "stopped_early" else "the epochs"
    print(f"to train further raise {raised} in the script; if something else has changed, add --relaunch")
    return int(ExitCode.DONE)


def _end_as_noted(directory: Path) -> tuple[str, str] | None:
    """How a run ended, and where, by the event of it: no snapshot is read, so it takes no longer if they are large.

    None if the newest snapshot is not the one with which the event says that it ended, or it does not say all.
    """
    # Of a commit without an end after it nothing is known, and nothing older is looked for.
    noted = next(launch.events_from_end(directory, ("finished", "committed")), {})
    newest = parse_name(next(reversed(Store(directory).names()), ""))
    try:
        if newest is None or noted["outcome"] not in _DONE:
            return None
        if (noted["step"], noted["epoch"]) != (newest.step, newest.epochs_complete):
            return None
        return noted["outcome"], _end_in_words(noted["epoch"], noted["step"], noted["best"])
    except (KeyError, TypeError, ValueError):  # of an older release, or not as it was written
        return None


def _end_as_saved(directory: Path) -> tuple[str, str]:
    """The same by the newest snapshot that verifies."""
    summary = summarize(directory)
    if summary.newest is None:
        return summary.state, ""
    at, best = summary.newest.position, summary.newest.best
    return summary.state, _end_in_words(at.epoch, at.step, None if best is None else vars(best))


def _end_in_words(epochs: int, steps: int, best: Mapping[str, Any] | None) -> str:
    value = "" if best is None else f" | best {best['metric']} {best['value']:.4f} @ epoch {best['epoch'] + 1}"
    return f" after {epochs} epochs, {steps} steps{value}"


def _check_which(directories: list[Path], target: Path | None, which: str) -> None:
    """A snapshot that is not there is said before torch is imported."""
    for directory in [target] if target is not None and is_run(target) else directories:
        if which != "latest":
            Store(directory).select(which)


def _take_locks(directories: list[Path], command: Command) -> None:
    taken: list[RunLock] = []
    try:
        for directory in directories:
            lock = RunLock(directory / RUN_LOCK)
            lock.acquire(known_generation=Store(directory).newest_generation(), command=str(command))
            taken.append(lock)
            launch.process.handover.locks[directory.resolve()] = lock
    except BaseException:
        for lock in taken:
            lock.release()
        raise


def _release_unused_locks() -> None:
    """Let go of runs that the script did not open after all; a directory made for nothing goes."""
    for directory, lock in launch.process.handover.locks.items():
        lock.release()
        if [path.name for path in directory.iterdir()] == [RUN_LOCK]:
            remove_tree(Files(), directory)
    launch.process.handover.locks.clear()
