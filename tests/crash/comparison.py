"""The laboratory's faults against the save paths of peers, in one table with the package's own.

Every peer has saved steps 1 and 2; while it saves step 3 the faults strike. The oracle is generous: what the peer's
own loader then gives must be exactly step 2 or exactly step 3, and exactly step 3 if the save had returned. Power
loss is that of `model`, which is weaker than most file systems are; a state that it gives is one that POSIX allows.
A flipped bit is held against a peer only if the newest checkpoint loads and holds other values than were saved.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import ptrace
import torch
from crash_states import Size, distinct
from injected_errors import NUMBERS, failing
from model import Model, UnmodelledCallError, materialise
from peers import PEERS, PROMISES, state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lab import Lab
    from model import Disk
    from peers import Peer, State

Case = TypeVar("Case")
OLD, NEW = 2, 3
LAYERS = {"L1": "kill", "L2": "errors", "L3": "power loss", "L7": "bit flips"}
_PROMISE_OF = {"L1": "k", "L2": "e", "L3": "p", "L7": "b"}
_GOOD = frozenset({"old", "new"})
_OTHER_DISKS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - a directory of random name is made in one


@dataclass(frozen=True)
class Effort:
    """At most so many of each kind of fault; what is left out is drawn."""

    num_kills: int
    num_errors: int
    states: Size
    num_flips: int


TINY = Effort(8, 8, Size(12, 30, 1), 16)
SHORT = Effort(200, 40, Size(60, 30, 2), 200)
LONG = Effort(10**6, 200, Size(400, 200, 40), 1000)


@dataclass(frozen=True)
class Plan:
    """What is asked for; as `Lab`, but fit to be handed to another process."""

    effort: Effort
    seed: int
    layers: tuple[str, ...]
    scratch: Path
    elsewhere: Path

    def chance(self, kind: str, bench: Bench) -> random.Random:
        """Of a kind of fault for a peer, whatever else is tried."""
        return random.Random(f"{self.seed} {kind} {bench.peer.name}")

    def draw(self, kind: str, cases: Sequence[Case], at_most: int, bench: Bench) -> Sequence[Case]:
        """All, in their order; so many of them where there are too many."""
        if len(cases) <= at_most:
            return cases
        places = sorted(self.chance(kind, bench).sample(range(len(cases)), at_most))
        return [cases[place] for place in places]


@dataclass
class Tally:
    """What one layer has seen of one peer.

    Attributes:
        verdicts: How often each: "old" and "new" are well; "lost": the save had returned, and is not there;
            "unreadable": the newest does not load, or there is none; "wrong": it loads, and is no state that was saved.
        unknown: Why nothing could be tried; None if it was.
    """

    verdicts: Counter[str] = field(default_factory=Counter)
    unknown: str | None = None

    @property
    def tried(self) -> int:
        """How many faults."""
        return self.verdicts.total()


@dataclass
class Row:
    """One peer in the table.

    Attributes:
        peer: Its name.
        tallies: By layer.
        skipped: Why it was not tried; None if it was.
    """

    peer: str
    tallies: dict[str, Tally] = field(default_factory=dict)
    skipped: str | None = None

    def violations(self, layer: str) -> int:
        """How many faults it did not take; a bit that is flipped may cost the newest, but not be believed."""
        verdicts = self.tallies[layer].verdicts
        return verdicts["wrong"] if layer == "L7" else verdicts.total() - verdicts["old"] - verdicts["new"]

    @property
    def is_clean(self) -> bool:
        """Whether all was tried, and nothing broke."""
        return bool(self.tallies) and all(
            tally.tried and not tally.unknown and not self.violations(layer) for layer, tally in self.tallies.items()
        )


class Bench:
    """Where one peer is tried again and again.

    Args:
        peer: Which.
        root: A directory for it alone.
        elsewhere: A directory for temporary files, on another disk if there is one.
    """

    def __init__(self, peer: Peer, root: Path, elsewhere: Path) -> None:
        self.peer, self._elsewhere = peer, elsewhere
        self.base, self.saved, self.directory = root / "base" / "run", root / "saved" / "run", root / "run"

    def why_not(self) -> str | None:
        """Make ready, and say why the peer cannot be judged if it does not even save when nothing strikes."""
        for steps, directory in (((1, OLD), self.base), ((1, OLD, NEW), self.saved)):
            directory.mkdir(parents=True)
            in_child(lambda steps=steps, directory=directory: self._save(directory, *steps))
            self.lay(directory)
            if self.verdict() != ("new" if NEW in steps else "old"):
                return "does not give back what it saved"
        outcome = self.act()
        return None if self.verdict(outcome.acked) == "new" else f"does not save when traced: {outcome.error}"

    def _save(self, directory: Path, *steps: int) -> str:
        warnings.simplefilter("ignore")
        tempfile.tempdir = str(self._elsewhere)
        for step in steps:
            self.peer.save(directory, step)
        return "saved"

    def lay(self, source: Path) -> None:
        """Put a copy of another directory in place."""
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.copytree(source, self.directory, symlinks=True)

    def act(self, decide: ptrace.Decide = lambda call, index: None, *, data: bool = False) -> ptrace.Outcome:
        """Save the new state over a fresh copy of the base."""

        def save(acknowledge: Callable[[str], None]) -> None:
            _be_quiet()
            self._save(self.directory, NEW)
            acknowledge(str(NEW))

        self.lay(self.base)
        outcome = ptrace.trace(save, under=self.directory, decide=decide, data=data)
        for left in self._elsewhere.iterdir():
            left.unlink()
        return outcome

    def verdict(self, acked: Sequence[str] = ()) -> str:
        """What the peer's loader makes of the directory; see `Tally`."""
        found = in_child(lambda: _named(self.peer.load(self.directory)))
        return "lost" if acked and found == "old" else found


