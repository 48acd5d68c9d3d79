"""Runs of every released format, as files that never change: today's code reads them, and goes on with them.

What they must give is spelled out here, and in `frozen_job`, not computed by the package. A new format gets a
directory and a class of tests of its own; those of the old ones stay.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from frozen_job import BYTES, DTYPES, ODD_NAN, Job, values
from make import digests, make
from safetensors.torch import load_file

from resumable_trainer import SettingsError, StateManager
from resumable_trainer.cli.main import main
from resumable_trainer.snapshot.reader import Reader
from resumable_trainer.snapshot.store import Store

HERE = Path(__file__).parent
V1 = HERE / "v1"
WITHIN, COMPLETE = "step-000000006", "step-000000004-epoch-000001"

# What the whole training, never killed, saw and drew in its last two epochs: samples, own and global generators.
SEEN = [[2, 0], [5, 3], [7, 6], [3, 5], [2, 1], [4, 0]]
DRAWN = [
    [0.16439151763916016, 0.20708602666854858, 0.057998924774706806],
    [0.7379193902015686, 0.6297363638877869, 0.5074357331894203],
    [0.0332646369934082, 0.36531615257263184, 0.03749565844198488],
    [0.9941847324371338, 0.8512683510780334, 0.4336456836623859],
    [0.6064285635948181, 0.8549431562423706, 0.06985542357461894],
    [0.5645712614059448, 0.5509352087974548, 0.09071301334386506],
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the frozen run, to be changed."""
    return Path(shutil.copytree(V1, tmp_path / "run"))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def exactly(value: Any) -> Any:
    """A form in which two values are equal only if they are the same in kind and to the bit."""
    if isinstance(value, torch.Tensor):
        extra = value.requires_grad if isinstance(value, torch.nn.Parameter) else None
        return type(value), value.dtype, tuple(value.shape), value.stride(), bits(value), extra
    if isinstance(value, np.ndarray | np.generic):
        return type(value), value.dtype, np.shape(value), value.tobytes()
    if type(value) is float:
        return struct.pack(">d", value)
    if type(value) is complex:
        return exactly(value.real), exactly(value.imag)
    if isinstance(value, dict):
        more = getattr(value, "default_factory", None)
        return type(value), more, [(exactly(key), exactly(inner)) for key, inner in value.items()]
    if isinstance(value, list | tuple) or type(value).__name__ == "deque":
        return type(value), getattr(value, "maxlen", None), [exactly(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return type(value), sorted(value)
    return type(value), value


def everything_below(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("version", sorted(path.name for path in HERE.glob("v*") if path.is_dir()))
def test_the_frozen_files_are_those_that_were_released(version: str) -> None:
    listed = (HERE / f"{version}.sha256").read_text()
    assert digests(HERE / version) == listed, "a released format's files were changed: put them back"
    assert sum(path.stat().st_size for path in (HERE / version).rglob("*")) < 200_000


def test_the_list_of_digests_is_of_the_usual_kind() -> None:
    first = (HERE / "v1.sha256").read_text().splitlines()[0].split("  ")
    assert first == [hashlib.sha256((V1 / "events.jsonl").read_bytes()).hexdigest(), "v1/events.jsonl"]


class TestVersion1:
    """Made by the code that first wrote format 1."""

    def test_both_snapshots_verify_and_their_manifests_say_what_was_saved(self) -> None:
        store = Store(V1)
        assert store.names() == [COMPLETE, WITHIN]
        complete, within = (store.verify(name) for name in store.names())
        assert (within.format, within.run_id, within.generation) == (1, "0123456789abcdef", 1)
        assert complete.position.model_dump() == {"epoch": 1, "batch": 0, "step": 4}
        assert within.position.model_dump() == {"epoch": 1, "batch": 2, "step": 6}
        assert (complete.epoch_complete, within.epoch_complete) == (True, False)
        assert (complete.parent, within.parent, within.parent_digest) == (
            "step-000000003",
            COMPLETE,
            complete.own_digest,
        )
        assert within.outcome is None
        assert within.best is not None
        assert within.best.model_dump() == {"metric": "accuracy", "value": 0.5, "epoch": 0, "step": 4}
        assert within.metrics == {"loss": 3.515625, "odd": "Infinity", "accuracy": 0.5, "never": "NaN"}
        assert within.metric_values["odd"] == float("inf")
        assert within.journal is not None
        assert (within.journal.rows, within.depends_on["seed"]) == (7, 7)
        assert within.settings["optimizer"]["param_groups.0.lr"] == 0.5

    @pytest.mark.parametrize(("name", "steps"), [(COMPLETE, 4), (WITHIN, 6)])
    def test_every_kind_of_value_and_tensor_comes_back(self, name: str, steps: int) -> None:
        sections = Reader(V1 / "snapshots" / name, Store(V1).verify(name)).sections()
        assert exactly(sections["values"]) == exactly(values())
        tied = sections["values"]["tied"]
        assert tied[0] is tied[1]
        assert exactly(sections["values"]["float"][3]) == exactly(ODD_NAN) != exactly(float("nan"))
        model = sections["model"]
        assert model["head.weight"] is model["embedding.weight"]
        assert model["embedding.weight"].tolist() == [[n / 2**steps, (n + 1) / 2**steps] for n in (0, 2, 4)]
        assert model["convolution.weight"].flatten().tolist() == [float(n) for n in range(16)]
        assert model["convolution.weight"].stride() == (8, 1, 4, 2)
        for code, dtype in DTYPES.items():
            assert (model[f"of_{code}"].dtype, bits(model[f"of_{code}"])) == (dtype, bytes(BYTES * 4))
        assert model["of_BOOL"].tolist() == [True, False]
        assert bits(model["nan32"]) == bytes.fromhex("0100c07f 0200c0ff 0100807f")
        assert (model["nan16"].dtype, bits(model["nan16"])) == (torch.bfloat16, bytes.fromhex("c17f c1ff"))
        assert (model["wide_complex"].dtype, bits(model["wide_complex"])) == (
            torch.complex128, struct.pack("<4d", 1.0, 2.0, 0.0, -0.0),
        )  # fmt: skip
        assert (model["none_at_all"].shape, model["steps"].item()) == ((0, 3), steps)
        assert (model["low"].dtype, model["low"].tolist()) == (torch.bfloat16, [1.0, -2.0])
        moments = sections["optimizer"]["state"]
        assert list(moments) == [0, 1, 2]
        assert {m["exp_avg"].dtype for m in moments.values()} == {torch.float32}, "also those of bfloat16 parameters"
        assert moments[2]["exp_avg_sq"].unique().tolist() == [steps / 8]
        assert sections["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
        assert sections["scheduler"]["mode_worse"] == float("inf")
        assert sections["modes"]["model"] == {
            "training": True, "otherwise": ["head"], "frozen": ["convolution.weight"],
        }  # fmt: skip
        assert sections["gradients"]["pending"]["model"]["low"].tolist() == [float(steps)] * 2
        assert sections["generators"]["accelerators"] == {}

    def test_other_readers_of_the_layout_see_the_same(self) -> None:
        model = load_file(V1 / "snapshots" / WITHIN / "model.safetensors")
        assert model["embedding.weight"].tolist() == [[n / 64, (n + 1) / 64] for n in (0, 2, 4)]
        assert "head.weight" not in model, "a tied tensor is stored once"
        assert bits(model["nan32"]) == bytes.fromhex("0100c07f 0200c0ff 0100807f")
        assert (model["wide_complex"].dtype, model["wide_complex"].shape) == (torch.float64, (2, 2))
        state = json.loads((V1 / "snapshots" / WITHIN / "state.json").read_bytes())
        assert state["model"]["head.weight"] == {"$tensor": ["model", "embedding.weight"]}
        assert state["values"]["float"][3] == {"$float": "nan:fff8000000000001"}
        assert state["values"]["a"] == {"b": {"$tensor": ["values", "a.b~2"]}}
        assert state["loop"]["cursor"] == {"epoch": 1, "batch": 2, "step": 6, "loops": [[2, False]]}
        text = json.dumps(state)
        tags = (
            "tensor tuple set frozenset dict ordered counter deque defaultdict bytes bytearray int float complex range"
            " slice path datetime timedelta ndarray npscalar npdtype torchdtype device size enum"
        )
        assert [tag for tag in tags.split() if f'"${tag}"' not in text] == [], "every tag of FORMAT.md is in it"

    def test_a_state_manager_puts_it_into_fresh_parts(self, run: Path) -> None:
        job = Job(filled=False)
        with torch.no_grad():
            job.model.embedding.weight.zero_()
        with StateManager(run, state=job.state) as manager:
            report = manager.restore()
        assert (report.snapshot, report.notes, report.quarantined) == (WITHIN, (), {})
        assert job.model.head.weight is job.model.embedding.weight
        assert job.model.head.weight.tolist() == [[n / 64, (n + 1) / 64] for n in (0, 2, 4)]
        assert (job.model.head.training, job.model.convolution.weight.requires_grad) == (False, False)
        assert exactly(job.values.values) == exactly(values())
        assert job.optimizer.state[job.model.low]["exp_avg"].dtype == torch.float32
        assert job.model.low.grad is not None
        assert job.model.low.grad.tolist() == [6.0, 6.0]
        assert [torch.rand((), generator=job.generator).item(), torch.rand(()).item()] == DRAWN[0][:2]

    @pytest.mark.parametrize(("which", "num_batches"), [(WITHIN, 6), (COMPLETE, 8)])
    def test_a_run_goes_on_with_it_to_the_end(self, run: Path, which: str, num_batches: int) -> None:
        if which == COMPLETE:
            shutil.rmtree(run / "snapshots" / WITHIN)
        job = Job(filled=False)
        done = job.train(run)
        assert (done.resumed_from, done.outcome, done.step, done.epoch) == (which, "finished", 12, 3)
        assert job.seen[-6:] == SEEN
        assert job.drawn[-6:] == DRAWN
        assert len(job.seen) == num_batches
        assert job.model.embedding.weight.tolist() == [[n / 4096, (n + 1) / 4096] for n in (0, 2, 4)]
        assert job.optimizer.param_groups[0]["lr"] == 0.25
        losses = [row["loss"] for row in done.history.to_records() if row["row"] == "step"]
        assert losses == [15 / 2 ** (n + 1) for n in range(12)]
        assert done.history.epochs("accuracy") == [0.5, 0.25, 0.75]
        assert Store(run).manifest(done_name(run)).best.model_dump() == {  # type: ignore[union-attr]
            "metric": "accuracy", "value": 0.75, "epoch": 2, "step": 12,
        }  # fmt: skip

    def test_the_commands_read_it(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = everything_below(run)

        def said(*words: str, code: int = 0) -> Any:
            capsys.readouterr()
            assert main([*words, "--json"]) == code
            return json.loads(capsys.readouterr().out)

        assert [(s["name"], s["valid"], s["best"]) for s in said("list", str(run))] == [
            (COMPLETE, True, True), (WITHIN, True, False),
        ]  # fmt: skip
        status = said("status", str(run))
        assert (status["state"], status["step"], status["epoch"], status["batch"]) == ("failed", 6, 1, 2)
        assert said("show", str(run), "6")["tensors"]["model.safetensors"] == 27
        assert said("verify", str(run))["valid"] is True
        assert said("diff", f"{run}:4", f"{run}:6", code=1)["rows"]["a"] == 5
        exported = said("export", str(run), "--format", "torch", "-o", str(tmp_path / "best.pt"))
        assert exported["snapshot"] == COMPLETE
        assert torch.load(tmp_path / "best.pt", weights_only=True)["steps"].item() == 4
        assert said("prune", str(run), "--dry-run")["kept"] == [COMPLETE, WITHIN]
        assert everything_below(run) == before
        assert said("fork", str(run), str(tmp_path / "fork"))["snapshot"] == WITHIN
        assert Job().train(tmp_path / "fork").step == 12

    def test_todays_writer_gives_the_same_bytes(self, tmp_path: Path) -> None:
        """As long as the format that is written is this one; what depends on torch's version is left out."""
        make(tmp_path / "v1")
        for name in (COMPLETE, WITHIN):
            then, now = V1 / "snapshots" / name, tmp_path / "v1/snapshots" / name
            for file in ("model", "values", "optimizer", "generator", "generators", "gradients"):
                assert (then / f"{file}.safetensors").read_bytes() == (now / f"{file}.safetensors").read_bytes(), file
            states = [json.loads((path / "state.json").read_bytes()) for path in (then, now)]
            for section in ("model", "values", "generator", "modes", "gradients", "generators", "loop"):
                assert states[0].get(section) == states[1].get(section), section
        assert (tmp_path / "v1/metrics.jsonl").read_bytes() == (V1 / "metrics.jsonl").read_bytes()


def done_name(run: Path) -> str:
    return Store(run).names()[-1]


@pytest.mark.parametrize("more", [b"", b'  "new_field": {"of": [2]},\n'])
def test_a_higher_format_is_refused_and_not_taken_for_damage(
    run: Path, capsys: pytest.CaptureFixture[str], more: bytes
) -> None:
    path = run / "snapshots" / WITHIN / "manifest.json"
    body, _, _ = path.read_bytes().rpartition(b',\n  "digest"')
    body = body.replace(b'  "format": 1,\n', b'  "format": 2,\n' + more)
    path.write_bytes(body + b',\n  "digest": "%s"\n}\n' % xxhash.xxh3_128_hexdigest(body).encode())
    before = everything_below(run / "snapshots")
    refusal = "manifest.json is of format 2, this version reads up to 1 - install a newer resumable-trainer"
    with pytest.raises(SettingsError) as caught:
        Job().train(run)
    assert str(caught.value) == refusal
    with pytest.raises(SettingsError, match="format 2"), StateManager(run, state=Job().state):
        pass
    for words in (["list"], ["status"], ["show"], ["verify"], ["prune"]):
        assert main([words[0], str(run)]) == 78, words
        assert refusal in capsys.readouterr().err
    assert everything_below(run / "snapshots") == before
    assert not (run / "quarantine").exists()
