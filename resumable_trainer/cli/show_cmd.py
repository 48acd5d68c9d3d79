"""`show`: what is in one snapshot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from resumable_trainer.cli.output import run_directory, size, table
from resumable_trainer.report.summary import origin, origin_text
from resumable_trainer.snapshot.layout import TENSORS_SUFFIX
from resumable_trainer.snapshot.raw import RawTensorFile
from resumable_trainer.snapshot.store import Store, still_there

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from resumable_trainer.snapshot.manifest import Manifest


def run(args: argparse.Namespace) -> int:
    """Print a snapshot's manifest, its files and how many tensors they hold."""
    directory, which = run_directory(args), args.which
    store = Store(directory)
    manifest = store.verify(store.select(which))
    path = store.path(manifest.name)
    fields = manifest.model_dump(mode="json")
    fields["path"] = str(path)
    with still_there(path):
        fields["tensors"] = _tensors(path, manifest)
    came_from = origin(directory)
    print(json.dumps({**fields, **came_from}, indent=2) if args.json else _text(fields, manifest, came_from))
    return 0


def _tensors(path: Path, manifest: Manifest) -> dict[str, int]:
    """Tensors in each file; the files are verified, their headers are believed no further than they fit."""
    counts = {}
    for name in manifest.files:
        if name.endswith(TENSORS_SUFFIX):
            with RawTensorFile(path / name) as file:
                counts[name] = len(file.names())
    return counts


def _text(fields: dict[str, Any], manifest: Manifest, came_from: dict[str, Any]) -> str:
    lines = [
        f"snapshot  {fields['path']}",
        f"position  {manifest.place}, step {manifest.position.step}",
        f"created   {manifest.created} by generation {manifest.generation}, run {manifest.run_id}",
        f"parent    {manifest.parent or 'none'}",
    ]
    if came_from:
        lines.append(f"origin    {origin_text(came_from)}")
    if manifest.outcome:
        lines.append(f"outcome   {manifest.outcome.replace('_', ' ')}")
    if manifest.best:
        lines.append(f"best      {manifest.best.metric} {manifest.best.value:.4f} @ epoch {manifest.best.epoch + 1}")
    lines += [f"metric    {name} {value}" for name, value in manifest.metrics.items()]
    lines += [f"depends   {name} {value}" for name, value in manifest.depends_on.items()]
    rows = [
        [name, size(entry.num_bytes), fields["tensors"].get(name, ""), entry.digest]
        for name, entry in manifest.files.items()
    ]
    return "\n".join([*lines, "", table(["file", "size", "tensors", "xxh3-128"], rows)])