def _named(state: State | None) -> str:
    if state is None:
        return "unreadable"
    return next((name for name, step in (("old", OLD), ("new", NEW)) if _same(state, state_of(step))), "wrong")


def _same(state: State, golden: State) -> bool:
    return state.keys() == golden.keys() and all(
        isinstance(state[name], torch.Tensor) and state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)
        for name, tensor in golden.items()
    )


def in_child(act: Callable[[], str]) -> str:
    """What an act says, done in a process of its own; "unreadable" if it raises, is ended by a signal, or hangs."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _be_quiet()
            os.write(into, act().encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    return said or "unreadable"


def _be_quiet() -> None:
    """In a child: no words of peers about damage, and no more time and memory than an honest load could want."""
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(30)


# -- the faults ---------------------------------------------------------------------------------------


def _kills(bench: Bench, plan: Plan) -> Iterator[str]:
    """Before each call that changes the directory, and after the last."""
    for at in plan.draw("kills", range(_num_calls(bench) + 1), plan.effort.num_kills, bench):
        outcome = bench.act(lambda call, index, at=at: ptrace.KILL if index == at else None)
        yield bench.verdict(outcome.acked)


def _num_calls(bench: Bench) -> int:
    return sum(call.name != "ack" for call in bench.act().calls)


def _errors(bench: Bench, plan: Plan) -> Iterator[str]:
    """Each call fails with each error, once or from then on."""
    cases = list(itertools.product(range(_num_calls(bench)), NUMBERS, (False, True)))
    for at, number, forever in plan.draw("errors", cases, plan.effort.num_errors, bench):
        outcome = bench.act(failing(at, number, forever=forever))
        if outcome.was_met:
            yield bench.verdict(outcome.acked)


def _losses(bench: Bench, plan: Plan) -> Iterator[str]:
    """States that power loss may leave."""
    model = Model(bench.base, bench.directory, bench.act(data=True).calls)
    for acked, disk in distinct(model, plan.chance("states", bench), plan.effort.states):
        _lay_disk(bench, disk)
        yield bench.verdict(acked)


def _lay_disk(bench: Bench, disk: Disk) -> None:
    shutil.rmtree(bench.directory, ignore_errors=True)
    materialise(disk, bench.directory.parent)


def _flips(bench: Bench, plan: Plan) -> Iterator[str]:
    """Single bits of the newest checkpoint, drawn from all of its files."""
    bench.lay(bench.saved)
    paths = [path.relative_to(bench.directory) for path in bench.peer.newest(bench.directory)]
    bits = [(path, bit) for path in paths for bit in range(8 * (bench.directory / path).stat().st_size)]
    for path, bit in plan.draw("flips", bits, plan.effort.num_flips, bench):
        bench.lay(bench.saved)
        with (bench.directory / path).open("r+b") as file:
            file.seek(bit // 8)
            (byte,) = file.read(1)
            file.seek(bit // 8)
            file.write(bytes([byte ^ (1 << bit % 8)]))
        yield bench.verdict()


_FAULTS = {"L1": _kills, "L2": _errors, "L3": _losses, "L7": _flips}


# -- all of it ----------------------------------------------------------------------------------------


def compare(
    lab: Lab,
    *,
    names: Sequence[str] = tuple(PEERS),
    layers: Sequence[str] = tuple(LAYERS),
    effort: Effort | None = None,
) -> list[Row]:
    """A row for each peer, worked on in as many forked processes as there are cores."""
    torch.set_num_threads(1)  # a forked child has no thread pool
    reasons = {name: ptrace.why_not() or PEERS[name].why_not() for name in names}
    with _elsewhere(lab.scratch) as elsewhere:
        plan = Plan(effort or (LONG if lab.long else SHORT), lab.seed, tuple(layers), lab.scratch, Path(elsewhere))
        wanted = [name for name in names if reasons[name] is None]
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
            rows = {}
            for row in pool.map(functools.partial(_row, plan=plan), wanted):
                rows[row.peer] = row
                lab.say(f"{row.peer}: {row.skipped or 'tried'}")
    return [rows.get(name) or Row(name, skipped=reasons[name]) for name in names]


def _elsewhere(scratch: Path) -> tempfile.TemporaryDirectory[str]:
    """A directory on another disk than the scratch one; on the same if there is no other."""
    here = scratch.stat().st_dev
    other = next((path for path in _OTHER_DISKS if os.access(path, os.W_OK) and os.stat(path).st_dev != here), None)
    return tempfile.TemporaryDirectory(prefix="crash-lab-", dir=other)


def _row(name: str, *, plan: Plan) -> Row:
    peer = PEERS[name]
    own = plan.elsewhere / str(list(PEERS).index(name))
    own.mkdir()
    if peer.wants_other_disk and own.stat().st_dev == plan.scratch.stat().st_dev:
        return Row(name, skipped="there is no second disk here")
    bench = Bench(peer, plan.scratch / own.name, own)
    if (reason := bench.why_not()) is not None:
        return Row(name, skipped=reason)
    tallies = {}
    for layer in plan.layers:
        tallies[layer] = Tally()
        try:
            tallies[layer].verdicts.update(_FAULTS[layer](bench, plan))
        except UnmodelledCallError as error:
            tallies[layer].unknown = f"the model does not know {error}"
    return Row(name, tallies)


# -- what is shown ------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The rows as text: violations / tried; ! where the peer's documentation promises that there are none."""
    lines = [("peer", "promises", *LAYERS.values(), "when the newest is damaged, there is")]
    notes = []
    for row in rows:
        peer = PEERS[row.peer]
        if row.skipped is not None:
            lines.append((row.peer, "", *("skipped" for _ in LAYERS), ""))
            notes.append(f"{row.peer}: {row.skipped}")
            continue
        lines.append((row.peer, peer.promises or "-", *(_cell(row, layer) for layer in LAYERS), peer.after_damage))
        notes += [f"{row.peer}: {tally.unknown}" for tally in row.tallies.values() if tally.unknown]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines) + "".join(
        f"\n{note}" for note in [*notes, *_legend()]
    )


