"""Any PyTorch training loop, killed at any instant, continues as if nothing had happened, to the bit.

The house, floor by floor; a room imports only from floors below it (a test reads the imports):

    floor 0  errors       every error and its exit code
             garbage      a rest for Python's garbage collector
    floor 1  durable/     bytes that survive power loss: files, digests, journals, the lock
    floor 2  snapshot/    the record on disk: tensors, typed JSON, manifest, store, retention
                          (and the scribe, a process beside the training for small snapshots that come often)
             state/       what a run is in memory: parts, generators, stable copies
             data/        the order of data as a pure function; batches from any data
             metrics/     history, running averages, early stopping
    floor 3  manager/     StateManager: state/ and snapshot/ meet here, and nowhere else
    floor 4  loop/        Run: epochs, batches, notices, divergence, progress, drift
    floor 5  trainer/     Trainer, written with Run; its compiled steps
             proof/       a job killed on purpose, or replayed, and compared: doctor, verify --replay
             report/      read-only views of a run
             service/     staying alive: the supervisor; texts for systemd, cron, Slurm, Kubernetes
    floor 6  cli/         one file per command

Public names load on first use, so that commands that only look never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from resumable_trainer.garbage import WithoutCollections

if TYPE_CHECKING:
    from resumable_trainer.errors import (
        DamagedSnapshotError,
        DivergedError,
        DriftError,
        ExitCode,
        Interrupted,
        NotFoundError,
        NoValidSnapshotError,
        Preempted,
        ResumableTrainerError,
        RunHeldError,
        SettingsError,
        SnapshotWriteError,
        StateMismatchError,
        Stopped,
        UnsafeValueError,
        UsageError,
    )
    from resumable_trainer.loop.divergence import OnDivergence
    from resumable_trainer.loop.run import Run
    from resumable_trainer.loop.triggers import SnapshotPolicy
    from resumable_trainer.manager import RestoreReport, StateManager
    from resumable_trainer.metrics.early_stopping import EarlyStopping
    from resumable_trainer.metrics.history import History
    from resumable_trainer.snapshot.pending import PendingSnapshot
    from resumable_trainer.trainer.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "DamagedSnapshotError": "errors",
    "DivergedError": "errors",
    "DriftError": "errors",
    "EarlyStopping": "metrics.early_stopping",
    "ExitCode": "errors",
    "History": "metrics.history",
    "Interrupted": "errors",
    "NoValidSnapshotError": "errors",
    "NotFoundError": "errors",
    "OnDivergence": "loop.divergence",
    "PendingSnapshot": "snapshot.pending",
    "Preempted": "errors",
    "ResumableTrainerError": "errors",
    "RestoreReport": "manager",
    "Run": "loop.run",
    "RunHeldError": "errors",
    "SettingsError": "errors",
    "SnapshotPolicy": "loop.triggers",
    "SnapshotWriteError": "errors",
    "StateManager": "manager",
    "StateMismatchError": "errors",
    "Stopped": "errors",
    "Trainer": "trainer.trainer",
    "UnsafeValueError": "errors",
    "UsageError": "errors",
}

__all__ = [
    "DamagedSnapshotError",
    "DivergedError",
    "DriftError",
    "EarlyStopping",
    "ExitCode",
    "History",
    "Interrupted",
    "NoValidSnapshotError",
    "NotFoundError",
    "OnDivergence",
    "PendingSnapshot",
    "Preempted",
    "RestoreReport",
    "ResumableTrainerError",
    "Run",
    "RunHeldError",
    "SettingsError",
    "SnapshotPolicy",
    "SnapshotWriteError",
    "StateManager",
    "StateMismatchError",
    "Stopped",
    "Trainer",
    "UnsafeValueError",
    "UsageError",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # importlib, not `from . import x`: inside a module's __getattr__ the statement would call itself for ever.
    with WithoutCollections():  # they would walk all that torch has loaded, which takes as long as the import itself
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
