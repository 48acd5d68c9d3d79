"""The laboratory's layers in their short form, and that each of them can catch a fault."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import ptrace
from crash_states import judge
from faults import Bench, base_of, benches
from lab import HOSTILE, LAYERS, Count, Lab, run_layer, scratch_directory
from model import Model, UnmodelledCallError
from scenarios import SCENARIOS, name_of
from seeded import EXPECTED, SCENARIOS_OF, SEEDED, seeded

from resumable_trainer.durable.files import BLOCK_BYTES

REASON = ptrace.why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(900)]
SEED = 3


def run(name: str) -> Count:
    with scratch_directory() as scratch:
        return run_layer(name, Lab(long=False, seed=SEED, scratch=scratch))


@pytest.mark.parametrize("layer", [name for name, module in LAYERS.items() if not (HOSTILE / f"{module}.py").exists()])
def test_no_promise_is_broken(layer: str) -> None:
    count = run(layer)
    if count.skipped is not None:
        pytest.skip(count.skipped)
    assert count.violations == []
    assert count.tried > 40


def violations_of(bench: Bench) -> list[str]:
    """Of all states that power loss may leave in one scenario, up to the first that breaks a promise."""
    import random

    model = Model(bench.root / "base", bench.directory, bench.act(lambda call, index: None, data=True).calls)
    for at, survivors in model.states(model.points(), random.Random(0), num_random=0):
        if broken := judge(bench, model.acked(at), model.disk(survivors)):
            return broken
    return []


@pytest.mark.parametrize(
    "fault",
    [
        "data files not synced",
        pytest.param("manifest not synced", marks=pytest.mark.long),
        pytest.param("new directory not synced", marks=pytest.mark.long),
        pytest.param("parent directory not synced", marks=pytest.mark.long),
        "sync before flush",
        "acknowledged before the parent is synced",
        pytest.param("retention before durable", marks=pytest.mark.long),
        "written in place",
    ],
)
def test_the_model_catches(fault: str) -> None:
    with scratch_directory() as scratch, seeded(fault):
        (bench,) = benches(Lab(long=False, seed=SEED, scratch=scratch, scenarios=("n-th snapshot",)))
        assert violations_of(bench)


def test_what_lies_there_before_a_fault_strikes_comes_from_sound_code() -> None:
    base_of.cache_clear()
    with seeded("written in place"):
        for scenario in SCENARIOS:
            base_of(scenario)
    assert base_of.cache_info().misses == len(SCENARIOS)  # made anew, once each


def test_the_model_catches_that_nothing_names_a_new_run_directory() -> None:
    with scratch_directory() as scratch, seeded("run directory's own name not synced"):
        (bench,) = benches(Lab(long=False, seed=SEED, scratch=scratch, scenarios=("first snapshot",)))
        assert violations_of(bench)


def test_a_call_that_the_model_does_not_know_is_said_and_not_skipped(tmp_path: Path) -> None:
    with pytest.raises(UnmodelledCallError, match="symlinkat"):
        Model(tmp_path / "none", tmp_path / "run", [ptrace.Call("symlinkat", str(tmp_path / "run/a"), result=0)])


def test_the_scenario_of_unchanged_files_links_them(tmp_path: Path) -> None:
    scenario = SCENARIOS["unchanged files"]
    scenario.prepare(tmp_path / "run")
    scenario.act(tmp_path / "run", lambda name: None)
    first, last = (tmp_path / "run/snapshots" / name_of(step) / "loop.safetensors" for step in (3, 5))
    assert first.samefile(last)


def test_the_scenario_past_the_page_cache_goes_past_it(tmp_path: Path, past_cache: list[int]) -> None:
    scenario = SCENARIOS["past the page cache"]
    scenario.prepare(tmp_path / "run")
    scenario.act(tmp_path / "run", lambda name: None)
    assert past_cache.count(9 * BLOCK_BYTES) == 2


def test_a_disk_that_is_full_is_met_by_the_look_and_in_a_write() -> None:
    count = run("L6")
    if count.skipped is not None:
        pytest.skip(count.skipped)
    endings = {kind.partition(": ")[2] for kind in count.detail}
    assert endings == {"refused by the look", "failed in a write", "fitted"}


def test_every_deliberate_fault_has_a_layer_and_every_layer_a_fault() -> None:
    assert EXPECTED.keys() == SEEDED.keys()
    assert SCENARIOS_OF.keys() <= SEEDED.keys()
    assert {layer for layers in EXPECTED.values() for layer in layers} == set(LAYERS)


@pytest.mark.parametrize(("fault", "layer"), [("a full disk is no error", "L6"), ("lock taken by everybody", "L9")])
def test_a_layer_catches(fault: str, layer: str) -> None:
    with scratch_directory() as scratch, seeded(fault):
        count = run_layer(layer, Lab(long=False, seed=SEED, scratch=scratch))
    if count.skipped is not None:
        pytest.skip(count.skipped)
    assert count.violations
