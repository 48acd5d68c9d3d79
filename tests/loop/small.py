"""A small training whose every step can be watched, interrupted and changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resumable_trainer import Run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Killed(Exception):
    """Stands for a kill: nothing is saved on the way out."""


@dataclass
class Small:
    """Model, optimizer and data; a fresh one is what a new process would build.

    Attributes:
        at_step: Called in the batch's body after the optimizer's step.
        at_evaluation: Called for each evaluation batch.
    """

    width: int = 4
    at_step: Callable[[Run], None] = lambda run: None
    at_evaluation: Callable[[Run], None] = lambda run: None
    accuracy: Callable[[int], float] = lambda epoch: float(epoch)
    seen: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, self.width), nn.BatchNorm1d(self.width), nn.Dropout(0.1))
        self.model.append(nn.Linear(self.width, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.data = (torch.arange(36.0).reshape(12, 3) / 36, torch.arange(12.0).reshape(12, 1) / 12)

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def train(self, directory: Path, *, epochs: int = 3, **settings: Any) -> Run:
        settings = {"progress": False, **settings}
        with Run(directory, state=self.state, **settings) as run:
            for epoch in run.epochs(epochs):
                self.model.train()
                self.train_epoch(run)
                self.model.eval()
                for _ in run.evaluating(self.data, batch_size=4):
                    torch.rand(3)  # an evaluation that draws
                    self.at_evaluation(run)
                run.log_epoch(test_accuracy=self.accuracy(epoch))
        return run

    def train_epoch(self, run: Run) -> None:
        for inputs, targets in run.batches(self.data, batch_size=3, shuffle=True):
            self.seen.append((run.epoch, run.batch))
            self.optimizer.zero_grad()
            loss = (self.model(inputs) - targets).square().mean()
            loss.backward()
            self.optimizer.step()
            run.log(loss=loss)
            self.at_step(run)


def killed_at(step: int) -> Callable[[Run], None]:
    """Raise in the body of the batch with this number."""

    def hook(run: Run) -> None:
        if run.step == step:
            raise Killed

    return hook
