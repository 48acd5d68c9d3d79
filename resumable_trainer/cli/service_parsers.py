"""Parsers of the commands about many runs, and of those that write texts for services."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add(commands: Commands) -> None:
    """Declare `runs`, `cron`, `slurm` and `k8s`."""
    runs = commands.add_parser("runs", help="all runs below a directory: state, progress, best, holder, goodput")
    runs.add_argument("root", nargs="?", default="runs", metavar="ROOT", help="default: runs/")
    runs.add_argument("--json", action="store_true", help="print JSON for programs")
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


def _about_run(commands: Commands, name: str, text: str, actions: dict[str, str]) -> dict[str, argparse.ArgumentParser]:
    """A command of several actions upon a run; each a parser, so that options may stand before the run."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    choices = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    found = {action: choices.add_parser(action, help=about) for action, about in actions.items()}
    for one in found.values():
        one.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="default: the most recent run below runs/")
    return found
