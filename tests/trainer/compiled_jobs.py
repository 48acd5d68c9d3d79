"""Small trainings with compiled steps, with what could break an exact resume; as a program, a launch of one."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "resume")]

import jobs
import torch
from torch import nn

from resumable_trainer import EarlyStopping, SnapshotPolicy, Trainer

if TYPE_CHECKING:
    from collections.abc import Callable


def by_hand(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    """A metric that no graph can compute."""
    return float(((outputs > 0.5) == (labels > 0.5)).sum().item()) / len(labels)


def adam() -> dict[str, Any]:
    """Dropout, BatchNorm, a frozen parameter, a scheduler by epochs, a metric in the graph."""
    model = jobs.network()
    model[0].bias.requires_grad_(False)  # before BatchNorm its gradient is noise, which Adam would make large
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "metrics": {"accuracy": jobs.accuracy}}


def sgd() -> dict[str, Any]:
    """Two groups, clipping, a metric that is computed from the outputs."""
    model = jobs.network()
    groups = [
        {"params": model[0].parameters()},
        {"params": [*model[1].parameters(), *model[4].parameters()], "lr": 0.3},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    metrics = {"by_hand": by_hand, "accuracy": jobs.accuracy}
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "metrics": metrics,
        "clip_grad_norm": 0.1,
    }


def adamw() -> dict[str, Any]:
    """amsgrad, and a loss that is a module with a buffer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1), nn.Sigmoid())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, amsgrad=True, weight_decay=0.1)
    return {"model": model, "optimizer": optimizer, "loss_fn": nn.BCELoss(weight=torch.tensor([1.5])), "metrics": {}}


JOBS: dict[str, Callable[[], dict[str, Any]]] = {"adam": adam, "sgd": sgd, "adamw": adamw}


def train(directory: Path, job: str, *, kill: int | None = None, epochs: int = 3, **settings: Any) -> Trainer:
    """One launch; every epoch has six batches of 8 samples and one of 4.

    Args:
        directory: The run directory.
        job: Name of the job.
        kill: The step in whose body the launch is left without a word.
        epochs: In total.
        settings: Instead of the job's.
    """
    torch.manual_seed(1)
    options = {
        "loss_fn": nn.BCELoss(),
        "train_data": jobs.table(52),
        "test_data": jobs.table(20),
        "batch_size": 8,
        "snapshots": SnapshotPolicy(every_steps=3, background=False),
        "early_stopping": EarlyStopping("test_loss", mode="min", patience=9),
        "progress": False,
        "compile": True,
        **JOBS[job](),
        **settings,
    }
    trainer = Trainer(run_dir=directory, **options)
    if kill is not None:
        kill_in(trainer, kill, KeyboardInterrupt)
    trainer.fit(epochs=epochs)
    return trainer


def kill_in(trainer: Trainer, step: int, how: type[BaseException] | None) -> None:
    """Leave in a step's body, after the step was trained; None sends the signal that nobody can handle."""
    run, log = trainer.run, trainer.run.log

    def log_or_die(**values: object) -> None:
        if run.step == step:
            if how is not None:
                raise how
            os.kill(os.getpid(), signal.SIGKILL)
        log(**values)

    run.log = log_or_die  # type: ignore[method-assign]


def main() -> None:
    job, directory, kill = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(1)
    if int(kill) >= 0:
        original = Trainer.fit

        def fit(self: Trainer, *, epochs: int) -> Any:
            kill_in(self, int(kill), None)
            return original(self, epochs=epochs)

        Trainer.fit = fit  # type: ignore[method-assign]
    train(Path(directory), job, progress=None)


if __name__ == "__main__":
    main()
