"""`export`: the weights of a snapshot as a safetensors file, or a part's state as a file of torch.save."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.cli.output import run_directory, size
from resumable_trainer.errors import NotFoundError
from resumable_trainer.snapshot.exporting import choose_part, export_safetensors, export_torch
from resumable_trainer.snapshot.selected import Selected, select
from resumable_trainer.snapshot.values import read_values

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Write the file, and say what is in it."""
    source = _source(run_directory(args), args.which)
    part = choose_part(read_values(source.path, source.manifest), args.part)
    target = Path(args.output)
    export = export_torch if args.format == "torch" else export_safetensors
    written = export(source, part, target, replacing=args.force)
    if args.json:
        fields = {
            "file": str(target),
            "format": args.format,
            "run_dir": str(source.run),
            "snapshot": source.manifest.name,
            "part": part,
            **asdict(written),
            "skipped": dict(source.skipped),
        }
        print(json.dumps(fields, indent=2))
        return 0
    for name, reason in source.skipped.items():
        print(f"passed over {name}: {reason}")
    tensors = "" if written.num_tensors is None else f"{written.num_tensors} tensors, "
    tied = f"; under a second name: {', '.join(written.tied)}" if written.tied else ""
    print(f"export  {part} of {source.path}: {tensors}{size(written.num_bytes)}{tied}")
    print(f"file    {target}")
    return 0


def _source(directory: Path, which: str | None) -> Selected:
    """The snapshot that was named; else the best, else the newest that verifies."""
    if which is not None:
        return select(directory, which)
    try:
        return select(directory, "best")
    except NotFoundError:
        return select(directory, "latest")
