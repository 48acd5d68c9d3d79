"""Small trainings that together use everything that could break an exact resume.

Each is a function of a run directory. Whatever number of times it is killed and called again, its
run directory must end like that of a call that was never killed.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler

from resumable_trainer import EarlyStopping, OnDivergence, Run, SnapshotPolicy, Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def table(rows: int, columns: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [rows, columns] and labels [rows, 1] of a noisy rule."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(rows, columns, generator=generator)
    noise = torch.randn(rows, 1, generator=generator)
    return inputs, (inputs[:, :3].sum(1, keepdim=True) + noise > 0).float()


def network(columns: int = 6) -> nn.Sequential:
    """Dropout draws in every forward pass, BatchNorm's buffers change in it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(columns, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1), nn.Sigmoid()
    )


def accuracy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ((outputs > 0.5) == (labels > 0.5)).float().mean()


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Each sample is changed at random, with draws from Python, NumPy and torch."""

    def __init__(self, rows: int) -> None:
        self.inputs, self.labels = table(rows)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return self.inputs[index] * scale + 0.01 * torch.randn(self.inputs.shape[1]), self.labels[index]


class CountingSampler(Sampler[list[int]]):
    """A batch sampler with a generator of its own and a counter that iterating moves."""

    def __init__(self, rows: int, size: int) -> None:
        self.rows, self.size, self.rounds = rows, size, 0
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return self.rows // self.size

    def __iter__(self) -> Iterator[list[int]]:
        self.rounds += 1
        order = torch.randperm(self.rows, generator=self.generator).roll(self.rounds).tolist()
        return iter([order[i : i + self.size] for i in range(0, self.size * len(self), self.size)])


def by_trainer(directory: str) -> None:
    """The ready-made loop: accumulation over a remainder, clipping, a scheduler, snapshots by step."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    Trainer(
        model=model,
        loss_fn=nn.BCELoss(),
        optimizer=optimizer,
        train_data=table(204),
        test_data=table(60),
        batch_size=12,
        metrics={"accuracy": accuracy},
        scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
        accumulate=3,
        clip_grad_norm=1.0,
        run_dir=directory,
        snapshots=SnapshotPolicy(every_steps=5, keep_last=2),
        early_stopping=EarlyStopping("test_accuracy", patience=3),
        progress=False,
    ).fit(epochs=9)


def by_own_loop(directory: str) -> None:
    """EMA, accumulation, a scheduler stepped before an evaluation that draws and forgets `eval()`."""
    model = network()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    train, test = table(160), table(48)
    loss_fn = nn.BCELoss()
    state = {"model": model, "ema": ema, "optimizer": optimizer, "scheduler": scheduler}
    policy = SnapshotPolicy(every_epochs=2, every_steps=3)
    with Run(directory, state=state, seed=7, snapshots=policy, progress=False) as run:
        for _epoch in run.epochs(7):
            jitter = torch.rand(()).item() * 1e-3  # drawn at the top of the body: again after a resume
            for inputs, labels in run.batches(train, batch_size=10, shuffle=True):
                outputs = model(inputs + jitter)
                loss = loss_fn(outputs, labels)
                (loss / 4).backward()
                if (run.batch + 1) % 4 == 0:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=False)
                    ema.update_parameters(model)
                run.log(loss=loss, accuracy=accuracy(outputs, labels))
            scheduler.step()
            correct = 0.0
            with torch.no_grad():
                for inputs, labels in run.evaluating(test, batch_size=16):
                    correct += float(accuracy(ema(inputs), labels)) * len(labels)
            run.log_epoch(test_accuracy=correct / 48, draw=random.random(), lr=scheduler.get_last_lr()[0])


def _by_loader(directory: str, loader: DataLoader[Any], *, epochs: int = 4) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_fn = nn.BCELoss()
    tests = DataLoader(Augmented(30), batch_size=8, num_workers=loader.num_workers)
    stopping = EarlyStopping("test_loss", mode="min", patience=2, min_delta=0.001)
    policy = SnapshotPolicy(every_steps=4)
    state = {"model": model, "optimizer": optimizer}
    with Run(directory, state=state, snapshots=policy, early_stopping=stopping, progress=False) as run:
        for _epoch in run.epochs(epochs):
            model.train()
            for inputs, labels in run.batches(loader):
                optimizer.zero_grad()
                loss = loss_fn(model(inputs), labels)
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
            model.eval()
            total = 0.0
            with torch.no_grad():
                for inputs, labels in run.evaluating(tests):
                    total += float(loss_fn(model(inputs), labels)) * len(labels)
            run.log_epoch(test_loss=total / 30)


def by_loader(directory: str) -> None:
    """A shuffling DataLoader in the training process; random augmentation in training and evaluation."""
    _by_loader(directory, DataLoader(Augmented(90), batch_size=8, shuffle=True, drop_last=True))


def by_loader_with_workers(directory: str) -> None:
    """The same with two worker processes; must end in the same bits as without."""
    _by_loader(directory, DataLoader(Augmented(90), batch_size=8, shuffle=True, drop_last=True, num_workers=2))


def by_loader_with_persistent_workers(directory: str) -> None:
    """The same with workers that live from epoch to epoch."""
    loader = DataLoader(
        Augmented(90), batch_size=8, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    _by_loader(directory, loader)


def by_batch_sampler(directory: str) -> None:
    """A batch sampler of the user's own."""
    _by_loader(directory, DataLoader(Augmented(96), batch_sampler=CountingSampler(96, 8)), epochs=5)


def by_going_back(
    directory: str, policy: SnapshotPolicy | None = None, at_start: Callable[[Run], None] = lambda run: None
) -> None:
    """One sample of the data is no number: in every epoch a batch spoils the weights, and the run goes back."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    data = Augmented(120)
    data.inputs[77, 2] = torch.nan
    loader = DataLoader(data, batch_sampler=CountingSampler(120, 10))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    settings = OnDivergence("rollback", max_rollbacks=20)
    policy = policy or SnapshotPolicy(every_steps=7)
    with Run(directory, state=state, snapshots=policy, progress=False, on_divergence=settings) as run:
        at_start(run)
        for _ in run.epochs(4):
            model.train()
            for inputs, labels in run.batches(loader):
                optimizer.zero_grad()
                loss = nn.functional.binary_cross_entropy_with_logits(model[:-1](inputs), labels)
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
            scheduler.step()
            run.log_epoch(weight=model[0].weight.sum())


def by_steps(directory: str) -> None:
    """No epochs: one long loop over a range, batches drawn in the loop, `break` at its end."""
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    inputs, labels = table(200)
    loss_fn = nn.BCELoss()
    policy = SnapshotPolicy(every_steps=3, keep_last=2)
    with Run(directory, state={"model": model, "optimizer": optimizer}, snapshots=policy, progress=False) as run:
        for _epoch in run.epochs(1):
            for step in run.batches(range(1000)):
                picked = torch.randint(0, 200, (32,))

                def closure() -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = loss_fn(model(inputs[picked]), labels[picked])  # noqa: B023 - called within this iteration
                    loss.backward()
                    return loss

                run.log(loss=optimizer.step(closure))
                if step == 40:
                    break


JOBS: dict[str, Callable[[str], None]] = {
    "trainer": by_trainer,
    "own loop": by_own_loop,
    "loader": by_loader,
    "loader, 2 workers": by_loader_with_workers,
    "loader, persistent workers": by_loader_with_persistent_workers,
    "batch sampler": by_batch_sampler,
    "steps": by_steps,
    "going back": by_going_back,
}
