"""`systemd print|install|remove|ended`: a run as a unit of systemd."""

from __future__ import annotations

import getpass
import json
import os
import pwd
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumable_trainer.cli.output import directory_to_forget, run_directory
from resumable_trainer.cli.recorded import recorded_command
from resumable_trainer.durable.files import Files, remove_tree, write_replacing
from resumable_trainer.errors import SettingsError, UsageError
from resumable_trainer.loop import launch
from resumable_trainer.service import systemd
from resumable_trainer.service.systemd import Plan
from resumable_trainer.service.texts import is_utf8

if TYPE_CHECKING:
    import argparse

_SYSTEM_UNITS = Path("/etc/systemd/system")
_ASSUMED_VERSION = 252


def run(args: argparse.Namespace) -> int:
    """Print, write or remove units; 0."""
    if args.action == "remove":
        return _remove(systemd.instance_of(directory_to_forget(args)), _units(user=args.user), args)
    directory = run_directory(args).resolve()
    if args.action == "ended":
        return _ended(directory)
    plan = _plan(directory, args)
    if args.action == "print":
        return _print(plan, as_json=args.json)
    return _install(plan, _units(user=args.user), args)


def _plan(directory: Path, args: argparse.Namespace) -> Plan:
    command = recorded_command(directory)
    owner = _owner(directory)
    home = Path(owner.pw_dir)
    writable = [Path(command.cwd), directory, home / ".cache" / "resumable_trainer"]
    for path in (*writable, Path(command.python)):
        if not is_utf8(str(path)):
            raise SettingsError(f"systemd: {str(path)!r} cannot stand in a unit: it is no UTF-8", path=path)
    instance = systemd.instance_of(directory)
    if len(instance) > systemd.LONGEST_NAME:
        raise SettingsError(
            f"systemd: {directory} is too long: its unit's name would have {len(instance)} characters,"
            f" {systemd.LONGEST_NAME} are possible",
            path=directory,
            hint="move the run directory to a shorter path",
        )
    return Plan(
        directory=directory,
        python=command.python,
        writable=list(dict.fromkeys(writable)),
        user=None if args.user else owner.pw_name,
        strict=args.strict,
        version=_version(),
        hang_seconds=args.hang_timeout,
    )


def _owner(directory: Path) -> pwd.struct_passwd:
    """Whose the run is, and whose its unit will be."""
    number = directory.stat().st_uid
    try:
        return pwd.getpwuid(number)
    except KeyError:
        raise SettingsError(
            f"systemd: {directory} belongs to user {number}, who has no name on this machine",
            path=directory,
            hint="chown it to whoever is to train, or print the units where it is to run",
        ) from None


def _version() -> int:
    """Of the local systemd; an old one is assumed where there is none, as units may be made for elsewhere."""
    try:
        said = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S607
        return int(said.split()[1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return _ASSUMED_VERSION


def _print(plan: Plan, *, as_json: bool) -> int:
    units = {systemd.TEMPLATE: systemd.template(plan), plan.drop_in: systemd.drop_in(plan)}
    if as_json:
        print(json.dumps({"instance": plan.instance, "units": units}, indent=2))
    else:
        print("\n".join(f"# {name}\n{text}" for name, text in units.items()), end="")
    return 0


def _units(*, user: bool) -> Path:
    """Where units are written."""
    if user:
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"
    if os.geteuid() != 0:
        raise UsageError(
            f"units of the system are root's, and this is {getpass.getuser()}",
            hint="use sudo, or --user for units of your own (then: loginctl enable-linger)",
        )
    return _SYSTEM_UNITS


def _install(plan: Plan, units: Path, args: argparse.Namespace) -> int:
    files = {units / systemd.TEMPLATE: systemd.template(plan), units / plan.drop_in: systemd.drop_in(plan)}
    for path in files:
        if path.exists() and systemd.MARK not in path.read_text():
            raise SettingsError(f"{path} is there, and not ours", path=path, hint="move it away, or use print")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_replacing(Files(), path, text.encode())
    _systemctl(args, "daemon-reload")
    _systemctl(args, "enable", "--no-block" if args.no_start else "--now", plan.instance)
    started = "enabled" if args.no_start else "enabled and started"
    print(
        json.dumps({"instance": plan.instance, "files": list(map(str, files))})
        if args.json
        else f"{plan.instance}: {started}\nlook at it with: systemctl {'--user ' if args.user else ''}status"
        f" '{plan.instance}'"
    )
    return 0


def _remove(instance: str, units: Path, args: argparse.Namespace) -> int:
    """Stop and forget the run's unit; the template goes with the last of them."""
    drop_in = units / systemd.drop_in_of(instance)
    is_there = drop_in.exists()
    if is_there:
        _systemctl(args, "disable", "--now", instance)
        remove_tree(Files(), drop_in.parent)
    template = units / systemd.TEMPLATE
    if template.exists() and systemd.MARK in template.read_text() and not _others(units):
        template.unlink()
    if is_there:
        _systemctl(args, "daemon-reload")
    words = "removed" if is_there else "was not installed"
    print(json.dumps({"instance": instance, "removed": is_there}) if args.json else f"{instance}: {words}")
    return 0


def _others(units: Path) -> list[Path]:
    return list(units.glob(systemd.TEMPLATE.replace("@", "@?*") + ".d"))


def _systemctl(args: argparse.Namespace, *words: str) -> None:
    command = ["systemctl", *(["--user"] if args.user else []), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SettingsError(
            f"{' '.join(command)} failed: {error}", hint="is systemd running here? print shows the units for elsewhere"
        ) from error
    if done.returncode:
        raise SettingsError(
            f"{' '.join(command)} failed: {done.stderr.strip()}",
            found=done.returncode,
            hint=f"the files in {_units(user=args.user)} stay; the journal (journalctl -xe) says more",
        )


def _ended(directory: Path) -> int:
    """`ExecStopPost`: note how the training ended, if it did not say so itself."""
    kind, status = os.environ.get("EXIT_CODE", ""), os.environ.get("EXIT_STATUS", "")
    result = "hang" if os.environ.get("SERVICE_RESULT") == "watchdog" else "exit" if kind == "exited" else "signal"
    how: dict[str, Any] = {"code" if kind == "exited" else "signal": int(status) if status.isdecimal() else status}
    launch.note_ended(directory, by="systemd", result=result, **how)
    return 0
