"""L7: damage to the bytes of a run. Whatever is flipped, cut, zeroed, swapped or lost is found, or does no harm.

Snapshots are opened by the code that recovery uses (`verify`, then `Reader`), and every so often by the whole
of it (`StateManager.restore`, with the quarantine). What they give is compared with golden states made by
`marked`, never with the package's own digests.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
from typing import TYPE_CHECKING, Any

import damaged_runs
import numpy as np
import torch
from lab import Count

from resumable_trainer import StateManager
from resumable_trainer.errors import DamagedSnapshotError
from resumable_trainer.snapshot.reader import Reader
from resumable_trainer.snapshot.verify import verify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab import Lab

FLIPS_LONG, FLIPS_SHORT = 100_000, 4_000
WHOLE_DOOR_EVERY = 100  # damages between two that are taken through StateManager as well
OLDER, NEWER = "step-000000001", "step-000000002"
_BLOCKS = (512, 4096)


def marked(step: int, *, salt: int = 0) -> dict[str, Any]:
    """A state of a few kB that no other step, and no other run, has."""
    base = torch.arange(300, dtype=torch.float32) * (step + 1) + salt
    return {
        "weights": base.reshape(20, 15),
        "half": base[:40].to(torch.bfloat16),
        "count": torch.tensor(step + 1000 * salt),
        "empty": torch.empty(0, 3),
        "values": {"step": step, "salt": salt, "rate": 1 / (step + 3), "flags": [True, None, (1, "two")]},
        "order": np.arange(20, dtype=np.int64) * (step + 1) + salt,
    }


class Holder:
    """A part that holds a tree."""

    def __init__(self, tree: dict[str, Any] | None = None) -> None:
        self.tree = tree or {}

    def state_dict(self) -> dict[str, Any]:
        return self.tree

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        self.tree = tree


def fingerprint(tree: Any) -> Any:
    """The tree as plain bytes and words that compare exactly, kinds and shapes included."""
    if isinstance(tree, torch.Tensor):
        raw = tree.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tree.numel() else b""
        return ("tensor", str(tree.dtype), tuple(tree.shape), raw)
    if isinstance(tree, np.ndarray):
        return ("array", tree.dtype.str, tree.shape, tree.tobytes())
    if isinstance(tree, dict):
        return ("dict", tuple((key, fingerprint(value)) for key, value in tree.items()))
    if isinstance(tree, list | tuple):
        return (type(tree).__name__, tuple(fingerprint(value) for value in tree))
    return (type(tree).__name__, repr(tree))


def make_run(directory: Path, *, salt: int = 0) -> None:
    """Two snapshots."""
    holder = Holder()
    with StateManager(directory, state={"part": holder}) as manager:
        for step in (1, 2):
            holder.tree = marked(step, salt=salt)
            torch.manual_seed(step + salt)
            manager.snapshot(epoch=0, batch=step, step=step, background=False)


class Snapshot:
    """The newer snapshot of a run, whose files are damaged one after the other and put back.

    Args:
        run: A run directory in memory, made by `make_run`.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path = run / "snapshots" / NEWER
        self.files = {path.name: path.read_bytes() for path in sorted(self.path.iterdir())}
        self.manifest = verify(self.path)
        self.golden = fingerprint(Reader(self.path, self.manifest).sections())
        assert self.golden[1][0] == ("part", fingerprint(marked(2)))  # the rest: modes, gradients, generators

    def header_length(self, name: str) -> int:
        """Bytes of a file that all count: the length and header of tensors, the whole of anything else."""
        data = self.files[name]
        return 8 + int.from_bytes(data[:8], "little") if name.endswith(".safetensors") else len(data)

    def look(self, damage: str) -> list[str]:
        """What is wrong with how the reading code takes the damage."""
        try:
            manifest = verify(self.path)
            found = Reader(self.path, manifest).sections()
        except DamagedSnapshotError:
            return []
        except Exception as error:  # noqa: BLE001 - whatever it is, it is not what is promised
            return [f"{damage}: {type(error).__name__}: {error}"]
        same = fingerprint(found) == self.golden and manifest == self.manifest
        return [] if same else [f"{damage}: taken for what was saved"]

    def restore(self, damage: str) -> list[str]:
        """The same through the whole of the recovery, on a copy of the run."""
        copy = self.run.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.run, copy, symlinks=True)
        holder = Holder()
        try:
            with StateManager(copy, state={"part": holder}) as manager:
                found = manager.restore().snapshot
        except Exception as error:  # noqa: BLE001 - the older snapshot is whole: nothing may be raised
            return [f"{damage}: restore raised {type(error).__name__}: {error}"]
        if found not in (OLDER, NEWER) or fingerprint(holder.tree) != fingerprint(marked(1 if found == OLDER else 2)):
            return [f"{damage}: restored {found} with another state than it had"]
        if found == OLDER and not list((copy / "quarantine").glob(f"{NEWER}*")):
            return [f"{damage}: passed over, not kept in quarantine"]
        return []

    @contextlib.contextmanager
    def with_files(self, files: dict[str, bytes]) -> Iterator[None]:
        """Other content for some files (`None`: gone), until the block ends."""
        for name, data in files.items():
            (self.path / name).write_bytes(data)
        yield
        for name in files:
            if name in self.files:
                (self.path / name).write_bytes(self.files[name])
            else:
                (self.path / name).unlink()


# -- flips --------------------------------------------------------------------------------------------


