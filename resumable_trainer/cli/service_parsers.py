"""Parsers of the commands about many runs, and of those that write texts for services."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumable_trainer.cli.parsing import add_json, add_run_dir

if TYPE_CHECKING:
    import argparse

    from resumable_trainer.cli.parsing import AnyOrderParser, Commands


def add(commands: Commands) -> None:
    """Declare `systemd`, `runs`, `cron`, `slurm` and `k8s`."""
    _add_systemd(commands)
    runs = commands.add_parser("runs", help="all runs below a directory: state, progress, best, holder, goodput")
    runs.add_argument("root", nargs="?", default="runs", metavar="ROOT", help="default: runs/")
    add_json(runs)
    runs.add_argument("--prometheus", metavar="FILE", help="write FILE.prom for node_exporter's textfile collector")
    _add_cron(commands)
    text = "a batch script for Slurm that queues itself again"
    slurm = _about_run(commands, "slurm", text, {"print": "show the script"})["print"]
    slurm.add_argument("--time", default="24:00:00", help="limit of one job (default: 24:00:00)")
    slurm.add_argument("--warn", type=int, default=120, metavar="S", help="seconds before it (default: 120)")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="as --sbatch=--gres=gpu:1")
    text = "a Job for Kubernetes that is started again after preemptions"
    k8s = _about_run(commands, "k8s", text, {"print": "show the Job"})["print"]
    k8s.add_argument("--image", required=True, help="the container's image")
    k8s.add_argument("--claim", default="runs", help="persistent volume claim of the runs (default: runs)")
    k8s.add_argument("--python", help="interpreter in the image (default: as recorded)")
    k8s.add_argument("--grace", type=int, default=120, metavar="S", help="seconds to save in (default: 120)")


def _add_cron(commands: Commands) -> None:
    actions = {"print": "show the entries", "install": "put them into the crontab", "remove": "take them out again"}
    parsers = _about_run(commands, "cron", "a run in the crontab: at boot, every N minutes", actions)
    for parser in (parsers["print"], parsers["install"]):
        parser.add_argument("--every", type=int, default=5, metavar="N", help="minutes, 1 to 59 (default: 5)")
        parser.add_argument("--strict", action="store_true", help="refuse if what numbers depend on has changed")


def _add_systemd(commands: Commands) -> None:
    actions = {
        "print": "show the units",
        "install": "write, enable and start them",
        "remove": "stop and remove them",
        "ended": "note how the training ended; for the units",
    }
    text = "a run as a unit of systemd: started at boot, watched, restarted"
    for parser in _about_run(commands, "systemd", text, actions).values():
        _add_systemd_options(parser)


def _add_systemd_options(parser: argparse.ArgumentParser) -> None:
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


def _about_run(commands: Commands, name: str, text: str, actions: dict[str, str]) -> dict[str, AnyOrderParser]:
    """A command of several actions upon a run; each a parser, so that options may stand before the run."""
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    choices = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    found = {
        action: choices.add_parser(action, help=about, description=f"{about[0].upper()}{about[1:]}.")
        for action, about in actions.items()
    }
    for one in found.values():
        add_run_dir(one)
    return found
