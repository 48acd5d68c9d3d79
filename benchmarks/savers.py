"""Ways to save a model, its optimizer and the generators: the package's and its peers', all with the same content.

Each gives the seconds for which the training thread was held up, and those until the state was durable.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from resumable_trainer import StateManager

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn


class _InBackground:
    """Saves beside the training, in two calls."""

    def begin(self) -> Any:
        """Take a snapshot; returns when training may go on."""
        raise NotImplementedError

    def finish(self) -> None:
        """Wait until it is durable."""
        raise NotImplementedError

    def save(self) -> tuple[float, float]:
        """(stall, time to durable) of one snapshot."""
        started = time.perf_counter()
        self.begin()
        stalled = time.perf_counter() - started
        self.finish()
        return stalled, time.perf_counter() - started


class Own(_InBackground):
    """The package's StateManager.

    Args:
        directory: The run directory.
        parts: What it saves.
        keep: Whether all snapshots are kept, and removed by hand between measurements, as peers' files are.
        staging: How it copies.
    """

    def __init__(
        self,
        directory: Path,
        parts: dict[str, object],
        *,
        keep: bool = True,
        staging: Literal["copy", "overlapped"] = "copy",
    ) -> None:
        retain = (lambda kept: []) if keep else None
        self.manager = StateManager(directory, state=parts, retain=retain, staging=staging).open()
        self._keep, self._step = keep, 0

    def begin(self) -> Any:
        """Take a snapshot in the background; what stands for it."""
        self._step += 1
        return self.manager.snapshot(epoch=0, batch=self._step, step=self._step)

    def finish(self) -> None:
        """Wait until it is durable."""
        self.manager.wait()

    def tidy(self) -> None:
        """Remove all snapshots but the newest."""
        for path in sorted((self.manager.directory / "snapshots").glob("step-*"))[:-1]:
            shutil.rmtree(path)


class TorchSave:
    """`torch.save` to a new file, synced: what a careful loop has."""

    def __init__(self, directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.path, self._model, self._optimizer = directory / "last.pt", model, optimizer

    def save(self) -> tuple[float, float]:
        """(stall, time to durable): the same, as it saves in the foreground."""
        started = time.perf_counter()
        self.begin()
        taken = time.perf_counter() - started
        return taken, taken

    def begin(self) -> None:
        """Save, all of it."""
        torch.save(content(self._model, self._optimizer), self.path)
        sync(self.path)
        sync(self.path.parent)

    def finish(self) -> None:
        """Nothing is left to do."""

    def tidy(self) -> None:
        """Remove the file."""
        self.path.unlink()


class Distributed(_InBackground):
    """`torch.distributed.checkpoint.async_save` of one process, into a new directory; its files are synced."""

    def __init__(self, directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> None:
        self._directory, self._model, self._optimizer = directory, model, optimizer
        self._settings, self._number = settings, 0
        self._future: Any = None

    def begin(self) -> None:
        """Begin a checkpoint in the background."""
        import torch.distributed.checkpoint as dcp

        self._number += 1
        target = self._directory / f"step-{self._number}"
        response = dcp.async_save(content(self._model, self._optimizer), checkpoint_id=target, **self._settings)
        self._future = getattr(response, "upload_completion", response)

    def finish(self) -> None:
        """Wait until it is durable."""
        self._future.result()

    def tidy(self) -> None:
        """Remove all checkpoints."""
        for path in self._directory.glob("step-*"):
            shutil.rmtree(path)


def content(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a loop saves that wants to resume: as much as the package does by itself."""
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1]),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "position": {"epoch": 0, "batch": 0, "step": 0},
    }


def sync(path: Path) -> None:
    """Make a file or directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def settle(savers: Sequence[Any] = ()) -> None:
    """Tidy up, and let the disk come to rest: nobody pays for what another has left dirty."""
    for saver in savers:
        saver.tidy()
    os.sync()
