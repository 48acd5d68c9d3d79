"""Random generators: captured without drawing, restored last.

Covers the global generators of Python, NumPy (legacy), torch on CPU and every accelerator that has
been initialised, and generators handed over as parts. Cost: 3 us when called over and over, some 60 us
between two steps of a training, whose code and data have taken the caches.
"""

from __future__ import annotations

import random
from array import array
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from resumable_trainer.state import words

if TYPE_CHECKING:
    from collections.abc import Mapping

_GENERATORS = (torch.Generator, np.random.Generator, random.Random)


def is_generator(part: object) -> bool:
    """Whether `part` is a random generator of Python, NumPy or torch."""
    return isinstance(part, _GENERATORS)


def capture_generator(generator: object) -> dict[str, Any]:
    """The state of one generator object as a tree."""
    if isinstance(generator, torch.Generator):
        return {"torch": generator.get_state(), "device": str(generator.device)}
    if isinstance(generator, np.random.Generator):
        return {"numpy": generator.bit_generator.state}
    assert isinstance(generator, random.Random)
    return {"python": _pack_python(generator.getstate())}


def restore_generator(generator: object, saved: Mapping[str, Any]) -> None:
    """The way back of `capture_generator`."""
    if isinstance(generator, torch.Generator):
        generator.set_state(saved["torch"])
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = saved["numpy"]
    else:
        assert isinstance(generator, random.Random)
        generator.setstate(_unpack_python(saved["python"]))


def capture_global(before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state of all global generators; drawing from none.

    Args:
        before: What it gave earlier, and nobody has changed. What in it is the state still is given again, as the very
            same object; so is the whole, if all of it is.
    """
    known = before or {}
    accelerators = _capture_accelerators()
    tree = {
        "python": _capture_python(known.get("python")),
        "numpy": _capture_numpy(known.get("numpy")),
        "torch": _capture_torch(known.get("torch")),
        "accelerators": accelerators or _empty(known.get("accelerators")),
    }
    return before if before is not None and all(map(is_, tree.values(), before.values())) else tree


def _capture_python(before: dict[str, Any] | None) -> dict[str, Any]:
    words_now = words.python_words()
    if words_now is None:
        return _pack_python(random.getstate())
    return before if before is not None and words_now.is_still(before) else words_now.read()


def _capture_numpy(before: dict[str, Any] | None) -> dict[str, Any]:
    words_now = words.numpy_words()
    if words_now is None:
        return np.random.get_state(legacy=False)
    return before if before is not None and words_now.is_still(before) else words_now.read()


def _empty(before: dict[str, Any] | None) -> dict[str, Any]:
    return before if before is not None and not before else {}


def _capture_torch(before: torch.Tensor | None) -> torch.Tensor:
    state = torch.default_generator.get_state()
    return before if before is not None and torch.equal(state, before) else state


def restore_global(saved: Mapping[str, Any]) -> list[str]:
    """The way back of `capture_global`.

    Returns:
        One line for each saved accelerator generator that this machine does not have.
    """
    random.setstate(_unpack_python(saved["python"]))
    np.random.set_state(saved["numpy"])
    torch.default_generator.set_state(saved["torch"])
    return _restore_accelerators(saved["accelerators"])


def seed_global(seed: int) -> None:
    """Seed all global generators, as a fresh run does."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _accelerator_module() -> tuple[str, Any] | None:
    """Name and torch module of the accelerator in use; None on a CPU-only or untouched machine."""
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    module = torch.get_device_module(accelerator)
    # Asking an uninitialised CUDA for its generators would initialise it, which costs memory and seconds.
    started = getattr(module, "is_initialized", lambda: True)()
    return (accelerator.type, module) if started else None


def _capture_accelerators() -> dict[str, list[torch.Tensor]]:
    found = _accelerator_module()
    if found is None:
        return {}
    kind, module = found
    if hasattr(module, "get_rng_state_all"):
        return {kind: list(module.get_rng_state_all())}
    return {kind: [module.get_rng_state()]}


def _restore_accelerators(saved: Mapping[str, list[torch.Tensor]]) -> list[str]:
    lines = []
    for kind, states in saved.items():
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is None or accelerator.type != kind:
            lines.append(f"the snapshot holds {kind} generators, this process has no {kind} device")
            continue
        module = torch.get_device_module(accelerator)
        for index, state in enumerate(states[: torch.accelerator.device_count()]):
            if hasattr(module, "get_rng_state_all"):
                module.set_rng_state(state, index)
            else:
                module.set_rng_state(state)
        if len(states) > torch.accelerator.device_count():
            lines.append(f"the snapshot holds generators of {len(states)} {kind} devices, there are fewer here")
    return lines


def _pack_python(state: tuple[Any, ...]) -> dict[str, Any]:
    """Python's 625 words as one array: a hundred times cheaper to write down than as a list."""
    version, numbers, gauss = state
    return {"version": version, "words": np.frombuffer(array("I", numbers), dtype=np.uint32), "gauss": gauss}


def _unpack_python(saved: Mapping[str, Any]) -> tuple[Any, ...]:
    return (saved["version"], tuple(saved["words"].tolist()), saved["gauss"])
