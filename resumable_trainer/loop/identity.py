"""Drift: what a run depends on, and what of it has changed since the snapshot.

Facts are plain values by name. The ones recorded in a snapshot are compared with today's, one line
per change, before training goes on; `strict` turns the lines into a refusal. What may change
freely without changing a number (worker count, progress bar, patience, total epochs) is no fact.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from resumable_trainer.durable.digest import digest_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from resumable_trainer.loop.launch import Command

_CONSEQUENCE = {
    "script": "the script's new text counts",
    "device": "numbers may differ in the last bits",
    "threads": "numbers may differ in the last bits",
    "torch": "numbers may differ in the last bits",
    "python": "numbers may differ in the last bits",
    "machine": "numbers may differ in the last bits",
    "determinism": "numbers may differ in the last bits",
    "precision": "numbers may differ in the last bits",
    "seed": "the order of data differs from here on",
    "steps": "numbers may differ in the last bits",
    "compiled for": "numbers may differ in the last bits",
}
OF_STEPS = ("steps", "compiled for")
EAGER = {"steps": "eager"}
"""How a training steps that does not say so: facts are recorded of compiled steps alone."""


def current_facts(command: Command, *, seed: int, state: Mapping[str, object]) -> dict[str, Any]:
    """What the numbers of this run depend on, as it is today."""
    return {
        "script": script_digest(command),
        "seed": seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device_kind(state),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
    }


def script_digest(command: Command) -> str | None:
    """Digest of the script; None where there is none (a notebook, an interactive session)."""
    path = command.script
    if path is None:
        main = sys.modules.get("__main__")
        path = getattr(main, "__file__", None) if command.module else None
    try:
        return digest_bytes(Path(path).read_bytes()) if path else None
    except OSError:
        return None


def device_kind(state: Mapping[str, object]) -> str:
    """Kind of device on which the first module's parameters live: "cpu", or the accelerator's name."""
    for part in state.values():
        if isinstance(part, torch.nn.Module):
            for tensor in part.parameters():
                if tensor.device.type == "cuda":
                    return torch.cuda.get_device_name(tensor.device)
                return tensor.device.type
    return "cpu"


def drift(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per fact that has changed; facts known on one side only are no change."""
    lines = []
    for name, before in saved.items():
        if name in now and now[name] != before:
            consequence = _CONSEQUENCE.get(name, "the order or content of the data may differ")
            lines.append(f"{name} was {_show(name, before)}, now {_show(name, now[name])}; {consequence}")
    return lines


def settings_drift(saved: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per setting that the script builds differently now, and that loading overrides.

    Optimizers and schedulers keep settings in their state (learning rate, patience of
    ReduceLROnPlateau, base_lrs): the saved one counts, and the person must know.
    """
    lines = []
    for part, before in saved.items():
        after = now.get(part, {})
        for name, value in before.items():
            if name in after and not _same(after[name], value):
                lines.append(
                    f"{part}: {name} was {value!r} when the run began, the script now says {after[name]!r};"
                    " the saved value counts"
                )
    return lines


def _same(a: object, b: object) -> bool:
    return a == b or (a != a and b != b)


def _show(name: str, value: object) -> str:
    if name == "script" and isinstance(value, str):
        return f"{value[:8]}.."
    return repr(value)


def versions() -> dict[str, str]:
    """Versions of what the run runs on, for `run.json`, manifests and the launch event."""
    import numpy

    from resumable_trainer import __version__

    return {
        "resumable_trainer": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
    }
