"""A file of tensors is the same whatever memory they lie in, and what is worked out once is not believed too long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from resumable_trainer.durable.digest import digest_file
from resumable_trainer.durable.files import Files, NewFile
from resumable_trainer.snapshot import tensors as tensors_module
from resumable_trainer.snapshot.tensors import Image, TensorFile
from resumable_trainer.snapshot.tree import Flat
from resumable_trainer.snapshot.writer import StateFiles, Worked
from resumable_trainer.state.staging import Arena

if TYPE_CHECKING:
    from pathlib import Path


def tensors() -> dict[str, torch.Tensor]:
    return {
        "odd": torch.arange(5, dtype=torch.uint8),
        "wide": torch.arange(3.0),
        "deep": torch.arange(3),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "large": torch.arange(1000.0),
    }


def written(path: Path, image: Image) -> bytes:
    with NewFile(path, files=Files()) as file:
        image.write(file)
    assert file.digest == image.digest() == digest_file(path)
    assert file.digest.num_bytes == image.num_bytes
    return path.read_bytes()


@pytest.mark.parametrize("gather", [1, 100, 1 << 20])
def test_staged_and_scattered_tensors_give_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gather: int
) -> None:
    monkeypatch.setattr(tensors_module, "_GATHER_BYTES", gather)
    staged = Arena().stage({"before": {"x": torch.ones(3, dtype=torch.uint8)}, "s": tensors()})
    assert written(tmp_path / "a", Image(tensors())) == written(tmp_path / "b", Image(staged["s"]))


def test_tensors_that_lie_one_behind_the_other_are_one_piece() -> None:
    staged = Arena().stage({"s": {str(n): torch.ones(3) for n in range(100)}})["s"]
    assert len(Image(staged)._pieces) == 2
    apart = [torch.ones(3) for _ in range(3)]
    assert len(Image({str(n): t for n, t in enumerate(apart)})._pieces) == 4
    whole = torch.arange(8.0)
    assert len(Image({"a": whole[:2], "b": whole[2:4], "c": whole[5:]})._pieces) == 3


def test_memories_that_happen_to_touch_are_pieces_of_their_own(tmp_path: Path) -> None:
    data = bytearray(range(16))
    halves = {
        name: torch.frombuffer(memoryview(data)[at : at + 8], dtype=torch.uint8) for name, at in (("a", 0), ("b", 8))
    }
    assert halves["a"].data_ptr() + 8 == halves["b"].data_ptr()
    assert written(tmp_path / "f", Image(halves)).endswith(bytes(range(16)))
    assert len(Image(halves)._pieces) == 3


def test_a_file_of_nothing_but_empty_tensors_is_its_header(tmp_path: Path) -> None:
    image = Image({"a": torch.empty(0, 3), "b": torch.empty(2, 0)})
    assert len(image._pieces) == 1
    assert written(tmp_path / "f", image)[-1:] in b"} "


def test_an_image_follows_its_tensors(tmp_path: Path) -> None:
    named = {"w": torch.zeros(3)}
    image = Image(named)
    before = image.digest()
    named["w"].fill_(1)
    assert image.digest() != before
    assert written(tmp_path / "a", image) == written(tmp_path / "b", Image({"w": torch.ones(3)}))


def test_what_was_worked_out_is_used_only_for_the_very_same_objects(tmp_path: Path) -> None:
    worked = Worked()
    first = Flat({"s": {"x": 1}, "t": [1]}, {"s": {"w": torch.zeros(3)}, "gone": {"v": torch.ones(2)}})
    second = Flat({"s": {"x": 2}, "t": first.values["t"]}, {"s": {"w": torch.ones(5)}})
    for number, flat in enumerate((first, first, second, first)):
        assert StateFiles(flat, worked).size() == StateFiles(flat).size()
        assert worked.images.keys() == flat.tensors.keys()
        for name, known in (("a", worked), ("b", None)):
            (tmp_path / f"{name}{number}").mkdir()
            StateFiles(flat, known).write(Files(), tmp_path / f"{name}{number}")
        assert StateFiles(flat, worked).in_memory() == {
            path.name: path.read_bytes() for path in (tmp_path / f"b{number}").iterdir()
        }
        for path in (tmp_path / f"a{number}").iterdir():
            assert path.read_bytes() == (tmp_path / f"b{number}" / path.name).read_bytes()


def test_an_image_of_nothing_but_empty_tensors_is_its_header(tmp_path: Path) -> None:
    named = {"a": torch.empty(0, 3), "b": torch.empty(0)}
    written(tmp_path / "a", Image(named))
    with TensorFile(tmp_path / "a") as file:
        assert file.read("a").shape == (0, 3)
    assert Image({}).num_bytes == 16
