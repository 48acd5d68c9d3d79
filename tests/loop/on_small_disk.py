"""A training on a disk that somebody else fills in its middle; started by test_full_disk.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from small import Small

from resumable_trainer import SnapshotPolicy

BACKGROUND = sys.argv[2] == "background"
BALLAST = Path(sys.argv[1]).with_name("ballast")


def fill(run: object) -> None:
    """Take all that is left, once, in the middle of the second of three epochs."""
    if run.step != 6 or os.path.exists("filled"):  # type: ignore[attr-defined]
        return
    Path("filled").touch()
    with BALLAST.open("wb", buffering=0) as file:
        for piece in (bytes(1 << 20), bytes(4096), b"\0"):
            try:
                while True:
                    file.write(piece)
            except OSError:
                continue


torch.set_num_threads(1)  # as the tests themselves do
small = Small(at_step=fill)
try:
    small.train(Path(sys.argv[1]), snapshots=SnapshotPolicy(every_steps=1, background=BACKGROUND), progress=None)
finally:
    Path("parameters").write_bytes(b"".join(p.detach().numpy().tobytes() for p in small.model.parameters()))
    Path("epochs").write_text(str(sorted({epoch for epoch, _ in small.seen})))
