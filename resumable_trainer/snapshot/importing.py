"""Import: a new run from a checkpoint that something else wrote.

Policy: only what is recognised or named becomes part of the run, and everything else is listed. The position
is what the caller says, or what the file says where it says so in one of the usual words. What a checkpoint of
that kind does not hold (generators, place in the data, early stopping) begins anew, and `Run` says so.
"""

from __future__ import annotations

import os
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from resumable_trainer.durable.digest import Digest, digest_bytes, open_regular
from resumable_trainer.errors import NotFoundError, UnsafeValueError, UsageError
from resumable_trainer.snapshot import torch_file
from resumable_trainer.snapshot.layout import Position, snapshot_name
from resumable_trainer.snapshot.manifest import JournalMark, Manifest, PositionFields
from resumable_trainer.snapshot.new_run import new_run, now
from resumable_trainer.snapshot.tensors import TensorFile
from resumable_trainer.snapshot.torch_file import printable
from resumable_trainer.snapshot.tree import flatten
from resumable_trainer.snapshot.writer import StateFiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import BinaryIO

    from resumable_trainer.durable.files import Files
    from resumable_trainer.snapshot.tree import Flat

_CHUNK_BYTES = 1 << 20
_USUAL_KEYS = {
    "model": ("model", "state_dict", "model_state_dict", "model_state", "module", "net"),
    "optimizer": ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "optimizer_states.0"),
    "scheduler": ("scheduler", "scheduler_state_dict", "lr_scheduler", "lr_scheduler_state_dict", "lr_schedulers.0"),
    "scaler": ("scaler", "scaler_state_dict"),
    "ema": ("ema", "ema_state_dict", "model_ema"),
}
_EPOCH_KEYS = ("epoch", "epochs")
_STEP_KEYS = ("global_step", "step", "steps", "iteration")
_WHOLE = ""  # the key of the whole file


@dataclass(frozen=True)
class Checkpoint:
    """A file of somebody else's, read.

    Attributes:
        file: Where it lies.
        digest: Its xxh3-128.
        content: What it holds.
        warnings: Lines for a person.
    """

    file: Path
    digest: str
    content: Any
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recognised:
    """What of a checkpoint is taken.

    Attributes:
        parts: Trees by the name of the part.
        keys: Where in the file each part was found; "" for the whole file.
        not_taken: Keys of everything else.
        epoch: What the file says on how many epochs are complete, with the key; None if nothing.
        step: The same for training batches.
    """

    parts: Mapping[str, Any]
    keys: Mapping[str, str]
    not_taken: Sequence[str] = ()
    epoch: tuple[int, str] | None = None
    step: tuple[int, str] | None = None


