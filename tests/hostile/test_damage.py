"""Damaged bytes of a run are found, or do no harm (L7, short form)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import damage
import damaged_runs
import pytest
from lab import Count, Lab, scratch_directory
from scenarios import SCENARIOS

from resumable_trainer.durable.digest import FileDigest
from resumable_trainer.snapshot import manifest, verify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory() as directory:
        yield directory


def test_no_damage_is_taken_for_what_was_saved(scratch: Path) -> None:
    count = damage.run(Lab(long=False, seed=random.randrange(2**32), scratch=scratch))
    assert count.violations == []
    assert count.detail["header bits"] == damage.FLIPS_SHORT
    assert count.tried > damage.FLIPS_SHORT + 1_000


def test_every_header_bit_is_flipped_before_the_data_is_sampled(scratch: Path) -> None:
    damage.make_run(scratch / "run")
    snapshot = damage.Snapshot(scratch / "run")
    num_bits = 8 * sum(snapshot.header_length(name) for name in snapshot.files)
    chosen = list(damage.flips(snapshot, wanted=num_bits + 50, draw=random.Random(0)))
    assert len(set(chosen[:num_bits])) == num_bits
    assert all(bit >= 8 * snapshot.header_length(name) for name, bit in chosen[num_bits:])


def test_a_reader_that_checks_no_digests_of_files_is_found_out(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "verify_file", lambda path, name, entry: None)
    damage.make_run(scratch / "run")
    snapshot = damage.Snapshot(scratch / "run")
    data = snapshot.files["part.safetensors"]
    with snapshot.with_files({"part.safetensors": data[:-1] + bytes([data[-1] ^ 1])}):
        assert snapshot.look("last byte") == ["last byte: taken for what was saved"]
        assert "another state than it had" in snapshot.restore("last byte")[0]


def test_a_reader_that_checks_no_digest_of_the_manifest_is_found_out(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage.make_run(scratch / "run")
    snapshot = damage.Snapshot(scratch / "run")
    monkeypatch.setattr(manifest, "digest_bytes", lambda data: snapshot.files["manifest.json"][-36:-4].decode())
    count = Count()
    damage.flip_all(snapshot, count, wanted=1_000, draw=random.Random(1))
    assert any(line.startswith("manifest.json") for line in count.violations)


def test_a_journal_that_is_believed_without_its_digest_is_found_out(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileDigest, "__eq__", lambda self, other: True)
    SCENARIOS["journal rewind"].prepare(scratch / "killed")
    path = scratch / "killed" / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step":1', b'"step":7', 1))
    broken = damaged_runs.judge(scratch / "killed", path.name, path.read_bytes(), "another step")
    assert broken == ["another step: rows are lost, and the damaged journal is not kept"]
