"""What is on devices arrives as it was when it was staged, however late or early the device does its work.

The stand-in for a device has streams whose work is done when the host waits for it and no sooner, or (`early`) does
what is in its current stream at once, as a fast device would; memory that it has not got yet, or no more, is poison.
"""

from __future__ import annotations

import gc
import inspect
import os
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resumable_trainer import StateManager
from resumable_trainer.errors import SnapshotWriteError
from resumable_trainer.state import on_device, staging
from resumable_trainer.state.compare import differences, same_bytes
from resumable_trainer.state.cuda import Cuda
from resumable_trainer.state.on_device import Devices, Pin
from resumable_trainer.state.staging import Arena

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

Named = dict[str, dict[str, torch.Tensor]]
_POISON = 0xAB


class Stream:
    """Work in its order, done up to where somebody waits for it."""

    def __init__(self) -> None:
        self._work: list[Callable[[], object]] = []
        self._num_done = 0
        self._lock = threading.RLock()

    def put(self, work: Callable[[], object]) -> None:
        self._work.append(work)

    @property
    def is_idle(self) -> bool:
        return self._num_done == len(self._work)

    def here(self) -> Callable[[], None]:
        """An event: reaching it does all work that was put in by now."""
        return partial(self._reach, len(self._work))

    def _reach(self, number: int) -> None:
        with self._lock:
            while self._num_done < number:
                self._num_done += 1
                self._work[self._num_done - 1]()


