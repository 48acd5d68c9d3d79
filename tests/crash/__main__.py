"""The laboratory's command; started by scripts/crash_lab."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import comparison
from lab import LAYERS, Count, Lab, run_layer, scratch_directory
from seeded import EXPECTED, SCENARIOS_OF, SEEDED, seeded

from resumable_trainer.errors import ResumableTrainerError

_SHOWN = 20


def main() -> int:
    """Run what was asked for; 1 if a promise was broken, or a deliberate fault was missed."""
    parser = argparse.ArgumentParser(prog="crash_lab", description=__doc__)
    parser.add_argument("--long", action="store_true", help="the long form")
    parser.add_argument("--layers", default=",".join(LAYERS), help=f"some of {','.join(LAYERS)}")
    parser.add_argument("--seed", type=int, default=None, help="of what is drawn; printed")
    parser.add_argument(
        "--seeded", action="store_true", help="put in deliberate faults, and say which layer catches them"
    )
    parser.add_argument(
        "--peers", action="store_true", help="compare with what people use; in an environment of its own"
    )
    parser.add_argument("--json", type=Path, help="with --peers: a file for the table and its details")
    options = parser.parse_args()
    names = options.layers.split(",")
    if unknown := [name for name in names if name not in LAYERS]:
        parser.error(f"no such layer: {', '.join(unknown)}; there are {', '.join(LAYERS)}")
    seed = options.seed if options.seed is not None else secrets.randbelow(10**6)
    print(f"crash laboratory, {'long' if options.long else 'short'} form, seed {seed}", flush=True)
    if options.seeded:
        return _run_seeded(names, seed, full=options.long)
    if options.peers:
        names = [name for name in names if name in comparison.LAYERS]
        if not names:
            parser.error(f"--peers knows {', '.join(comparison.LAYERS)}")
        return _compare(names, Lab(long=options.long, seed=seed, scratch=Path(), say=_say), options.json)
    counts = [_run(name, Lab(long=options.long, seed=seed, scratch=Path())) for name in names]
    skipped = sum(count.skipped is not None for count in counts)
    broken = sum(len(count.violations) for count in counts)
    print(f"{sum(count.tried for count in counts):,} faults tried, {broken} violations, {skipped} layers skipped")
    return 1 if broken else 0


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def _run(name: str, lab: Lab) -> Count:
    started = time.monotonic()
    count = _in_scratch(name, lab)
    print(f"{name}  {count}  {time.monotonic() - started:.0f} s", flush=True)
    for line in count.violations[:_SHOWN]:
        print(f"    {line}")
    return count


def _in_scratch(name: str, lab: Lab) -> Count:
    with scratch_directory() as scratch:
        return run_layer(
            name, Lab(long=lab.long, seed=lab.seed, scratch=scratch, say=lambda line: print(f"{name}  {line}"))
        )


def _under_fault(name: str, lab: Lab) -> Count:
    """A layer that cannot even be made ready over the fault has found it."""
    try:
        return _in_scratch(name, lab)
    except ResumableTrainerError as error:
        return Count(tried=1, violations=[f"{type(error).__name__}: {error}"])


def _run_seeded(names: list[str], seed: int, *, full: bool) -> int:
    """Every deliberate fault must be caught by a layer, and every layer that can be run here must catch one.

    The short table tries each fault in the layers that are expected to catch it; the full one in all.
    """
    catches: Counter[str] = Counter()
    missed, skipped = [], set()
    for fault in SEEDED:
        found = {}
        for name in names:
            if not full and name not in EXPECTED[fault]:
                continue
            lab = Lab(long=False, seed=seed, scratch=Path(), scenarios=SCENARIOS_OF.get(fault))
            with seeded(fault):
                count = _under_fault(name, lab)
            found[name] = len(count.violations)
            catches[name] += bool(count.violations)
            skipped |= {name} if count.skipped is not None else set()
        by = ", ".join(f"{name} {number}" for name, number in found.items() if number)
        print(f"{fault:45} {'caught by ' + by if by else 'MISSED'}", flush=True)
        if not by and any(name in names for name in EXPECTED[fault]):
            missed.append(fault)
    idle = [name for name in names if not catches[name] and name not in skipped]
    print(f"{len(SEEDED)} deliberate faults, {len(missed)} missed; caught by layer: {dict(catches)}")
    print(f"layers that caught none: {', '.join(idle) or 'none'}; skipped: {', '.join(sorted(skipped)) or 'none'}")
    return 1 if missed or idle else 0


def _compare(names: list[str], lab: Lab, to: Path | None) -> int:
    """The package's own row must have been tried, and be without violations; peers may break what they like."""
    with scratch_directory() as scratch:
        rows = comparison.compare(replace(lab, scratch=scratch), layers=names)
    print(comparison.table(rows))
    if to is not None:
        to.write_text(comparison.as_json(rows, lab))
    unknown = [row.peer for row in rows if any(tally.unknown for tally in row.tallies.values())]
    return 0 if rows[-1].is_clean and not unknown else 1


if __name__ == "__main__":
    sys.exit(main())
