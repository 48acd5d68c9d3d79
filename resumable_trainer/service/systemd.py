"""Units for systemd: a template for all runs of a machine, and what is particular to a run beside it.

The template `resumable-trainer@.service` says how a training is watched and restarted; a drop-in of the instance says
which interpreter, whose user, and what may be written. An instance is named by the escaped path of its run directory.
Written for the systemd that is there: keys that it does not know are left out. Free of torch.

Where the settings come from: `systemd.service(5)`, `systemd.exec(5)`, and what was measured with them:
`SuccessExitStatus` without 75 leaves a stopped unit red; death by a stray SIGTERM counts as clean, and is restarted
only if forced; `KillMode=control-group` signals data-loader workers, too.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resumable_trainer.errors import ExitCode
from resumable_trainer.service.budget import NO_USE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TEMPLATE = "resumable-trainer@.service"
MARK = "# Written by resumable-trainer."
_FINAL = (*NO_USE, ExitCode.INTERRUPTED)
LONGEST_NAME = 253
"""Characters of a unit's name: with ".d" it must be possible as the name of a directory."""
_KEPT = frozenset(string.ascii_letters + string.digits + ":_.")
_RESTART_STEPS_SINCE = 254

_HARDENING = """\
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
RestrictNamespaces=yes
LockPersonality=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
CapabilityBoundingSet=
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
"""


@dataclass(frozen=True)
class Plan:
    """What is known of a run, for its units.

    Attributes:
        directory: The run directory, absolute.
        python: The interpreter that the run was recorded with.
        writable: Directories that the training may write to, the run directory among them.
        user: Whose; None for units of the user manager.
        strict: Whether drift is refused.
        version: Of the local systemd.
        hang_seconds: Silence that counts as a hang, until the pace of the run has been learned.
    """

    directory: Path
    python: str
    writable: Sequence[Path]
    user: str | None
    strict: bool = False
    version: int = 252
    hang_seconds: int = 1800

    @property
    def instance(self) -> str:
        """Name of the run's unit."""
        return instance_of(self.directory)

    @property
    def drop_in(self) -> str:
        """Path of its drop-in, below the directory of units."""
        return drop_in_of(self.instance)


def instance_of(directory: Path) -> str:
    """Name of the unit of a run directory, which is absolute."""
    return TEMPLATE.replace("@", f"@{escaped_path(str(directory))}")


def drop_in_of(instance: str) -> str:
    """Path of a unit's drop-in, below the directory of units."""
    return f"{instance}.d/run.conf"


def template(plan: Plan) -> str:
    """The text of the template unit."""
    steps = "RestartSteps=6\nRestartMaxDelaySec=10min\n" if plan.version >= _RESTART_STEPS_SINCE else ""
    hardening = _HARDENING if plan.user is not None else "NoNewPrivileges=yes\nLockPersonality=yes\n"
    target = "multi-user.target" if plan.user is not None else "default.target"
    return f"""\
{MARK}
[Unit]
Description=Resumable training run %f
Documentation=man:systemd.service(5)
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=1h
StartLimitBurst=60

[Service]
Type=notify
NotifyAccess=main
ExecStart={quoted(plan.python)} -m resumable_trainer resume %f
ExecStopPost=-{quoted(plan.python)} -m resumable_trainer systemd ended %f
ExecReload=/bin/kill -USR1 $MAINPID
TimeoutStartSec=30min
TimeoutStopSec=90
WatchdogSec={plan.hang_seconds}
KillMode=mixed
Restart=on-failure
RestartSec=5
{steps}RestartForceExitStatus={int(ExitCode.PREEMPTED)} SIGTERM
SuccessExitStatus={int(ExitCode.PREEMPTED)}
RestartPreventExitStatus={" ".join(str(int(code)) for code in _FINAL)}
OOMPolicy=stop
Environment=PYTHONUNBUFFERED=1
{hardening}UMask=0027

[Install]
WantedBy={target}
"""


def drop_in(plan: Plan) -> str:
    """The text of the run's drop-in."""
    strict = " --strict" if plan.strict else ""
    run = quoted(str(plan.directory))
    lines = [
        MARK,
        "[Service]",
        "ExecStart=",
        f"ExecStart={quoted(plan.python)} -m resumable_trainer resume {run}{strict}",
        "ExecStopPost=",
        f"ExecStopPost=-{quoted(plan.python)} -m resumable_trainer systemd ended {run}",
        "WorkingDirectory=%f",  # not the path itself: a backslash or blank at its end would change what follows
    ]
    if plan.user is not None:
        lines.append(f"User={specifiers_escaped(plan.user)}")
        lines += [f"ReadWritePaths={quoted('-' + str(path), is_command=False)}" for path in plan.writable]
    return "\n".join(lines) + "\n"


def escaped_path(path: str) -> str:
    """A path as part of a unit's name, as `systemd-escape --path` gives it (systemd.unit(5))."""
    text = "/".join(part for part in path.split("/") if part) or "/"
    if text == "/":
        return "-"
    return "".join(
        "-"
        if byte == ord("/")
        else chr(byte)
        if chr(byte) in _KEPT and (place or byte != ord("."))
        else f"\\x{byte:02x}"
        for place, byte in enumerate(text.encode("utf-8", "surrogateescape"))
    )


def specifiers_escaped(text: str) -> str:
    """Text in which a percent sign is no specifier."""
    return text.replace("%", "%%")


def quoted(text: str, *, is_command: bool = True) -> str:
    """One word of a unit's value, whatever it holds: quotes, blanks, dollars, percent signs, control characters."""
    text = specifiers_escaped(text)
    if is_command:
        text = text.replace("$", "$$")
    plain = "".join(f"\\x{ord(c):02x}" if ord(c) < 32 or ord(c) == 127 else "\\" + c if c in '\\"' else c for c in text)
    return f'"{plain}"'