class StandIn(Cuda):
    """A device whose memory is the host's; a class of its own for each test."""

    living: ClassVar[dict[int, tuple[str, torch.Tensor]]]  # the tensors are kept, so that no address comes again
    made: ClassVar[list[StandIn]]
    pinned: ClassVar[set[int]]  # for all devices
    is_early: ClassVar[bool]

    def __init__(self, device: Any) -> None:
        self.device = device
        self.current, self._side = Stream(), Stream()
        self.owned: dict[int, bool] = {}
        self.error: str | None = None
        self.num_waits = 0
        self.free_bytes = 1 << 30
        self.refuses_to: set[str] = set()
        self.clones: list[tuple[int, int]] = []
        self.made.append(self)

    @classmethod
    def is_there(cls, tensor: torch.Tensor) -> bool:  # type: ignore[override]
        return cls.place(tensor) is not None

    @classmethod
    def place(cls, tensor: torch.Tensor) -> Any:  # type: ignore[override]
        found = cls.living.get(tensor.untyped_storage().data_ptr()) if tensor.layout == torch.strided else None
        return None if found is None else found[0]

    @classmethod
    def put(cls, tensor: torch.Tensor, device: str = "cuda:0") -> torch.Tensor:
        if tensor.numel():
            cls.living[tensor.untyped_storage().data_ptr()] = device, tensor
        return tensor

    def holding(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.put(tensor.clone(memory_format=torch.preserve_format), self.device)

    def do(self, work: Callable[[], object]) -> None:
        """What training does on the device from here on."""
        self.current.put(work)
        if self.is_early:
            self.current.here()()

    def pin(self, memory: torch.Tensor) -> bool:
        if "pin" in self.refuses_to:
            return False
        self.pinned.add(memory.data_ptr())
        return True

    def unpin(self, memory: torch.Tensor) -> None:
        self.pinned.remove(memory.data_ptr())

    def room(self) -> int:
        return self.free_bytes

    def take(self, memory: torch.Tensor | None, num_bytes: int) -> torch.Tensor:
        if "take" in self.refuses_to:
            raise torch.OutOfMemoryError("stand-in")
        if memory is None:
            memory = torch.empty(num_bytes, dtype=torch.uint8)
        assert not self.owned.get(memory.data_ptr()), "taken twice"
        self.owned[memory.data_ptr()] = True
        memory.fill_(_POISON)
        return memory

    def give_back(self, memory: torch.Tensor) -> None:
        assert self.owned[memory.data_ptr()]
        self.owned[memory.data_ptr()] = False
        memory.fill_(_POISON)

    def clone(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        if "clone" in self.refuses_to:
            raise torch.OutOfMemoryError("stand-in")
        assert len({target.dtype for target in targets} | {source.dtype for source in sources}) == 1
        assert not any(source.is_conj() or source.is_neg() for source in sources)
        self.do(partial(self._cloned, targets, sources))

    def mark(self) -> Any:
        return self.current.here()

    def carry(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, after: Any) -> Any:
        if after is not None:
            self._side.put(after)
        for target, source in zip(targets, sources, strict=True):
            assert target.untyped_storage().data_ptr() in self.pinned
            self._side.put(partial(self._carried, target, source))
            if "carry" in self.refuses_to:
                raise RuntimeError("stand-in: carry")
        return self._side.here()

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Any:
        if "copy" in self.refuses_to:
            raise torch.OutOfMemoryError("stand-in")
        assert all(target.untyped_storage().data_ptr() in self.pinned for target in targets)
        assert not any(source.is_conj() or source.is_neg() for source in sources)
        self.do(partial(self._copy, targets, sources))
        return self.mark()

    def rest(self) -> None:
        self.current.here()()
        self._side.here()()

    def wait(self, event: Any) -> None:
        self.num_waits += 1
        if self.error is not None:
            raise RuntimeError(f"{self.error}\nCompile with TORCH_USE_CUDA_DSA")
        event()

    def _carried(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert self.owned[source.untyped_storage().data_ptr()], "carried from memory that was given back"
        assert target.untyped_storage().data_ptr() in self.pinned, "carried into memory that is not pinned any more"
        self.clones.append((source.data_ptr(), source.numel()))
        self._copy([target], [source])

    def _cloned(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """As torch does it: what has two bytes by way of float32."""
        self._copy(targets, sources)
        for target in targets:
            if target.dtype in (torch.bfloat16, torch.float16):
                target.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)

    @staticmethod
    def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source.detach())


@pytest.fixture(params=["late", "early"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(staging, "AT_ONCE_BYTES", 0)
    monkeypatch.setattr(on_device, "AT_ONCE_BYTES", 0)
    return type("Calls", (StandIn,), {"living": {}, "made": [], "pinned": set(), "is_early": request.param == "early"})


def on(calls: type[StandIn], name: str = "cuda:0") -> StandIn:
    """The device that is used; another of this name tried it out, and is used, too."""
    return next(each for each in calls.made if each.device == name)


def number(step: int) -> float:
    return float(1000 * step + 7)


def mixed(calls: type[StandIn], step: int, second: str = "cuda:0") -> Named:
    """Tensors of all kinds on devices and on the CPU; every one says which step it is of."""
    fill = number(step)
    model = {
        "weight": calls.put(torch.full((5, 3), fill)),
        "transposed": calls.put((torch.arange(6.0) + fill).reshape(2, 3).t()),
        "scalar": calls.put(torch.tensor(fill, dtype=torch.float64), second),
        "empty": calls.put(torch.empty(0, 3)),
        "buffer on cpu": torch.full((2,), fill),
        "flag": calls.put(torch.tensor([step % 2 == 0, True])),
        "slice": calls.put((torch.arange(10.0) + fill)[::3], second),
        "half": calls.put(torch.full((7,), step + 0.5).bfloat16()),
        "small float": calls.put(torch.full((3,), step).to(torch.float8_e4m3fn)),
        "parameter": calls.put(nn.Parameter(torch.full((4,), fill))),  # type: ignore[arg-type]
    }
    optimizer = {}
    for index in range(4):
        optimizer[f"{index}.step"] = torch.tensor(fill + index)
        optimizer[f"{index}.exp_avg"] = calls.put(torch.full((index + 1,), fill + index), second)
        optimizer[f"{index}.exp_avg_sq"] = calls.put(torch.full((3, index), fill - index))
    optimizer["large on cpu"] = torch.full((2000,), fill)
    optimizer["last"] = calls.put(torch.full((2,), fill, dtype=torch.complex64))
    optimizer["end on cpu"] = torch.tensor(step)
    rows = {str(index): torch.full((index % 3 + 1,), fill + index) for index in range(40)}
    return {"model": model, "optimizer": optimizer, "rows": rows}


def copied(live: Named) -> Named:
    return {section: {name: t.detach().clone() for name, t in named.items()} for section, named in live.items()}


def equal(staged: Named, live: Named) -> bool:
    return {section: list(named) for section, named in staged.items()} == {s: list(n) for s, n in live.items()} and all(
        same_bytes(staged[section][name], tensor) for section, named in live.items() for name, tensor in named.items()
    )


def spoil(calls: type[StandIn], live: Named) -> None:
    """The next step: on the CPU at once, on the devices in their current streams."""
    with torch.no_grad():
        for named in live.values():
            for tensor in named.values():
                place = calls.place(tensor)
                work = partial(tensor.detach().zero_)
                work() if place is None else on(calls, place).do(work)


def arrive(arena: Arena) -> None:
    """As the writer does, in its own thread."""
    ready = arena.ready()
    assert ready is not None
    writer = threading.Thread(target=ready)
    writer.start()
    writer.join()


@pytest.mark.parametrize("second", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("way", ["clone", "no room", "no memory"])
def test_every_snapshot_holds_the_step_at_which_it_was_staged(calls: type[StandIn], second: str, way: str) -> None:
    arena, structure = Arena(Devices(calls)), object()
    for step in range(1, 5):
        live = mixed(calls, step, second)
        then = copied(live)
        if step > 1 and way != "clone":
            for each in calls.made:
                each.free_bytes = 0 if way == "no room" else each.free_bytes
                each.refuses_to = {"take"} if way == "no memory" else set()
        staged = arena.stage(live, structure=structure if step > 2 else None)
        spoil(calls, live)
        assert not equal(staged, then), "nothing has arrived yet"
        assert any(owned for each in calls.made for owned in each.owned.values()) is (way == "clone" or step == 1)
        arrive(arena)
        assert equal(staged, then)
        spoil(calls, live)
        assert equal(staged, then)
    assert [each.device for each in calls.made] == (["cuda:0"] if second == "cuda:0" else ["cuda:0", "cuda:1"])
    assert not any(owned for each in calls.made for owned in each.owned.values()), "all is given back"


def test_the_same_dicts_and_memory_come_again_while_the_layout_stays(calls: type[StandIn]) -> None:
    arena = Arena(Devices(calls))
    first = arena.stage(mixed(calls, 1))
    pinned = set(calls.pinned)
    arena.settle()
    assert arena.stage(mixed(calls, 2)) is first
    fewer = mixed(calls, 3)
    del fewer["optimizer"]["2.exp_avg"]
    staged = arena.stage(fewer)
    assert staged is not first
    arena.settle()
    assert equal(staged, fewer)
    on_cpu = copied(mixed(calls, 4))
    assert equal(arena.stage(on_cpu), on_cpu), "what moves to the CPU is there at once"
    assert arena.ready() is None
    assert calls.pinned == pinned, "pinned once"
    live = mixed(calls, 5)
    then = copied(live)
    staged = arena.stage(live)
    arena.settle()
    assert equal(staged, then)


def test_a_state_that_moves_to_a_device_gets_memory_that_can_be_pinned(calls: type[StandIn]) -> None:
    arena, live = Arena(Devices(calls)), mixed(calls, 1)
    arena.stage(copied(live))
    assert not arena._is_private
    staged = arena.stage(live)
    arena.settle()
    assert equal(staged, mixed(calls, 1))
    assert arena._is_private


def test_staging_again_waits_for_what_is_on_its_way(calls: type[StandIn]) -> None:
    """Otherwise the writer of the first would give back, or find overwritten, what belongs to the second."""
    arena = Arena(Devices(calls))
    first = mixed(calls, 1)
    staged = arena.stage(first)
    then = copied(first)
    spoil(calls, first)
    ready = arena.ready()
    assert ready is not None
    second = mixed(calls, 2)
    later = copied(second)
    seen = []
    set_out = arena._set_out
    arena._set_out = lambda sources: (seen.append(equal(staged, then)), set_out(sources))[1]  # type: ignore[method-assign]
    arena.stage(second)
    assert seen == [True], "the first is there before anything of the second is under way"
    spoil(calls, second)
    ready()
    arrive(arena)
    assert equal(staged, later)


def test_many_small_tensors_of_a_device_arrive_in_one_piece(calls: type[StandIn]) -> None:
    live: Named = {"s": {}, "t": {}}
    for index in range(50):
        live["s"][f"{index}.step"] = torch.tensor(float(index))
        live["s"][f"{index}.moment"] = calls.put(torch.full((index % 5 + 1,), float(index)))
        live["t"][f"{index}"] = calls.put(torch.full((2, index), index, dtype=torch.int16))
    arena = Arena(Devices(calls))
    staged = arena.stage(live)
    on(calls).clones.clear()
    arrive(arena)
    assert equal(staged, live)
    assert len(on(calls).clones) == 1
    live["s"]["7.step"] = torch.ones(5000)
    arena.stage(live)
    on(calls).clones.clear()
    arrive(arena)
    assert equal(staged := arena._staged, live), staged
    assert len(on(calls).clones) == 2, "what is large on the CPU is not copied twice"


def test_a_small_state_is_waited_for_at_once(calls: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be dictated to another process then."""
    monkeypatch.setattr(staging, "AT_ONCE_BYTES", 4 << 20)
    arena, live = Arena(Devices(calls)), mixed(calls, 1)
    staged = arena.stage(live)
    assert arena.ready() is None
    assert equal(staged, live)
    on(calls).error = "CUDA error"
    with pytest.raises(SnapshotWriteError, match="CUDA error"):
        arena.stage(live)
    with pytest.raises(SnapshotWriteError, match="CUDA error"):
        arena.stage(live)
    assert sum(each.owned[key] for each in calls.made for key in each.owned) == 1, "nothing new sets out before"


def test_training_does_not_wait_and_whoever_asks_does(calls: type[StandIn]) -> None:
    arena, live = Arena(Devices(calls)), mixed(calls, 1)
    staged, then = arena.stage(live), copied(live)
    waits = on(calls).num_waits
    arena.let_go()
    assert on(calls).num_waits == waits
    spoil(calls, live)
    arena.settle()
    assert equal(staged, then)
    arena.settle()
    assert on(calls).num_waits == waits + 1, "there is nothing to wait for twice"


def test_what_is_overlapped_on_the_cpu_arrives_too(calls: type[StandIn]) -> None:
    arena, live = Arena(Devices(calls)), mixed(calls, 1)
    later = {("optimizer", name) for name in ("1.step", "large on cpu", "end on cpu")}
    staged, then = arena.stage(live, later=later), copied(live)
    waiting = [staged["optimizer"][name].data_ptr() for name in ("large on cpu", "end on cpu")]
    assert arena._copying is not None
    assert [target.data_ptr() for target in arena._copying._targets] == waiting, "a step between moments does not wait"
    arena.let_go()
    spoil(calls, live)
    arrive(arena)
    assert equal(staged, then)


def test_bits_are_kept_that_no_number_has(calls: type[StandIn]) -> None:
    nans = torch.tensor([0x7FA1, -1, 0x7F81, 0x0001], dtype=torch.int16)
    live = {
        "s": {
            "bfloat16": calls.put(nans.view(torch.bfloat16)),
            "half": calls.put(nans.view(torch.float16).clone()),
            "complex": calls.put(torch.randn(3, dtype=torch.complex64).conj()),
            "negative": calls.put(torch.randn(2, dtype=torch.complex64).conj().imag),
            "wide": calls.put(torch.randn(2, dtype=torch.complex128)),
            "half complex": calls.put(nans.view(torch.complex32)),
        }
    }
    arena = Arena(Devices(calls))
    for free in (1 << 30, 0):
        for each in calls.made:
            each.free_bytes = free
        staged = arena.stage(live)["s"]
        arrive(arena)
        assert same_bytes(staged["bfloat16"].view(torch.int16), nans)
        assert same_bytes(staged["half"].view(torch.int16), nans)
        assert same_bytes(staged["half complex"].view(torch.int16), nans)
        assert all(same_bytes(staged[name], live["s"][name]) for name in ("complex", "negative", "wide"))


# -- what is not to be had -----------------------------------------------------------------------------


def test_without_pinned_memory_the_host_copies_and_waits(calls: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "pin", lambda self, memory: False)
    arena, live = Arena(Devices(calls)), mixed(calls, 1)
    staged = arena.stage(live)
    assert arena.ready() is None
    assert equal(staged, live)
    del arena
    gc.collect()
    assert not calls.pinned


def test_pages_that_forks_would_share_are_not_pinned(calls: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_MADV_WIPEONFORK", 12345)
    arena, live = Arena(Devices(calls)), mixed(calls, 1)
    assert equal(arena.stage(live), live)
    assert arena.ready() is None
    assert not calls.pinned


@pytest.mark.parametrize("refused", [{"clone"}, {"take", "copy"}])
@pytest.mark.parametrize("where", ["cuda:0", "cuda:1"])
def test_what_runs_out_of_memory_on_the_way_is_copied_by_the_host(
    calls: type[StandIn], refused: set[str], where: str
) -> None:
    arena, structure = Arena(Devices(calls)), object()
    for step, is_refused in enumerate([False, True, True, False], start=1):
        live = mixed(calls, step, "cuda:1")
        staged, then = {}, copied(live)
        if step > 1:
            on(calls, where).refuses_to = refused if is_refused else set()
        staged = arena.stage(live, structure=structure)
        spoil(calls, live)
        assert (arena.ready() is None) is is_refused
        arena.settle()
        assert equal(staged, then)
    assert not any(owned for each in calls.made for owned in each.owned.values())


def test_any_other_error_on_the_way_is_raised_when_nothing_is_under_way_any_more(calls: type[StandIn]) -> None:
    arena, live = Arena(Devices(calls)), mixed(calls, 1, "cuda:1")
    arena.stage(live)
    arena.settle()
    on(calls, "cuda:1").refuses_to = {"carry"}
    with pytest.raises(RuntimeError, match="stand-in: carry"):
        arena.stage(live)
    assert all(each._side.is_idle for each in calls.made), "what had set out cannot land on top of the next"
    assert not any(owned for each in calls.made for owned in each.owned.values())
    on(calls, "cuda:1").refuses_to = set()
    staged, then = arena.stage(live), copied(live)
    arrive(arena)
    assert equal(staged, then)


def wrong(self: StandIn, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, after: Any) -> Any:
    for target in targets:
        self._side.put(partial(target.fill_, 1))
    return self._side.here()


def failing(self: StandIn, *_: Any, **__: Any) -> Any:
    raise NotImplementedError("no such thing here")


@pytest.mark.parametrize(
    ("call", "instead", "why"),
    [
        ("carry", wrong, "is not what was there"),
        ("carry", failing, "no such thing here"),
        ("room", failing, "no such thing here"),
    ],
)
def test_a_device_from_which_a_few_tensors_do_not_arrive_is_left_alone_for_good(
    calls: type[StandIn], monkeypatch: pytest.MonkeyPatch, call: str, instead: Any, why: str
) -> None:
    monkeypatch.setattr(calls, call, instead)
    monkeypatch.setattr(on_device, "AT_ONCE_BYTES", 4 << 20)
    devices, live = Devices(calls), mixed(calls, 1)
    with pytest.warns(RuntimeWarning, match=why) as said:
        assert equal(Arena(devices).stage(live), live)
    assert len(said) == 1
    arena = Arena(devices)
    assert equal(arena.stage(live), live)
    assert arena.ready() is None


# -- errors, forks and ends ----------------------------------------------------------------------------


def test_an_error_of_the_device_is_raised_to_everyone_until_it_is_over(calls: type[StandIn]) -> None:
    arena, live = Arena(Devices(calls)), mixed(calls, 1)
    arena.stage(live)
    arena.settle()
    staged = arena.stage(live)
    ready = arena.ready()
    assert ready is not None
    on(calls).error = "CUDA error: an illegal memory access was encountered"
    for wait in (ready, arena.settle, ready, lambda: arena.stage(live)):
        with pytest.raises(
            SnapshotWriteError, match=r"from cuda:0 to the host: CUDA error: an illegal .* encountered"
        ) as e:
            wait()
        assert "TORCH_USE" not in str(e.value)
    assert any(on(calls).owned.values()), "what may still be read is not given back"
    on(calls).error = None
    arena.stage(live)
    arrive(arena)
    assert equal(staged, live)


def test_pinned_memory_is_given_back_when_nothing_writes_into_it_any_more(calls: type[StandIn]) -> None:
    arena, live = Arena(Devices(calls)), mixed(calls, 1)
    staged, then = arena.stage(live), copied(live)
    spoil(calls, live)
    assert calls.pinned
    del arena
    gc.collect()
    assert equal(staged, then), "what was under way has arrived before"
    assert not calls.pinned


def test_pinned_memory_is_given_back_after_an_error_too(calls: type[StandIn]) -> None:
    arena = Arena(Devices(calls))
    arena.stage(mixed(calls, 1))
    on(calls).error = "CUDA error"
    del arena
    gc.collect()
    assert not calls.pinned


def test_memory_that_is_replaced_is_unpinned_first(calls: type[StandIn]) -> None:
    arena = Arena(Devices(calls))
    arena.stage(mixed(calls, 1))
    before = set(calls.pinned)
    large = {"s": {"x": calls.put(torch.ones(20 << 20, dtype=torch.uint8))}}
    staged = arena.stage(large)
    assert len(calls.pinned) == len(before) == 1
    arena.settle()
    assert equal(staged, large)


def test_a_forked_process_unpins_nothing(calls: type[StandIn]) -> None:
    arena = Arena(Devices(calls))
    arena.stage(mixed(calls, 1))
    arena.settle()
    pinned = set(calls.pinned)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            del arena
            gc.collect()
            code = 0 if calls.pinned == pinned else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_memory_that_was_not_pinned_is_not_unpinned() -> None:
    device = type("Calls", (StandIn,), {"living": {}, "made": [], "pinned": set(), "is_early": True})("cuda:0")
    device.refuses_to = {"pin"}
    pin = Pin(torch.empty(10, dtype=torch.uint8), device)
    assert not pin.holds
    pin.close()


# -- through the manager -------------------------------------------------------------------------------


@pytest.fixture
def job(calls: type[StandIn]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    for tensor in [*model.state_dict().values(), *moments(optimizer)]:
        calls.put(tensor)
    return {"model": model, "optimizer": optimizer}


def moments(optimizer: Any) -> Iterator[torch.Tensor]:
    for state in optimizer.state.values():
        yield from (value for key, value in state.items() if key != "step")


def train(model: Any, optimizer: Any) -> None:
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def snapshots(calls: type[StandIn], directory: Path, job: dict[str, Any], **how: Any) -> list[Named]:
    """Several in a row, the next step right behind each."""
    states = []
    with StateManager(directory, state=job, retain=lambda kept: []) as manager:
        manager._capturing._arena = Arena(Devices(calls))
        for step in range(1, 5):
            states.append(copied({name: part.state_dict() for name, part in job.items() if name == "model"}))
            manager.snapshot(epoch=0, batch=step, step=step, **how)
            # The stand-in's current stream is empty but for clones: training on the host is what comes next there.
            for each in calls.made:
                each.current.here()()
            train(*job.values())
    return states


@pytest.mark.parametrize("background", [True, False])
def test_snapshots_in_a_row_are_each_of_their_step(
    calls: type[StandIn], tmp_path: Path, job: dict[str, Any], background: bool
) -> None:
    states = snapshots(calls, tmp_path, job, background=background)
    assert on(calls).num_waits >= 4
    for step, expected in reversed([*enumerate(states, start=1)]):
        with StateManager(tmp_path, state=job) as manager:
            assert manager.restore(str(step)).snapshot == f"step-{step:09d}"
            assert differences(expected["model"], dict(job["model"].state_dict()), place="model") == []


@pytest.mark.parametrize("background", [True, False])
def test_a_state_that_does_not_arrive_is_never_published(
    calls: type[StandIn], tmp_path: Path, job: dict[str, Any], background: bool
) -> None:
    with StateManager(tmp_path, state=job) as manager:
        manager._capturing._arena = Arena(Devices(calls))
        manager.snapshot(epoch=0, batch=1, step=1).wait()
        on(calls).error = "CUDA error: unspecified launch failure"
        with pytest.raises(SnapshotWriteError, match=r"snapshot step-000000002 .* NOT saved: .* unspecified") as e:
            manager.snapshot(epoch=0, batch=2, step=2, background=background).wait()
        assert e.value.hint is not None
        assert "device" in e.value.hint
        manager._saving._in_flight = None
        assert manager.store.names() == ["step-000000001"]
        on(calls).error = None
        manager.snapshot(epoch=0, batch=3, step=3).wait()
        manager.store.verify("step-000000003")
        assert manager.store.names() == ["step-000000001", "step-000000003"]


def test_restoring_and_closing_wait_for_what_was_staged_and_not_written(
    calls: type[StandIn], tmp_path: Path, job: dict[str, Any]
) -> None:
    manager = StateManager(tmp_path, state=job).open()
    manager._capturing._arena = Arena(Devices(calls))
    manager.snapshot(epoch=0, batch=1, step=1).wait()
    for ends in (manager.settle, manager.restore, manager.close):
        train(*job.values())
        captured = manager.capture()
        then = copied(captured.tensors)  # type: ignore[arg-type]
        staged = manager.stage(captured).tensors
        manager.let_go()
        assert not equal(staged, then)  # type: ignore[arg-type]
        ends()
        assert equal(staged, then)  # type: ignore[arg-type]


def test_a_step_does_not_wait_for_the_device_with_overlapped_staging(
    calls: type[StandIn], tmp_path: Path, job: dict[str, Any]
) -> None:
    with StateManager(tmp_path, state=job, staging="overlapped") as manager:
        manager._capturing._arena = Arena(Devices(calls))
        captured = manager.capture()
        then = copied(captured.tensors)  # type: ignore[arg-type]
        staged = manager.stage(captured).tensors
        waits = on(calls).num_waits
        on(calls).current.here()()
        train(*job.values())
        assert on(calls).num_waits == waits
        manager.settle()
        assert equal(staged, then)  # type: ignore[arg-type]


# -- the calls themselves ------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Stands for torch.cuda, and writes down what is asked of it and which copies are made meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.log: list[Any] = []
        self.stream = "current"
        self.result = 0
        calls = self

        class Side:
            def __init__(self, device: Any) -> None: ...

            def wait_event(self, event: Any) -> None:
                calls.log.append(("wait_event", "side", event.name))

        class Event:
            def __init__(self, *, blocking: bool) -> None:
                assert blocking
                self.name = "not recorded"

            def record(self, stream: str) -> None:
                self.name = f"event of {stream}"
                calls.log.append(("record", stream))

            def synchronize(self) -> None:
                calls.log.append(("synchronize", self.name))

        class Runtime:
            def cudaHostRegister(self, *args: int) -> int:  # noqa: N802 - as torch names it
                calls.log.append(("register", *args[1:]))
                return calls.result

            def cudaHostUnregister(self, *args: int) -> int:  # noqa: N802 - as torch names it
                calls.log.append(("unregister",))
                return calls.result

        @contextmanager
        def stream(side: Side) -> Iterator[None]:
            self.stream = "side"
            yield
            self.stream = "current"

        @contextmanager
        def device(device: Any) -> Iterator[None]:
            yield

        nested = {"reserved_bytes": {"all": {"current": 700}}, "allocated_bytes": {"all": {"peak": 600}}}
        for name, value in {
            "Stream": Side,
            "Event": Event,
            "cudart": Runtime,
            "stream": stream,
            "device": device,
            "current_stream": lambda device: self.stream,
            "mem_get_info": lambda device: (300, 1000),
            "memory_stats_as_nested_dict": lambda device: nested,
            "synchronize": lambda device: self.log.append(("rest",)),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "copy_" in str(func):
            is_waited_for = not (args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking", False))
            self.log.append((func.__name__.partition(".")[0], self.stream, is_waited_for))
        if "ones" in str(func):
            self.log.append(("kernel",))
        return func(*args, **(kwargs or {}))


def test_what_is_asked_of_cuda_and_in_which_order(monkeypatch: pytest.MonkeyPatch) -> None:
    with Calls(monkeypatch) as asked:
        device = Cuda(torch.device("cpu"))
        memory = device.take(None, 64)
        memory.fill_(5)
        view = memory[8:12]
        host = torch.zeros(4, dtype=torch.uint8)
        device.clone([view], [torch.tensor([1, 2, 3, 4], dtype=torch.uint8)])
        assert asked.log == [("_foreach_copy_", "current", True)]
        asked.log.clear()
        end = device.carry([host], [view], after=device.mark())
        device.wait(end)
        assert host.tolist() == [1, 2, 3, 4]
        assert asked.log == [
            ("record", "current"),
            ("wait_event", "side", "event of current"),
            ("copy_", "side", False),
            ("record", "side"),
            ("synchronize", "event of side"),
        ]
        asked.log.clear()
        device.wait(device.copy([host], [view * 2]))
        assert host.tolist() == [2, 4, 6, 8]
        assert asked.log == [
            ("_foreach_copy_", "current", False),
            ("record", "current"),
            ("synchronize", "event of current"),
        ]
        device.give_back(memory)
        assert memory.untyped_storage().size() == 0
        assert device.take(memory, 64) is memory
        view.fill_(9)
        assert memory[8:12].tolist() == [9] * 4, "views are views of it still"
        assert device.room() == 300 + 700 - 600 - 100
        assert same_bytes(device.holding(torch.arange(6.0).reshape(2, 3).t()), torch.arange(6.0).reshape(2, 3).t())
        asked.log.clear()
        device.rest()
        assert device.pin(memory)
        device.unpin(memory)
        asked.result = 2
        assert not device.pin(memory)
        assert asked.log == [("rest",), ("register", 64, 1), ("unregister",), ("register", 64, 1), ("kernel",)]


def test_what_is_asked_of_cuda_is_there_in_this_torch() -> None:
    assert "blocking" in inspect.signature(torch.cuda.Event.__new__).parameters
    for name in ("record", "synchronize"):
        assert hasattr(torch.cuda.Event, name)
    for name in ("wait_event",):
        assert hasattr(torch.cuda.Stream, name)
    for name in ("mem_get_info", "memory_stats_as_nested_dict", "current_stream", "stream", "cudart", "synchronize"):
        assert callable(getattr(torch.cuda, name))
    assert Cuda.place(torch.ones(1)) is None
    assert not Cuda.is_there(torch.ones(1))


# -- on a real device ----------------------------------------------------------------------------------

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
_LARGE = 32 << 20  # bytes: arrives long after the call has returned


def on_gpu(step: int) -> Named:
    fill = number(step)
    model = {
        "large": torch.full((_LARGE // 4,), fill, device="cuda"),
        "scalar": torch.tensor(fill, device="cuda", dtype=torch.float64),
        "transposed": (torch.arange(6.0, device="cuda") + fill).reshape(2, 3).t(),
        "channels last": torch.full((2, 3, 4, 5), fill, device="cuda").to(memory_format=torch.channels_last),
        "slice": (torch.arange(1000.0, device="cuda") + fill)[::3],
        "on cpu": torch.full((4,), fill),
        "nans": torch.tensor([0x7FA1, -1, step], dtype=torch.int16, device="cuda").view(torch.bfloat16),
        "flag": torch.tensor([step % 2 == 0], device="cuda"),
        "small float": torch.full((3,), step, device="cuda").to(torch.float8_e4m3fn),
        "conjugate": torch.full((3,), complex(step, 1), device="cuda").conj(),
        "empty": torch.empty(0, device="cuda"),
    }
    optimizer = {}
    for index in range(300):
        optimizer[f"{index}.step"] = torch.tensor(fill + index)
        optimizer[f"{index}.exp_avg"] = torch.full((index + 1,), fill + index, device="cuda")
    return {"model": model, "optimizer": optimizer}


def on_host(live: Named) -> Named:
    return {section: {name: t.detach().cpu().clone() for name, t in named.items()} for section, named in live.items()}


@on_cuda
@pytest.mark.parametrize("way", ["clone", "no room", "no memory"])
@pytest.mark.parametrize("on_side_stream", [False, True])
def test_on_a_gpu_every_snapshot_is_of_its_step(
    monkeypatch: pytest.MonkeyPatch, way: str, on_side_stream: bool
) -> None:
    if way == "no room":
        monkeypatch.setattr(Cuda, "room", lambda self: 0)
    arena = Arena()
    live = on_gpu(0)
    stream = torch.cuda.Stream() if on_side_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    busy = torch.randn(3000, 3000, device="cuda")
    with torch.cuda.stream(stream):
        for step in range(1, 8):
            expected = on_host(on_gpu(step))
            for _ in range(20):
                busy = busy @ busy / 3000  # the device is behind the host
            for section, named in on_gpu(step).items():
                for name, tensor in named.items():
                    live[section][name].copy_(tensor)
            if way == "no memory" and step > 1:
                monkeypatch.setattr(Cuda, "take", failing_to_take)
            staged = arena.stage(live)
            for named in live.values():
                for tensor in named.values():
                    tensor.zero_()
            assert arena.ready() is not None
            arrive(arena)
            assert equal(staged, expected), step


def failing_to_take(*_: Any) -> Any:
    raise torch.OutOfMemoryError("for the test")


@on_cuda
def test_on_a_gpu_a_run_of_snapshots_is_exact(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1500, 1500), nn.BatchNorm1d(1500), nn.Linear(1500, 10)).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    job: dict[str, Any] = {"model": model, "optimizer": optimizer}
    states = []
    with StateManager(tmp_path, state=job, retain=lambda kept: []) as manager:
        for step in range(1, 6):
            model(torch.randn(50, 1500, device="cuda")).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            states.append(on_host({"model": model.state_dict()})["model"])
            manager.snapshot(epoch=0, batch=step, step=step)
    for step, expected in reversed([*enumerate(states, start=1)]):
        with StateManager(tmp_path, state=job) as manager:
            manager.restore(str(step))
            assert differences(expected, on_host({"model": model.state_dict()})["model"], place="model") == []


@on_cuda
def test_on_a_gpu_memory_goes_back_on_arrival() -> None:
    arena, live = Arena(), on_gpu(1)
    arena.stage(live)
    arena.settle()
    before = torch.cuda.memory_allocated()
    arena.stage(live)
    assert torch.cuda.memory_allocated() >= before + _LARGE
    arena.settle()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