def _cell(row: Row, layer: str) -> str:
    if layer not in row.tallies:
        return "-"
    tally, broken = row.tallies[layer], row.violations(layer)
    if tally.unknown is not None:
        return "unknown"
    mark = " !" if broken and _PROMISE_OF[layer] in PEERS[row.peer].promises else ""
    details = [f"{tally.verdicts[kind]} {kind}" for kind in ("wrong", "lost") if tally.verdicts[kind]]
    return f"{broken}/{tally.tried}{mark}" + (f" ({', '.join(details)})" if details and layer != "L7" else "")


def _legend() -> list[str]:
    return [
        "violations/tried; (n lost): the save had returned, the older state loads; (n wrong): a state that never was "
        "loads silently; the rest: nothing loads",
        "promised, by the documentation: " + ", ".join(f"{letter} {words}" for letter, words in PROMISES.items()),
        "!: broken although promised. Where nothing is promised the number says what one has to provide oneself.",
    ]


def as_json(rows: Sequence[Row], lab: Lab) -> str:
    """The rows with every verdict."""
    peers = [
        {
            "peer": row.peer,
            "promises": PEERS[row.peer].promises,
            "skipped": row.skipped,
            "layers": {
                LAYERS[layer]: {
                    "tried": tally.tried,
                    "violations": row.violations(layer),
                    "verdicts": dict(sorted(tally.verdicts.items())),
                    "unknown": tally.unknown,
                }
                for layer, tally in row.tallies.items()
            },
        }
        for row in rows
    ]
    return json.dumps({"seed": lab.seed, "long": lab.long, "torch": torch.__version__, "peers": peers}, indent=1) + "\n"
