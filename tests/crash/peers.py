"""The save paths that people use, each as its documentation shows it, beside the package's own.

A peer saves a few tensors that are a function of the step, and is asked for the newest with its own loader.
Peers that write a file per save are used with one name that each save replaces, as `last.pt`; peers that write a
directory per step are given one per step, and the newest that has its marker (`.metadata`) counts.

What a peer promises is what its documentation says, quoted beside it; the letters are those of `PROMISES`.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from resumable_trainer import StateManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    State = dict[str, torch.Tensor]

PROMISES = {"k": "atomic when killed", "p": "there after power loss", "e": "errors are told", "b": "bit rot is found"}


@dataclass(frozen=True)
class Peer:
    """One way to save.

    Attributes:
        name: As the table calls it.
        needs: Module that must be there.
        save: Saves the state of a step, and returns when whoever uses it would go on.
        load: The newest state, read by the peer's own loader; None: there is none.
        newest: Paths that belong to the newest state.
        promises: Some of the letters of `PROMISES`.
        after_damage: What is left when the newest does not load.
        wants_other_disk: Whether it is tried with temporary files on another disk than the checkpoints.
    """

    name: str
    needs: str
    save: Callable[[Path, int], None]
    load: Callable[[Path], State | None]
    newest: Callable[[Path], list[Path]]
    promises: str
    after_damage: str
    wants_other_disk: bool = False

    def why_not(self) -> str | None:
        """Why it cannot be tried here."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(self.needs)
        except ImportError as error:
            return f"not installed here ({error})"
        return None


def state_of(step: int) -> State:
    """Some 16 kB that no other step has."""
    return {
        "weights": torch.arange(1.0, 2049.0).reshape(32, 64) * (step + 1),
        "moments": torch.arange(1024, dtype=torch.float64) + step / 7,
        "step": torch.tensor(step),
    }


def _file(name: str) -> Callable[[Path], list[Path]]:
    return lambda directory: [path for path in (directory / name,) if path.exists()]


# -- torch.save ---------------------------------------------------------------------------------------


def _torch_in_place(directory: Path, step: int) -> None:
    torch.save(state_of(step), directory / "last.pt")


def _torch_replace(directory: Path, step: int) -> None:
    torch.save(state_of(step), directory / "last.pt.tmp")
    os.replace(directory / "last.pt.tmp", directory / "last.pt")


def _torch_load(directory: Path) -> State | None:
    path = directory / "last.pt"
    return torch.load(path, weights_only=True) if path.exists() else None


# -- safetensors --------------------------------------------------------------------------------------


def _safetensors_save(directory: Path, step: int) -> None:
    from safetensors.torch import save_file

    save_file(state_of(step), directory / "last.safetensors")


def _safetensors_load(directory: Path) -> State | None:
    from safetensors.torch import load_file

    path = directory / "last.safetensors"
    return load_file(path) if path.exists() else None


# -- Lightning ----------------------------------------------------------------------------------------


def _lightning_save(directory: Path, step: int) -> None:
    from lightning.fabric.plugins.io import TorchCheckpointIO

    TorchCheckpointIO().save_checkpoint({"state_dict": state_of(step)}, directory / "last.ckpt")


def _lightning_save_on_one_disk(directory: Path, step: int) -> None:
    """With TMPDIR on the disk of the checkpoints, where the temporary file can be renamed."""
    temporary = directory / "tmp"
    if not temporary.exists():
        temporary.mkdir()
    tempfile.tempdir = str(temporary)
    _lightning_save(directory, step)


def _lightning_load(directory: Path) -> State | None:
    from lightning.fabric.plugins.io import TorchCheckpointIO

    path = directory / "last.ckpt"
    if not path.exists():
        return None
    state: State = TorchCheckpointIO().load_checkpoint(path, weights_only=True)["state_dict"]
    return state


# -- torch.distributed.checkpoint ---------------------------------------------------------------------


def _dcp_save(directory: Path, step: int) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(state_of(step), checkpoint_id=directory / f"step-{step}")


def _dcp_save_in_background(directory: Path, step: int) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.async_save(state_of(step), checkpoint_id=directory / f"step-{step}").result()


def _dcp_save_over(directory: Path, step: int) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(state_of(step), checkpoint_id=directory / "last")


def _dcp_newest(directory: Path) -> list[Path]:
    markers = sorted(directory.glob("*/.metadata"))
    return sorted(markers[-1].parent.iterdir()) if markers else []


def _dcp_load(directory: Path) -> State | None:
    import torch.distributed.checkpoint as dcp

    files = _dcp_newest(directory)
    if not files:
        return None
    state = {name: torch.full_like(tensor, -1) for name, tensor in state_of(0).items()}
    dcp.load(state, checkpoint_id=files[0].parent)
    return state


# -- the package --------------------------------------------------------------------------------------


class _Holder:
    """A part that holds tensors."""

    def __init__(self) -> None:
        self.state: State | None = None

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state or {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def _own_save(directory: Path, step: int) -> None:
    holder = _Holder()
    with StateManager(directory, state={"part": holder}) as manager:
        if manager.store.names():
            manager.restore()
        holder.state = state_of(step)
        manager.snapshot(epoch=0, batch=step, step=step, background=False)


def _own_load(directory: Path) -> State | None:
    holder = _Holder()
    with StateManager(directory, state={"part": holder}) as manager:
        manager.restore()
    return holder.state


def _own_newest(directory: Path) -> list[Path]:
    return sorted(sorted((directory / "snapshots").glob("step-*"))[-1].iterdir())


def _peers() -> Iterator[Peer]:
    def of_file(name: str, needs: str, save: Any, load: Any, file: str, promises: str, **more: bool) -> Peer:
        return Peer(name, needs, save, load, _file(file), promises, "nothing: the one file", **more)

    yield of_file("torch.save, in place", "torch", _torch_in_place, _torch_load, "last.pt", "")
    # os.replace: "If successful, the renaming will be an atomic operation (this is a POSIX requirement)."
    yield of_file("torch.save, os.replace", "torch", _torch_replace, _torch_load, "last.pt", "k")
    file = "last.safetensors"
    yield of_file("safetensors save_file", "safetensors.torch", _safetensors_save, _safetensors_load, file, "")
    # "Saves a checkpoint atomically, avoiding the creation of incomplete checkpoints."
    needs, file = "lightning.fabric.plugins.io", "last.ckpt"
    yield of_file("Lightning, TMPDIR on same disk", needs, _lightning_save_on_one_disk, _lightning_load, file, "k")
    name = "Lightning, /tmp on other disk"
    yield of_file(name, needs, _lightning_save, _lightning_load, file, "k", wants_other_disk=True)
    # sync_files (on unless told otherwise): "force files to be synced to permanent storage"; without it "there's
    # no guarantee that the checkpoint will be consistent in the case of a failure".
    needs, older = "torch.distributed.checkpoint", "an older directory, by hand"
    yield Peer("DCP save, directory per step", needs, _dcp_save, _dcp_load, _dcp_newest, "kp", older)
    yield Peer("DCP async_save, per step", needs, _dcp_save_in_background, _dcp_load, _dcp_newest, "kp", older)
    yield Peer(
        "DCP save, over the last", needs, _dcp_save_over, _dcp_load, _dcp_newest, "", "nothing: the one directory"
    )
    own, older = "resumable_trainer StateManager", "the newest that is whole, by itself"
    yield Peer(own, "resumable_trainer", _own_save, _own_load, _own_newest, "kpeb", older)


PEERS = {peer.name: peer for peer in _peers()}
OWN = "resumable_trainer StateManager"
