"""Parsers of the commands about many runs, and of those that write texts for services."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumable_trainer.cli.parsing import add_command, add_json, add_run_dir

if TYPE_CHECKING:
    import argparse

    from resumable_trainer.cli.parsing import Commands


def add(commands: Commands) -> None:
    """Declare `systemd`, `runs`, `cron`, `slurm` and `k8s`."""
    _add_systemd(commands)
    runs = commands.add_parser("runs", help="all runs below a directory: state, progress, best, holder, goodput")
    runs.add_argument("root", nargs="?", default="runs", metavar="ROOT", help="default: runs/")
    runs.add_argument("--json", action="store_true", help="print JSON for programs")
    runs.add_argument("--prometheus", metavar="FILE", help="write FILE.prom for node_exporter's textfile collector")
    cron = _about_run(
        commands, "cron", ["print", "install", "remove"], "a run in the crontab: at boot, every N minutes"
    )
    cron.add_argument("--every", type=int, default=5, metavar="N", help="minutes, 1 to 59 (default: 5)")
    cron.add_argument("--strict", action="store_true", help="refuse if what numbers depend on has changed")
    slurm = _about_run(commands, "slurm", ["print"], "a batch script for Slurm that queues itself again")
    slurm.add_argument("--time", default="24:00:00", help="limit of one job (default: 24:00:00)")
    slurm.add_argument("--warn", type=int, default=120, metavar="S", help="seconds before it (default: 120)")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="as --sbatch=--gres=gpu:1")
    k8s = _about_run(commands, "k8s", ["print"], "a Job for Kubernetes that is started again after preemptions")
    k8s.add_argument("--image", required=True, help="the container's image")
    k8s.add_argument("--claim", default="runs", help="persistent volume claim of the runs (default: runs)")
    k8s.add_argument("--python", help="interpreter in the image (default: as recorded)")
    k8s.add_argument("--grace", type=int, default=120, metavar="S", help="seconds to save in (default: 120)")


def _about_run(commands: Commands, name: str, actions: list[str], text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("action", choices=actions)
    add_run_dir(parser)
    return parser


def _add_systemd(commands: Commands) -> None:
    parser = add_command(
        commands,
        "systemd",
        "a run as a unit of systemd: started at boot, watched, restarted",
        description="Units for a run that was started once: a template for all, and what is particular to this one.",
        examples="resumable-trainer systemd print runs/pima\n"
        "  sudo resumable-trainer systemd install runs/pima\n  resumable-trainer systemd install --user runs/pima",
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
    add_run_dir(parser)
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
    add_json(parser)
