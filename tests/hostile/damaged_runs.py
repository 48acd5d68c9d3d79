"""L7, second half: damage to what a run keeps beside its snapshots.

The metric journal, the events, `run.json` and `run.lock` are damaged in the directory of a killed run, which is
then trained to its end. It must end with the bytes of a run that nothing disturbed; or refuse with an error
of ours, having touched no snapshot. Rows that a damaged journal has lost are missing, its bytes are kept.
"""

from __future__ import annotations

import functools
import shutil
from typing import TYPE_CHECKING

from scenarios import SCENARIOS, Training

from resumable_trainer.errors import ResumableTrainerError
from resumable_trainer.loop import launch
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from lab import Count

FILES = ("metrics.jsonl", "events.jsonl", "run.json", "run.lock")
_LINES = (b"", b"\0" * 300, b"{}", b"[]", b"null", b"{", b"\xff\xfe", b'{"row":1}', b"1" * 5000)
_GARBAGE = (b"", *(line + b"\n" for line in _LINES))


def contents(data: bytes, others: list[bytes], *, num_flips: int, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """(description, content) of a file's damaged forms."""
    for bit in draw.sample(range(8 * len(data)), min(num_flips, 8 * len(data))):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        yield f"bit {bit} flipped", bytes(flipped)
    for length in draw.sample(range(len(data)), min(num_flips, len(data))):
        yield f"cut to {length} bytes", data[:length]
        yield f"zeros from {length} on", data[:length] + bytes(len(data) - length)
    for garbage in _GARBAGE:
        yield f"only {garbage[:12]!r}", garbage
        yield f"{garbage[:12]!r} behind", data + garbage
        yield f"{garbage[:12]!r} before", garbage + data
    for number, other in enumerate(others):
        yield f"content of file {number}", other
    lines = data.splitlines(keepends=True)
    for number in range(len(lines)):
        yield f"line {number} missing", b"".join(lines[:number] + lines[number + 1 :])
        yield f"line {number} twice", b"".join(lines[: number + 1] + lines[number:])


def damage_all(scratch: Path, count: Count, *, num_flips: int, draw: random.Random) -> None:
    """Every file of a run, in every damaged form."""
    base, copy = scratch / "killed", scratch / "trained"
    SCENARIOS["journal rewind"].prepare(base)
    original = {name: (base / name).read_bytes() for name in FILES}
    for name, data in original.items():
        others = [other for other_name, other in original.items() if other_name != name]
        for damage, content in contents(data, others, num_flips=num_flips, draw=draw):
            shutil.copytree(base, copy)
            (copy / name).write_bytes(content)
            count.add(name, judge(copy, name, content, f"{name}: {damage}"))
            shutil.rmtree(copy)
        shutil.copytree(base, copy)
        (copy / name).unlink()
        count.add(name, judge(copy, name, None, f"{name}: missing"))
        shutil.rmtree(copy)
    count.add("snapshots of another run", _stranger(base, copy))


def judge(directory: Path, name: str, content: bytes | None, damage: str) -> list[str]:
    """What a damaged run breaks when it is continued."""
    before, generation = _snapshots(directory), _newest_generation(directory)
    training = Training()
    try:
        training.train(directory)
    except ResumableTrainerError as error:
        wrong = [] if name == "run.json" else [f"{damage}: refused: {error}"]
        return wrong + ([] if _snapshots(directory) == before else [f"{damage}: refused, and changed a snapshot"])
    except Exception as error:  # noqa: BLE001 - whatever it is, a user would see it
        return [f"{damage}: {type(error).__name__}: {error}"]
    finally:
        launch.process.opened.clear()
    rows, wanted = _undisturbed(directory.with_name("undisturbed"))
    wrong = [] if _parameters(training) == wanted else [f"{damage}: other parameters than an undisturbed run has"]
    if _newest_generation(directory) <= generation:
        wrong.append(f"{damage}: the launch has no generation of its own")
    kept = [path.read_bytes() for path in (directory / "quarantine").glob("metrics.jsonl*")]
    if (directory / "metrics.jsonl").read_bytes() != rows and (name != "metrics.jsonl" or not _kept(content, kept)):
        wrong.append(f"{damage}: rows are lost, and the damaged journal is not kept")
    return wrong


def _kept(content: bytes | None, kept: list[bytes]) -> bool:
    """Whether the full lines of a damaged journal are still somewhere; a torn last one was never a row."""
    return content is None or content[: content.rfind(b"\n") + 1] in kept


@functools.cache
def _undisturbed(directory: Path) -> tuple[bytes, bytes]:
    """Rows and parameters of a run that nothing disturbs."""
    training = Training()
    training.train(directory)
    return (directory / "metrics.jsonl").read_bytes(), _parameters(training)


def _parameters(training: Training) -> bytes:
    tensors = [*training.model.parameters(), *(s["momentum_buffer"] for s in training.optimizer.state.values())]
    return b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)


def _newest_generation(directory: Path) -> int:
    store = Store(directory)
    return store.manifest(store.names()[-1]).generation


def _snapshots(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.glob("snapshots/*/*")}


def _stranger(base: Path, copy: Path) -> list[str]:
    """A newer snapshot from another run is never continued from as if it were this one's."""
    other = copy.with_name("other")
    Training().train(other)
    shutil.copytree(base, copy)
    newest = max((other / "snapshots").iterdir())
    shutil.copytree(newest, copy / "snapshots" / newest.name)
    before = _snapshots(copy)
    try:
        Training().train(copy)
    except ResumableTrainerError:
        wrong = [] if _snapshots(copy) == before else ["snapshot of another run: refused, and changed a snapshot"]
    else:
        wrong = ["snapshot of another run: taken for this one's"]
    launch.process.opened.clear()
    shutil.rmtree(copy)
    shutil.rmtree(other)
    return wrong
