"""Staged tensors are copies, lie one behind the other, and stay what they were whatever happens to the live ones."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

from resumable_trainer.state import staging
from resumable_trainer.state.compare import same_bytes
from resumable_trainer.state.staging import Arena

Named = dict[str, dict[str, torch.Tensor]]


def tensors() -> Named:
    return {
        "model": {
            "odd": torch.arange(5, dtype=torch.uint8),
            "wide": torch.randn(3),
            "deep": torch.arange(3),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            "empty": torch.empty(0, 3),
            "flag": torch.tensor([True, False]),
            "half": torch.randn(7).bfloat16(),
        },
        "optimizer": {
            "transposed": torch.arange(6.0).reshape(2, 3).t(),
            "parameter": torch.nn.Parameter(torch.randn(4)),
            "conjugate": torch.randn(2, dtype=torch.complex64).conj(),
            "slice": torch.arange(10.0)[::3],
        },
    }


def equal(staged: Named, live: Named) -> bool:
    return {section: list(named) for section, named in staged.items()} == {s: list(n) for s, n in live.items()} and all(
        same_bytes(staged[section][name], tensor) for section, named in live.items() for name, tensor in named.items()
    )


def test_what_is_staged_has_the_bytes_of_then_in_memory_of_its_own() -> None:
    live, arena = tensors(), Arena()
    staged = arena.stage(live)
    assert equal(staged, live)
    before = {s: {n: t.clone() for n, t in named.items()} for s, named in live.items()}
    with torch.no_grad():
        for named in live.values():
            for tensor in named.values():
                tensor.copy_(torch.ones(()))
    assert equal(staged, before)
    assert all(not t.requires_grad and t.is_contiguous() for named in staged.values() for t in named.values())


def test_tensors_of_a_section_lie_one_behind_the_other() -> None:
    staged = Arena().stage({"s": {str(n): torch.full((n,), float(n)) for n in range(1, 9)}})["s"]
    end = staged["1"].data_ptr()
    for tensor in staged.values():
        assert tensor.data_ptr() == end
        end += tensor.numel() * 4


def test_the_same_memory_and_the_same_dicts_come_again_while_the_layout_stays() -> None:
    arena = Arena()
    first = arena.stage(tensors())
    addresses = [t.data_ptr() for named in first.values() for t in named.values()]
    live = tensors()
    again = arena.stage(live)
    assert again is first
    assert all(again[section] is first[section] for section in first)
    assert [t.data_ptr() for named in again.values() for t in named.values()] == addresses
    assert equal(again, live)


@pytest.mark.parametrize(
    "change",
    [
        lambda live: live["model"].update(wide=torch.randn(4)),
        lambda live: live["model"].update(wide=torch.randn(3, 1)),
        lambda live: live["model"].update(wide=torch.ones(3, dtype=torch.int32)),
        lambda live: live["model"].update(new=torch.ones(1)),
        lambda live: live["model"].pop("odd"),
        lambda live: live.pop("optimizer"),
        lambda live: live.update(zoo=live.pop("model")),
        lambda live: live["model"].update(new=live["model"].pop("wide")),
        lambda live: live.update(large={"x": torch.randn(1_000_000)}),
        lambda live: live.clear(),
    ],
)
def test_another_layout_gets_dicts_of_its_own_and_is_exact(change: Any) -> None:
    arena, live = Arena(), tensors()
    first = arena.stage(live)
    change(live)
    staged = arena.stage(live)
    assert staged is not first
    assert all(staged[section] is not first.get(section) for section in staged)
    assert equal(staged, live)
    last = tensors()
    assert equal(arena.stage(last), last)


def test_a_structure_that_is_the_very_same_object_stands_for_an_equal_layout() -> None:
    arena, structure = Arena(), object()
    first = arena.stage(tensors(), structure=structure)
    live = tensors()
    assert arena.stage(live, structure=structure) is first
    assert equal(first, live)
    grown = tensors() | {"more": {"x": torch.randn(3)}}
    assert equal(arena.stage(grown, structure=object()), grown)
    assert equal(arena.stage(live, structure=None), live)
    assert equal(arena.stage(grown, structure=structure), grown), "it stands for nothing once another came between"


def test_an_equal_structure_is_not_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    arena, structure = Arena(), object()
    arena.stage(tensors(), structure=structure)
    monkeypatch.delattr(Arena, "_lay_out")
    live = tensors()
    assert equal(arena.stage(live, structure=structure), live)
    with pytest.raises(AttributeError):
        arena.stage(live, structure=object())


def test_memory_that_has_become_much_too_large_is_given_back() -> None:
    arena = Arena()
    arena.stage({"s": {"x": torch.ones(40 << 20, dtype=torch.uint8)}})
    assert arena._memory.numel() == 40 << 20
    arena.stage({"s": {"x": torch.ones(10, dtype=torch.uint8)}})
    assert arena._memory.numel() == 10


@pytest.mark.parametrize("cores", [1, 2])
def test_many_tensors_are_all_copied_however_many_cores_there_are(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(staging, "_num_cores", lambda: cores)
    live = {"s": {str(n): torch.randn(n % 7) for n in range(2 * staging._MANY_TENSORS + 1)}}
    assert equal(Arena().stage(live), live)


@pytest.mark.parametrize("cores", [1, 2, 9])
def test_a_large_state_is_cut_up_for_threads_and_whole_again(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(staging, "_num_cores", lambda: cores)
    monkeypatch.setattr(staging, "_LARGE_BYTES", 1000)
    monkeypatch.setattr(staging, "_PORTION_BYTES", 100)
    monkeypatch.setattr(staging, "_MOST_ROWS", 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    threads = set()

    def noted(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        threads.add(threading.get_ident())
        assert len(sources) == 1 or sum(source.nbytes for source in sources[:-1]) <= 100
        assert len(sources) <= 5
        time.sleep(0.001)  # nobody copies all of it before the others have begun
        copy(targets, sources)

    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", noted if cores > 1 else copy)
    live = {
        "s": {
            "large": nn.Parameter(torch.randn(33, 7)),
            "small": torch.randn(3),
            "flipped": torch.randn(40, 9).t(),
            "conjugate": torch.randn(100, dtype=torch.complex64).conj(),
            "empty": torch.empty(0, 5),
            "number": torch.tensor(7),
            "half": torch.randn(301).to(torch.bfloat16),
        },
        "t": {str(n): torch.randn(n) for n in range(23)} | {"last": torch.arange(1001, dtype=torch.uint8)},
    }
    assert equal(Arena().stage(live), live)
    assert cores == 1 or 1 < len(threads) <= min(cores, staging._MOST_THREADS)


def test_a_large_state_is_left_to_torch_where_it_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_num_cores", lambda: 2)
    monkeypatch.setattr(staging, "_LARGE_BYTES", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert staging._num_threads([torch.ones(1000)]) == 1


def test_an_error_of_the_other_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_num_cores", lambda: 2)
    copy = staging._copy_all

    def failing(*args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("the other half")
        copy(*args)

    monkeypatch.setattr(staging, "_copy_all", failing)
    with pytest.raises(MemoryError, match="the other half"):
        Arena().stage({"s": {str(n): torch.ones(1) for n in range(staging._MANY_TENSORS)}})


def test_cores_are_counted_where_the_system_does_not_say_which_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert staging._num_cores() == os.cpu_count()


@pytest.mark.parametrize("num_bytes", [1000, staging._HUGE_BYTES])
def test_a_forked_process_stages_into_pages_of_its_own_and_changes_nothing_here(num_bytes: int) -> None:
    arena, live = Arena(), {"s": {"x": torch.full((num_bytes,), 7, dtype=torch.uint8)}}
    staged = arena.stage(live)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            live["s"]["x"].fill_(9)
            code = 0 if equal(arena.stage(live), live) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert bool((staged["s"]["x"] == 7).all())


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs smaps")
def test_large_memory_is_not_shared_with_forked_processes() -> None:
    """Shared pages are copied at the next snapshot, each by a fault, and then are there twice."""
    memory, is_private = staging._memory(staging._HUGE_BYTES)
    assert is_private
    flags = ""
    with open("/proc/self/smaps") as smaps:
        inside = False
        for line in smaps:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                begin, end = (int(word, 16) for word in words[0].split("-"))
                inside = begin <= memory.data_ptr() < end
            elif inside and line.startswith("VmFlags"):
                flags = line
    assert " wf" in flags


def test_a_system_that_knows_no_advice_stages_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_MADV_WIPEONFORK", 12345)
    for _ in range(2):
        memory, is_private = staging._memory(staging._HUGE_BYTES)
        assert memory.numel() == staging._HUGE_BYTES
        assert not is_private
        monkeypatch.delattr(staging.mmap, "MAP_PRIVATE", raising=False)


def rows(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("most", [17, 256])
def test_neighbours_that_are_rows_of_one_are_copied_as_what_they_are(
    monkeypatch: pytest.MonkeyPatch, cores: int, most: int
) -> None:
    monkeypatch.setattr(staging, "_num_cores", lambda: cores)
    monkeypatch.setattr(staging, "_MOST_ROWS", most)
    monkeypatch.setattr(staging, "_MANY_TENSORS", 50)

    def live() -> dict[str, dict[str, torch.Tensor]]:
        mixed = [
            *rows(*[(n % 5 + 1,) for n in range(40)]),
            *rows((2, 3), (), (0,), (3, 2)),
            *rows(*[(n % 3 + 1, 4) for n in range(30)]),
            *rows(*[(4, 1) for _ in range(20)], dtype=torch.bfloat16),
            *[torch.randn(5, 2).t() for _ in range(20)],
            *[nn.Parameter(torch.randn(2, 5)) for _ in range(20)],
            *rows(*[() for _ in range(20)]),
            *rows(*[(0, 3) for _ in range(20)]),
        ]
        return {"s": {str(n): tensor for n, tensor in enumerate(mixed)}, "t": {"x": torch.randn(3)}}

    arena, structure = Arena(), object()
    for _ in range(3):
        now = live()
        assert equal(arena.stage(now, structure=structure), now)
    assert len(arena._rows) >= 4
    assert equal(arena.stage(now, structure=None), now)
    assert not arena._rows, "what stands for nothing is copied one by one"
    other = {"s": {str(n): tensor for n, tensor in enumerate(rows(*[(3,) for _ in range(60)]))}}
    assert equal(arena.stage(other, structure=object()), other)


def test_a_number_behind_many_vectors_is_no_row_of_theirs() -> None:
    tensors = {str(i): torch.full((3,), float(i)) for i in range(20)} | {"n": torch.tensor(7.0)}
    tensors |= {f"more {i}": torch.full((3,), float(i)) for i in range(20)}
    staged = Arena().stage({"model": tensors}, structure=object())["model"]
    assert all(torch.equal(staged[name], tensor) for name, tensor in tensors.items())


def test_neighbours_of_another_dtype_are_no_rows_of_theirs() -> None:
    dtypes = [torch.float32, torch.int32] * 20
    tensors = {str(i): torch.full((4,), i, dtype=dtype) for i, dtype in enumerate(dtypes)}
    staged = Arena().stage({"model": tensors}, structure=object())["model"]
    assert all(torch.equal(staged[name], tensor) for name, tensor in tensors.items())
    assert [tensor.dtype for tensor in staged.values()] == dtypes
