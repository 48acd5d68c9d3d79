"""`cron print|install|remove`: a run in the user's crontab."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from resumable_trainer.cli.output import directory_to_forget, run_directory
from resumable_trainer.cli.recorded import recorded_command
from resumable_trainer.errors import SettingsError
from resumable_trainer.service import cron

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Print, install or remove the entries."""
    if args.action == "remove":
        directory = directory_to_forget(args)
        old = _crontab()
        new = cron.without_entry(old, directory)
        if new != old:
            _install(new)
        print(f"removed: {directory}" if new != old else f"{directory} was not in the crontab")
        return 0
    directory = run_directory(args).resolve()
    entry = cron.Entry(directory, recorded_command(directory).python, args.every, args.strict)
    if args.action == "print":
        print(cron.block(entry), end="")
        return 0
    _install(cron.with_entry(_crontab(), entry))
    print(f"installed: {directory}, every {args.every} min and at boot; output in {directory / 'cron.log'}")
    return 0


def _crontab() -> str:
    """The user's crontab; one that cannot be read must not be replaced."""
    done = _call(["crontab", "-l"])
    if done.returncode and "no crontab for" not in done.stderr:
        raise SettingsError(f"the crontab cannot be read: {done.stderr.strip()}")
    return "" if done.returncode else done.stdout


def _install(text: str) -> None:
    done = _call(["crontab", "-"], text)
    if done.returncode:
        raise SettingsError(f"the crontab was refused: {done.stderr.strip()}")


def _call(command: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    given = None if text is None else text.encode("utf-8", "surrogateescape")  # bytes: line ends stay as they are
    try:
        done = subprocess.run(command, input=given, env=environment, capture_output=True, check=False)  # noqa: S603
    except FileNotFoundError:
        raise SettingsError("there is no cron here: crontab is not installed", hint="apt install cron") from None
    said, errors = (stream.decode("utf-8", "surrogateescape") for stream in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(command, done.returncode, said, errors)