@dataclass
class _Taken:
    keys: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    def take(self, name: str, key: str, value: Any) -> None:
        self.keys[name], self.parts[name] = key, value


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of `torch.save` or of the safetensors layout; no code in it is run.

    Raises:
        NotFoundError: It is not there.
        UsageError: It is neither.
        DamagedSnapshotError, UnsafeValueError, SettingsError: See `torch_file.read_torch_file`.
    """
    with _opened(path) as file:
        head = file.read(9)
        digest = _digest(file)
        if head.startswith(torch_file.MAGIC):
            content = torch_file.read_torch_file(file, str(path))
            return Checkpoint(path, digest, content, tuple(torch_file.warnings(file)))
    if head[8:9] != b"{":
        raise UsageError(
            f"{path} is neither a file of torch.save nor of safetensors",
            path=path,
            hint="one that torch wrote before version 1.6: load it with weights_only=True and save it again",
        )
    with TensorFile(Path(os.path.realpath(path))) as tensors:
        return Checkpoint(path, digest, {name: tensors.read(name) for name in tensors.names()})


def recognise(content: Any, *, mapping: Mapping[str, str] | None = None, strip: Sequence[str] = ()) -> Recognised:
    """Decide what of a checkpoint becomes which part.

    Args:
        content: What the file holds.
        mapping: Part to key in the file ("optimizer_states.0"), beside what is recognised; "" leaves a part out.
        strip: Prefixes to take off the names of models' tensors; a tensor without it is not taken.

    Raises:
        UsageError: A key or prefix that is not there; nothing that is recognised.
    """
    mapping = mapping or {}
    if not isinstance(content, dict) or not content:
        raise UsageError(f"the file holds {_kind(content)}, not a dict of states", found=type(content).__name__)
    taken, bare = _Taken(), _is_bare(content)
    for name, keys in {} if bare else _USUAL_KEYS.items():
        found = next((key for key in keys if isinstance(_look_up(content, key), dict)), None)
        if found is not None and name not in mapping and found not in mapping.values():
            taken.take(name, found, _look_up(content, found))
    if (bare or _is_optimizer(content)) and not mapping:
        taken.take("model" if bare else "optimizer", _WHOLE, content)
    for name, key in mapping.items():
        if key:
            taken.take(name, key, _required(content, key))
    if not taken.parts:
        raise UsageError(
            f"nothing in the file is recognised; its keys are: {_listed(content)}",
            found=list(content),
            hint="say what is what with --map NAME=KEY",
        )
    not_taken = [] if _WHOLE in taken.keys.values() else _others(content, taken.keys.values())
    parts, dropped = _stripped(taken.parts, strip)
    epoch, step = (None, None) if bare else (_number(content, _EPOCH_KEYS), _number(content, _STEP_KEYS))
    counted = {found[1] for found in (epoch, step) if found is not None}
    return Recognised(parts, taken.keys, [*(key for key in not_taken if key not in counted), *dropped], epoch, step)


def import_run(
    directory: Path,
    checkpoint: Checkpoint,
    recognised: Recognised,
    position: Position,
    *,
    versions: Mapping[str, str] | None = None,
    files: Files | None = None,
) -> Manifest:
    """Make a new run directory whose first snapshot is a checkpoint's state.

    Args:
        directory: The new run directory; the name must be free.
        checkpoint: What was read.
        recognised: What of it is taken.
        position: Where the run stands; batch 0 of an epoch above 0 means that so many epochs are complete.
        versions: What it was imported with.
        files: Primitive operations.

    Returns:
        The manifest of its snapshot.

    Raises:
        UsageError: The name is taken.
        UnsafeValueError: A value that has no safe form in a snapshot; the message names its place.
        SnapshotWriteError: There is no room for it.
    """
    flat = flatten(recognised.parts)
    _check_size(flat, checkpoint.file)
    content = StateFiles(flat)
    run_id = secrets.token_hex(8)
    complete = position.batch == 0 and position.epoch > 0
    name = snapshot_name(position, epoch_complete=complete)
    origin = {"file": str(checkpoint.file.resolve()), "digest": checkpoint.digest, "parts": dict(recognised.keys)}
    with new_run(directory, num_bytes=content.size()[0], files=files) as new:
        manifest = new.write_snapshot(
            name,
            lambda target: content.write(new.files, target),
            lambda entries: Manifest(
                run_id=run_id,
                generation=0,
                name=name,
                position=PositionFields(epoch=position.epoch, batch=position.batch, step=position.step),
                epoch_complete=complete,
                parent=None,
                parent_digest=None,
                created=now("milliseconds"),
                files=entries,
                journal=JournalMark(num_bytes=0, digest=digest_bytes(b""), rows=0),
                saved_by=dict(versions or {}),
            ),
        )
        new.write_metrics(b"")
        new.write_identity(
            {"run_id": run_id, "versions": dict(versions or {}), "imported_from": origin},
            {"event": "imported", "generation": 0, "from": origin},
        )
    return manifest


# -- reading ------------------------------------------------------------------------------------------


def _opened(path: Path) -> BinaryIO:
    """A regular file, through links: it is the user's own choice, and often lies in a cache behind one."""
    try:
        return os.fdopen(open_regular(Path(os.path.realpath(path))), "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path} is not there", path=path) from None
    except ValueError as error:
        raise UsageError(str(error), path=path) from None


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    digest = Digest()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.value().digest


# -- recognising --------------------------------------------------------------------------------------


