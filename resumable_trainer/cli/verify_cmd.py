"""`verify`: check every byte of a run's snapshots, and its metric journal against their marks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from resumable_trainer.cli.output import run_directory
from resumable_trainer.durable.digest import Digest, reading
from resumable_trainer.errors import ExitCode
from resumable_trainer.report.summary import Entry, entries
from resumable_trainer.snapshot.layout import METRICS

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

_CHUNK_BYTES = 1 << 20


def run(args: argparse.Namespace) -> int:
    """Print what is valid and what is not; 65 if anything is damaged."""
    directory = run_directory(args)
    found = entries(directory)
    reason = _journal_damage(directory, found)
    damaged = [entry for entry in found if entry.reason is not None]
    if args.json:
        print(json.dumps(_as_json(directory, found, reason), indent=2))
    else:
        for entry in found:
            print(f"{entry.name}: {'valid' if entry.reason is None else 'DAMAGED: ' + entry.reason}")
        if any(entry.manifest is not None for entry in found):
            print(f"{METRICS}: {'valid' if reason is None else 'DAMAGED: ' + reason}")
        print(f"{len(found) - len(damaged)} of {len(found)} snapshots are valid")
    return int(ExitCode.NO_VALID_SNAPSHOT) if damaged or reason else int(ExitCode.DONE)


def _as_json(directory: Path, found: list[Entry], reason: str | None) -> dict[str, Any]:
    return {
        "run_dir": str(directory),
        "valid": reason is None and all(entry.reason is None for entry in found),
        "snapshots": [{"name": e.name, "valid": e.reason is None, "reason": e.reason} for e in found],
        "metrics": {"valid": reason is None, "reason": reason},
    }


def _journal_damage(directory: Path, found: list[Entry]) -> str | None:
    """Why the journal is not what the valid snapshots count; None if it is. Read once, mark by mark."""
    marks = sorted(
        {
            (entry.manifest.journal.num_bytes, entry.manifest.journal.digest)
            for entry in found
            if entry.manifest is not None and entry.reason is None and entry.manifest.journal is not None
        }
    )
    if not marks:
        return None
    digest = Digest()
    try:
        with reading(directory / METRICS) as file:
            for num_bytes, expected in marks:
                while digest.num_bytes < num_bytes:
                    chunk = file.read(min(_CHUNK_BYTES, num_bytes - digest.num_bytes))
                    if not chunk:
                        return f"it has {digest.num_bytes} bytes, a snapshot counts {num_bytes}"
                    digest.update(chunk)
                now = digest.value().digest
                if now != expected:
                    return f"its first {num_bytes} bytes have digest {now[:8]}.., a snapshot counts {expected[:8]}.."
    except FileNotFoundError:
        return "it is missing"
    except ValueError as error:
        return str(error)
    return None
