"""The command line of the benchmark; `scripts/bench` makes the environment and starts it."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import gpu, growth, looking, loops, machine, restarting, restoring, snapshots
from benchmarks.table import Report, Row
from benchmarks.timing import ArmError, Bench

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "scripts" / "bench-results.md"

GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "classic": loops.classic,
    "wide": loops.wide,
    "long": loops.long_steps,
    "stall": snapshots.stalls,
    "small": snapshots.small,
    "interference": snapshots.interference,
    "restore": restoring.restores,
    "restart": restarting.restarts,
    "frozen": snapshots.frozen,
    "growth": growth.growths,
    "looking": looking.lookers,
    "tensors": snapshots.many_tensors,
    "memory": snapshots.memory,
}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--only", metavar="GROUP", type=_groups, default=list(GROUPS), help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller states: 3 to 6 minutes")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every measurement there")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(REPOSITORY)}")
    parser.add_argument("--gpu", action="store_true", help="the part for a GPU instead")
    parser.add_argument("--scratch", metavar="DIR", type=Path, help="on the disk to be measured (default: runs/)")
    return parser.parse_args(given)


def _groups(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in GROUPS]:
        raise argparse.ArgumentTypeError(f"no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    return names


def measure(bench: Bench, groups: dict[str, Callable[[Bench], Iterator[Row]]]) -> Report:
    """All rows; a group that fails is a row that says why, and the others go on."""
    report = Report(machine.facts(bench.scratch))
    report.facts["form"] = "quick" if bench.quick else "full"
    report.facts["threads"] = "1, unless a row says otherwise"
    report.facts["load at start"] = machine.load()
    for name, group in groups.items():
        started = time.perf_counter()
        try:
            snapshots.check_disk(bench)
            report.rows += group(bench)
        except ArmError as error:
            report.rows.append(Row(name, "the whole group", skipped=str(error)))
        bench.say(f"{name}: {time.perf_counter() - started:.0f} s")
    report.facts["load at end"] = machine.load()
    return report


def main() -> None:
    """Measure, and show."""
    args = arguments()
    groups = {"gpu": gpu.on_gpu} if args.gpu else {name: GROUPS[name] for name in args.only}
    root = args.scratch or REPOSITORY / "runs"
    root.mkdir(exist_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=root, ignore_cleanup_errors=True) as scratch:
        bench = Bench(Path(scratch), args.quick, lambda line: print(f"-- {line}", flush=True))
        report = measure(bench, {"machine": machine.limits, **groups})
    report.facts["took"] = f"{(time.perf_counter() - started) / 60:.1f} minutes"
    print(f"\n{report.text()}")
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if args.write:
        RESULTS.write_text(report.markdown())


if __name__ == "__main__":
    main()
