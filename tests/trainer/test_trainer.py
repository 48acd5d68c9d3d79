from __future__ import annotations

from typing import TYPE_CHECKING, Any

import endings
import jobs
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from resumable_trainer import EarlyStopping, SettingsError, Trainer

if TYPE_CHECKING:
    from pathlib import Path


def trainer(directory: Path, **settings: Any) -> Trainer:
    model = jobs.network()
    options: dict[str, Any] = {
        "loss_fn": nn.BCELoss(),
        "optimizer": torch.optim.Adam(model.parameters(), lr=0.01),
        "train_data": jobs.table(60),
        "test_data": jobs.table(20),
        "batch_size": 8,
        "metrics": {"accuracy": jobs.accuracy},
        "progress": False,
        **settings,
    }
    return Trainer(model=model, run_dir=directory, **options)


def test_it_trains_and_tells_the_history_of_all_metrics(tmp_path: Path) -> None:
    history = trainer(tmp_path / "run").fit(epochs=8)
    assert history.names("step") == ["loss", "accuracy"]
    assert history.names("epoch") == ["loss", "accuracy", "test_loss", "test_accuracy"]
    assert len(history.steps("loss")) == 8 * 8
    assert history.epochs("loss")[-1] < history.epochs("loss")[0]
    picture = history.plot(tmp_path / "curves.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_means_are_weighted_by_samples(tmp_path: Path) -> None:
    history = trainer(tmp_path / "run", shuffle=False).fit(epochs=1)
    values = history.steps("accuracy")
    weights = [8] * 7 + [4]
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / 60
    assert history.epochs("accuracy")[0] == pytest.approx(mean, rel=1e-12)


def test_fit_called_again_goes_on_to_the_new_total(tmp_path: Path) -> None:
    twice = trainer(tmp_path / "twice")
    assert len(twice.fit(epochs=2).epochs("loss")) == 2
    assert len(twice.fit(epochs=2).epochs("loss")) == 2
    assert len(twice.fit(epochs=4).epochs("loss")) == 4
    trainer(tmp_path / "once").fit(epochs=4)
    assert (tmp_path / "twice/metrics.jsonl").read_bytes() == (tmp_path / "once/metrics.jsonl").read_bytes()


def test_tensors_datasets_and_loaders_of_the_same_data_train_the_same(tmp_path: Path) -> None:
    train = jobs.table(60)
    loader = DataLoader(TensorDataset(*train), batch_size=8, shuffle=True)
    trainer(tmp_path / "tensors").fit(epochs=2)
    trainer(tmp_path / "dataset", train_data=TensorDataset(*train)).fit(epochs=2)
    a, b = endings.ending(tmp_path / "tensors"), endings.ending(tmp_path / "dataset")
    assert endings.differing(a, b) == []
    history = trainer(tmp_path / "loader", train_data=loader).fit(epochs=2)
    assert len(history.steps("loss")) == 16


def test_it_stops_early_and_goes_on_with_more_patience(tmp_path: Path) -> None:
    def stopping(patience: int) -> EarlyStopping:
        return EarlyStopping("test_loss", mode="min", patience=patience, min_delta=10.0)

    first = trainer(tmp_path / "run", early_stopping=stopping(2))
    first.fit(epochs=9)
    assert (first.run.outcome, first.run.epoch) == ("stopped_early", 3)
    second = trainer(tmp_path / "run", early_stopping=stopping(4))
    second.fit(epochs=9)
    assert (second.run.outcome, second.run.epoch) == ("stopped_early", 5)


def test_illegal_settings_are_listed_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"accumulate is 0.*clip_grad_norm is -1.*'model' is the trainer's own"):
        trainer(tmp_path / "run", accumulate=0, clip_grad_norm=-1.0, state={"model": nn.Linear(1, 1)})


def test_who_asks_for_compiled_steps_gets_no_advice_on_the_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, compiled in (("eager", False), ("compiled", True)):
        trainer(tmp_path / name, progress=None, compile=compiled).fit(epochs=0)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("advice")]
        assert bool(said) is not compiled
