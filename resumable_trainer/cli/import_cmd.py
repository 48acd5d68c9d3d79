"""`import`: a new run from a checkpoint of torch.save or safetensors, read without running any of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumable_trainer.errors import UsageError
from resumable_trainer.snapshot.layout import Position, epochs_in_words
from resumable_trainer.snapshot.new_run import refuse_taken

if TYPE_CHECKING:
    import argparse

    from resumable_trainer.snapshot.importing import Recognised


def run(args: argparse.Namespace) -> int:
    """Read, make the run, and say what was taken and what continues it."""
    # torch is needed here, and only here: --help and wrong options are answered without.
    mapping = _mapping(args.map)
    target, file = Path(args.new_run), Path(args.file)
    refuse_taken(target.absolute())  # before a large file is read
    from resumable_trainer.loop.identity import versions
    from resumable_trainer.snapshot.importing import import_run, read_checkpoint, recognise
    from resumable_trainer.state.parts import name_problems

    problems = [problem for name in mapping for problem in name_problems(name)]
    if problems:
        raise UsageError("import: " + "; ".join(problems), found=problems)
    checkpoint = read_checkpoint(file)
    for line in checkpoint.warnings:
        print(f"warning {line}", file=sys.stderr)
    found = recognise(checkpoint.content, mapping=mapping, strip=args.strip)
    position = _position(args, found)
    manifest = import_run(target, checkpoint, found, position, versions=versions())
    fields = {
        "run_dir": str(target),
        "run_id": manifest.run_id,
        "snapshot": manifest.name,
        "parts": dict(found.keys),
        "not_taken": list(found.not_taken),
        "epoch": position.epoch,
        "batch": position.batch,
        "step": position.step,
        "imported_from": {"file": str(file.resolve()), "digest": checkpoint.digest},
    }
    print(json.dumps(fields, indent=2) if args.json else _text(fields, found, args))
    return 0


def _mapping(words: list[str]) -> dict[str, str]:
    """`NAME=KEY`, each once."""
    mapping: dict[str, str] = {}
    for word in words:
        name, sign, key = word.partition("=")
        if not sign or name in mapping:
            raise UsageError(f"import: --map {word!r} is not NAME=KEY, or its name was given twice")
        mapping[name] = key
    return mapping


def _position(args: argparse.Namespace, found: Recognised) -> Position:
    """As asked for, else as the file has it.

    Raises:
        UsageError: Neither says it, or it cannot be.
    """
    epoch: int | None = found.epoch[0] if args.epoch is None and found.epoch else args.epoch
    step: int | None = found.step[0] if args.step is None and found.step else args.step
    if epoch is None or step is None:
        missing = [name for name, value in (("--epoch", epoch), ("--step", step)) if value is None]
        raise UsageError(
            f"the file does not say where the training stood: give {' and '.join(missing)}",
            hint="epochs that are complete, and batches trained since the start",
        )
    if min(epoch, args.batch, step) < 0 or max(epoch, args.batch, step) >= 10**15 or args.batch > step:
        raise UsageError(f"epoch {epoch}, batch {args.batch}, step {step} is no position")
    return Position(epoch, args.batch, step)


def _text(fields: dict[str, Any], found: Recognised, args: argparse.Namespace) -> str:
    lines = [f"import  {name} from {key or 'the whole file'}" for name, key in fields["parts"].items()]
    if fields["not_taken"]:
        lines.append(f"left    not taken: {', '.join(fields['not_taken'])}")
    lines += _place(fields, found, args)
    lines.append(f"made    {fields['run_dir']} (run {fields['run_id']}), {fields['snapshot']}")
    state = ", ".join(f'"{name}": ...' for name in fields["parts"])
    lines.append(f'next    start a script with Run("{fields["run_dir"]}", state={{{state}}})')
    return "\n".join(lines)


def _place(fields: dict[str, Any], found: Recognised, args: argparse.Namespace) -> list[str]:
    epoch, step = fields["epoch"], fields["step"]
    batch = fields["batch"]
    place = f"within epoch {epoch + 1}, {batch} batches done" if batch else epochs_in_words(epoch)
    lines = [f"at      {place}, step {step}"]
    if args.epoch is None and found.epoch is not None:
        lines.append(
            f"        {found.epoch[1]!r} in the file is {epoch}; if that numbers epochs from 0 and this one was over,"
            f" it should be --epoch {epoch + 1}"
        )
    if args.step is None and found.step is not None:
        lines.append(f"        {found.step[1]!r} in the file is {step}")
    return lines
