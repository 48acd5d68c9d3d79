"""Whether a run directory, in whatever state a fault has left it, is what the contract promises.

The real recovery code opens it; what it gives is compared with golden values made here, not with the package's
own digests, as an oracle that shares the code's mistakes finds none of them.
"""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from scenarios import Training, Values, manager_of, name_of, save

from resumable_trainer.errors import ResumableTrainerError
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scenarios import Scenario

_EPOCH_NAME = re.compile(r"step-(\d+)(-epoch-\d+)?")


def order(name: str) -> tuple[int, bool]:
    """Newer snapshots compare greater."""
    match = _EPOCH_NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1]), match[2] is not None


def violations(directory: Path, scenario: Scenario, acked: Sequence[str]) -> list[str]:
    """Promises that a directory breaks; empty if it keeps them all. Changes the directory as a new start would.

    Args:
        directory: The run directory after the fault.
        scenario: What was under way.
        acked: Snapshots that had been acknowledged.
    """
    try:
        of_kind = _of_run if scenario.is_run else _of_snapshots
        broken = of_kind(directory, scenario, acked)
    except ResumableTrainerError as error:
        broken = [f"recovery refuses: {type(error).__name__}: {error}"]
    except Exception as error:  # noqa: BLE001 - whatever it is, a user would see it
        broken = [f"recovery breaks down: {type(error).__name__}: {error}"]
    return [f"{scenario.name}: {line}" for line in broken]


def _of_snapshots(directory: Path, scenario: Scenario, acked: Sequence[str]) -> list[str]:
    values = Values()
    with manager_of(directory, values) as manager:
        found = manager.restore().snapshot
        broken = _lost(found, scenario, acked) + ([] if found is None else _wrong(values, found))
        if found is not None and found != (latest := manager.store.names()[-1]):
            broken.append(f"restored {found} although {latest} counts")
        # What stays behind must not stand in the way of the next snapshot.
        nonce = 1 + (0 if found is None else order(found)[0])
        save(manager, values, nonce)
    again = Values()
    with manager_of(directory, again) as manager:
        if manager.restore().snapshot != name_of(nonce):
            broken.append("the snapshot after the recovery is not found")
        broken += _wrong(again, name_of(nonce))
    return broken


def _lost(found: str | None, scenario: Scenario, acked: Sequence[str]) -> list[str]:
    """What must be there at least: the newest acknowledged, else what was durable before and not given up."""
    owed = [name for name in scenario.durable_before if name not in scenario.gives_up]
    owed = list(acked[-1:]) or owed[-1:]
    if not owed or (found is not None and order(found) >= order(owed[0])):
        return []
    return [f"{owed[0]} was durable, found is {found}"]


def _wrong(values: Values, name: str) -> list[str]:
    """How a restored state differs from the one that was at its step."""
    step = order(name)[0]
    broken = []
    golden, got = Values(step).state_dict(), values.loaded
    if got["words"] != golden["words"]:
        broken.append(f"{name}: words are {got['words']}")
    pairs = [(golden["weights"], got["weights"]), *zip(golden["moments"], got["moments"], strict=True)]
    if any(one.dtype != other.dtype or not torch.equal(one, other) for one, other in pairs):
        broken.append(f"{name}: tensors are not those of step {step}")
    now = torch.get_rng_state()
    torch.manual_seed(step)
    if not torch.equal(now, torch.get_rng_state()):
        broken.append(f"{name}: generators are not those of step {step}")
    return broken


def _of_run(directory: Path, scenario: Scenario, acked: Sequence[str]) -> list[str]:
    """Training on to the end must give what a run that never was disturbed gives, byte for byte."""
    newest = Store(directory).newest_valid(on_damage=lambda name, error: None)
    broken = _lost(newest.name if newest else None, scenario, acked)
    training = Training()
    training.train(directory)
    rows, wanted = golden_run()
    if (directory / "metrics.jsonl").read_bytes() != rows:
        broken.append("the metric rows are not those of an undisturbed run")
    if parameters(training) != wanted:
        broken.append("the parameters are not those of an undisturbed run")
    return broken


@functools.cache
def golden_run() -> tuple[bytes, bytes]:
    """Rows and parameters of a run that nothing disturbs."""
    training = Training()
    with tempfile.TemporaryDirectory() as directory:
        training.train(Path(directory) / "run")
        return (Path(directory) / "run/metrics.jsonl").read_bytes(), parameters(training)


def parameters(training: Training) -> bytes:
    """Bytes of a training's parameters and moments."""
    tensors = [*training.model.parameters(), *(s["momentum_buffer"] for s in training.optimizer.state.values())]
    return b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)