def flips(snapshot: Snapshot, *, wanted: int, draw: random.Random) -> Iterator[tuple[str, int]]:
    """(file, bit) to flip: every bit of manifest, values and headers if so many are wanted, then of the data."""
    counts = [(name, bit) for name in snapshot.files for bit in range(8 * snapshot.header_length(name))]
    if wanted < len(counts):
        yield from draw.sample(counts, wanted)
        return
    yield from counts
    data = [
        (name, bit)
        for name, content in snapshot.files.items()
        for bit in range(8 * snapshot.header_length(name), 8 * len(content))
    ]
    for _ in range(wanted - len(counts)):
        yield draw.choice(data)


def flip_all(snapshot: Snapshot, count: Count, *, wanted: int, draw: random.Random) -> None:
    """Flip one bit after the other."""
    for number, (name, bit) in enumerate(flips(snapshot, wanted=wanted, draw=draw)):
        byte, mask = divmod(bit, 8)[0], 1 << (bit % 8)
        with (snapshot.path / name).open("r+b", buffering=0) as file:
            file.seek(byte)
            file.write(bytes([snapshot.files[name][byte] ^ mask]))
            damage = f"{name}: bit {bit} flipped"
            kind = "header bits" if byte < snapshot.header_length(name) else "data bits"
            count.add(kind, snapshot.look(damage))
            if number % WHOLE_DOOR_EVERY == 0:
                count.add("whole recoveries", snapshot.restore(damage))
            file.seek(byte)
            file.write(snapshot.files[name][byte : byte + 1])


# -- larger damage ------------------------------------------------------------------------------------


def larger(snapshot: Snapshot, draw: random.Random, *, thin: int) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """(kind, description, content of the damaged files) of every damage that keeps the set of files.

    Args:
        snapshot: What is damaged.
        draw: Chooses bytes.
        thin: Only every so many lengths are tried.
    """
    for name, data in snapshot.files.items():
        for length in range(0, len(data), thin):
            yield "truncations", f"{name} cut to {length} bytes", {name: data[:length]}
        for extra in (b"\0", b"\n", b" " * 8, data):
            yield "appended", f"{name} with {len(extra)} more bytes", {name: data + extra}
        for size, fill in itertools.product(_BLOCKS, (b"\0", b"\xff")):
            for start in range(0, len(data), size):
                block = fill * len(data[start : start + size])
                lost = data[:start] + block + data[start + size :]
                yield "blocks", f"{name}: block at {start} is {fill!r}", {name: lost}
        for _ in range(200 // thin + 1):
            start = draw.randrange(len(data))
            burst = draw.randbytes(min(draw.randint(2, 64), len(data) - start))
            torn = data[:start] + burst + data[start + len(burst) :]
            yield "bursts", f"{name}: {len(burst)} bytes at {start}", {name: torn}
    for one, other in itertools.permutations(snapshot.files, 2):
        yield "swapped", f"{one} in place of {other}", {other: snapshot.files[one]}
        yield "swapped", f"{one} and {other} swapped", {one: snapshot.files[other], other: snapshot.files[one]}
    yield "extra files", "an extra file", {"extra.safetensors": b"stranger"}


def foreign(snapshot: Snapshot, others: dict[str, Path]) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Files of other snapshots: each alone, and all but the manifest."""
    for origin, path in others.items():
        theirs = {name: (path / name).read_bytes() for name in snapshot.files}
        for name, data in theirs.items():
            yield "foreign files", f"{name} from {origin}", {name: data}
        theirs.pop("manifest.json")
        yield "foreign files", f"all but the manifest from {origin}", theirs


def damage_all(snapshot: Snapshot, others: dict[str, Path], count: Count, *, draw: random.Random, thin: int) -> None:
    """Every larger damage, through both doors."""
    cases = itertools.chain(larger(snapshot, draw, thin=thin), foreign(snapshot, others))
    for number, (kind, damage, files) in enumerate(cases):
        with snapshot.with_files(files):
            count.add(kind, snapshot.look(damage))
            if number % 10 == 0:
                count.add("whole recoveries", snapshot.restore(damage))
    for name in snapshot.files:
        (snapshot.path / name).unlink()
        count.add("missing files", snapshot.look(f"{name} missing") + snapshot.restore(f"{name} missing"))
        (snapshot.path / name).write_bytes(snapshot.files[name])


def whole_directories(snapshot: Snapshot, others: dict[str, Path], count: Count) -> None:
    """A directory of another snapshot under this one's name."""
    kept = snapshot.path.with_name("kept")
    snapshot.path.rename(kept)
    for origin, path in others.items():
        if path.name == NEWER:
            continue  # from another run: `Run` knows by its id, see damaged_runs.py
        shutil.copytree(path, snapshot.path)
        damage = f"the directory of {origin}"
        count.add("foreign directories", snapshot.look(damage) + snapshot.restore(damage))
        shutil.rmtree(snapshot.path)
    kept.rename(snapshot.path)


def run(lab: Lab) -> Count:
    """The layer."""
    count = Count()
    draw = random.Random(lab.seed)
    make_run(lab.scratch / "run")
    make_run(lab.scratch / "stranger", salt=7)
    snapshot = Snapshot(lab.scratch / "run")
    others = {
        "the step before": lab.scratch / "run" / "snapshots" / OLDER,
        "another run": lab.scratch / "stranger" / "snapshots" / NEWER,
        "another run's step before": lab.scratch / "stranger" / "snapshots" / OLDER,
    }
    flip_all(snapshot, count, wanted=FLIPS_LONG if lab.long else FLIPS_SHORT, draw=draw)
    lab.say(f"flips: {count}")
    damage_all(snapshot, others, count, draw=draw, thin=1 if lab.long else 23)
    whole_directories(snapshot, others, count)
    lab.say(f"larger damage: {count}")
    damaged_runs.damage_all(lab.scratch, count, draw=draw, num_flips=400 if lab.long else 5)
    return count