def _is_bare(content: Mapping[Any, Any]) -> bool:
    """Whether the file is a model's state itself: tensors by name."""
    return all(isinstance(value, torch.Tensor) or str(name).endswith("_extra_state") for name, value in content.items())


def _is_optimizer(content: Mapping[Any, Any]) -> bool:
    """Whether the file is an optimizer's state itself."""
    return set(content) == {"state", "param_groups"}


def _look_up(content: Any, key: str) -> Any:
    """The value at a key, or at a path of keys and indices joined by dots; None if it is not there."""
    if isinstance(content, dict) and key in content:
        return content[key]
    first, _, rest = key.partition(".")
    if isinstance(content, dict):
        inner = content.get(first, content.get(int(first)) if first.isdecimal() else None)
    elif isinstance(content, list | tuple) and first.isdecimal() and int(first) < len(content):
        inner = content[int(first)]
    else:
        return None
    return _look_up(inner, rest) if rest else inner


def _required(content: Mapping[Any, Any], key: str) -> Any:
    value = _look_up(content, key)
    if value is None:
        raise UsageError(f"the file has no {key!r}; its keys are: {_listed(content)}", found=list(content))
    return value


def _others(content: Mapping[Any, Any], keys: Any) -> list[str]:
    """Keys of what is not taken: at the top, and beside a list's or dict's entry that is taken."""
    others = []
    taken = set(keys)
    for key, value in content.items():
        below = {name.partition(".")[2] for name in taken if name.startswith(f"{key}.")}
        if key in taken:
            continue
        if not below:
            others.append(printable(key))
        elif isinstance(value, list | tuple):
            others += [f"{printable(key)}.{index}" for index in range(len(value)) if str(index) not in below]
        elif isinstance(value, dict):
            others += [f"{printable(key)}.{printable(inner)}" for inner in value if str(inner) not in below]
    return others


def _stripped(parts: Mapping[str, Any], prefixes: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Models without a prefix of their tensors' names, as plain dicts; and what had no such prefix."""
    trees = {name: _plain(tree) for name, tree in parts.items()}
    dropped: list[str] = []
    for prefix in prefixes:
        models = [n for n, tree in trees.items() if _has_names(tree) and any(k.startswith(prefix) for k in tree)]
        if not models or not prefix:
            raise UsageError(f"no model in the file has names that begin with {prefix!r}", found=prefix)
        for name in models:
            tree = trees[name]
            dropped += [f"{name}: {printable(key)}" for key in tree if not key.startswith(prefix)]
            trees[name] = {key.removeprefix(prefix): tree[key] for key in tree if key.startswith(prefix)}
    return trees, dropped


def _has_names(tree: Any) -> bool:
    return isinstance(tree, dict) and all(isinstance(key, str) for key in tree) and _is_bare(tree)


def _plain(tree: Any) -> Any:
    """A model's state as `Run` saves it: torch's own is an OrderedDict."""
    return dict(tree) if type(tree) is OrderedDict and _has_names(tree) else tree


def _number(content: Mapping[Any, Any], keys: Sequence[str]) -> tuple[int, str] | None:
    for key in keys:
        value = content.get(key)
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point():
            value = value.item()
        if type(value) is int and 0 <= value < 10**15:
            return value, key
    return None


def _listed(content: Mapping[Any, Any]) -> str:
    names = [printable(key, limit=60) for key in list(content)[:20]]
    return ", ".join(names) + (f" and {len(content) - 20} more" if len(content) > 20 else "")


def _kind(content: Any) -> str:
    return "an empty dict" if isinstance(content, dict) else f"a {type(content).__name__}"


def _check_size(flat: Flat, file: Path) -> None:
    """Many views of one storage in different shapes are written once each: a small file must not become a huge run."""
    tensors = [tensor for named in flat.tensors.values() for tensor in named.values()]
    written = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    there = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    if written > 4 * there:
        raise UnsafeValueError(
            f"{file} holds {there:,} bytes of tensors, and views of them that would take {written:,}",
            path=file,
            found=written,
            hint="if it is yours, save the tensors as .clone()",
        )
