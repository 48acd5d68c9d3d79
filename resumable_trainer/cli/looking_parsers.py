"""Parsers of the commands that look at a run, and of those that copy, prune and stop it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumable_trainer.cli.parsing import add_command, add_json, add_looking

if TYPE_CHECKING:
    from resumable_trainer.cli.parsing import Commands


def add(commands: Commands) -> None:
    """Declare `list`, `status`, `show`, `verify`, `diff`, `fork`, `prune`, `export`, `import`, `plot` and `stop`."""
    add_looking(commands, "list", "the snapshots of a run, verified", "resumable-trainer list runs/pima")
    add_looking(commands, "status", "where a run stands, and who runs it", "resumable-trainer status --json")
    show = add_looking(commands, "show", "what is in one snapshot", "resumable-trainer show runs/pima best")
    show.add_argument("which", nargs="?", default="latest", help="latest, best, a STEP, epoch:N or a name")
    _add_verify(commands)
    _add_diff(commands)
    _add_fork(commands)
    _add_prune(commands)
    _add_export(commands)
    _add_import(commands)
    plot = add_looking(commands, "plot", "draw the curves of a run", "resumable-trainer plot runs/pima -o pima.svg")
    plot.add_argument("-o", "--output", metavar="FILE", help="PNG, SVG or PDF (default: RUN_DIR/history.png)")
    stop = add_looking(
        commands, "stop", "ask the process that runs it to save and leave", "resumable-trainer stop --timeout 60"
    )
    stop.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds to wait (default: 300)")


def _add_verify(commands: Commands) -> None:
    parser = add_looking(
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


def _add_diff(commands: Commands) -> None:
    parser = add_command(
        commands,
        "diff",
        "what two snapshots differ in; exit 0 if nothing, 1 if something",
        description="What two snapshots differ in: position, metrics, settings, every part tensor by tensor,"
        " generators. Exit code 0 if they are the same, 1 if they differ. Which launch wrote them, and when, does not"
        " count.",
        examples="resumable-trainer diff 400 latest            two snapshots of the most recent run\n"
        "  resumable-trainer diff runs/a:best latest    two snapshots of runs/a\n"
        "  resumable-trainer diff runs/a runs/b         the newest of two runs\n"
        "  resumable-trainer diff runs/a:epoch:3 runs/b:epoch:3",
    )
    words = "RUN_DIR, RUN_DIR:WHICH, WHICH (latest, best, a STEP, epoch:N), or the path of a snapshot"
    parser.add_argument("a", metavar="A", help=words)
    parser.add_argument("b", metavar="B", help="the same; WHICH alone is looked for in the run of A")
    add_json(parser)


def _add_fork(commands: Commands) -> None:
    parser = add_command(
        commands,
        "fork",
        "a new run from any snapshot of another",
        description="Make a new run from a copy of a snapshot, with its metrics so far and its lineage recorded. The"
        " other run is not touched, and may be training.",
        examples="resumable-trainer fork runs/pima runs/pima-2 --from best\n"
        "  resumable-trainer resume runs/pima-2               the same command, continuing the fork\n"
        "  resumable-trainer fork runs/a/set-aside/line-1/step-000000400 runs/b",
    )
    parser.add_argument("run", metavar="RUN", help="RUN_DIR, RUN_DIR:WHICH, or the path of a snapshot")
    parser.add_argument("new_run", metavar="NEW_RUN", help="the new run directory; the name must be free")
    parser.add_argument("--from", dest="which", help="latest, best, a STEP or epoch:N (default: latest)")
    add_json(parser)


def _add_prune(commands: Commands) -> None:
    parser = add_looking(
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


def _add_export(commands: Commands) -> None:
    parser = add_looking(
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


def _add_import(commands: Commands) -> None:
    parser = add_command(
        commands,
        "import",
        "a new run from a checkpoint of torch.save or safetensors",
        description="Make a new run from a checkpoint that something else wrote. Only tensors and plain values are"
        " taken (torch.load with weights_only, and nothing less). Generators, the place in the data and early stopping"
        " are not in such a file and begin anew.",
        examples="resumable-trainer import old.pt runs/new --epoch 10 --step 7000\n"
        "  resumable-trainer import lightning.ckpt runs/new --strip model. --map scheduler=\n"
        "  resumable-trainer import old.pt runs/new --map model=net --map optimizer=opts.0",
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
    add_json(parser)
