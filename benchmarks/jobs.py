"""The jobs that all arms share: models, data, optimizers, the step; and the loops as people write them.

Same for all arms: the model and its first values, the data, the loss, Adam with torch's defaults, one thread count.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from benchmarks.worker import Laps

Tensors = tuple[torch.Tensor, torch.Tensor]
FOREVER = 10**9


@dataclass(frozen=True)
class Job:
    """A small training.

    Attributes:
        name: One of `JOBS`.
        widths: Of the layers.
        num_rows: Rows of data.
        batch_size: Rows of a batch.
        device: Where model and data are.
    """

    name: str
    widths: tuple[int, ...]
    num_rows: int
    batch_size: int
    device: str = "cpu"

    def model(self) -> nn.Sequential:
        """A new model, always with the same first values."""
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(self.widths, self.widths[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        layers[-1] = nn.Sigmoid()
        return nn.Sequential(*layers).to(self.device)

    def data(self) -> Tensors:
        """Features [n, d] and labels [n, 1] of 0 and 1, always the same."""
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(self.num_rows, self.widths[0], generator=generator)
        labels = (features.sum(1, keepdim=True) + torch.randn(self.num_rows, 1, generator=generator) > 0).float()
        return features.to(self.device), labels.to(self.device)


CLASSIC = Job("classic", (8, 12, 8, 1), 768, 10)
WIDE = Job("wide", (64, 256, 128, 1), 60_000, 256)
WIDE_SMALL = Job("wide, small network", (64, 12, 8, 1), 60_000, 256)
LONG = Job("long", (256, 256, 256, 256, 1), 256 * 100, 256)  # its batch is made to fit 5 ms
JOBS = {job.name: job for job in (CLASSIC, WIDE, WIDE_SMALL, LONG)}
LOSS = nn.BCELoss()


def job_of(name: str, batch_size: int | None = None, device: str = "cpu") -> Job:
    """A job by name; with another batch size it has as many batches as before."""
    job = JOBS[name]
    batch = batch_size or job.batch_size
    return Job(name, job.widths, job.num_rows // job.batch_size * batch if batch_size else job.num_rows, batch, device)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all arms."""
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, labels: torch.Tensor) -> Any:
    """What is done with a batch by all arms; the loss."""
    optimizer.zero_grad()
    loss = LOSS(model(inputs), labels)
    loss.backward()
    optimizer.step()
    return loss


def batch_size_for(job: Job, seconds: float) -> int:
    """The batch size with which a step takes so long, by the fastest of some: others may use the machine, too."""
    model = job.model()
    optimizer = adam(model)
    batch = job.batch_size
    for _ in range(4):
        inputs, labels = torch.randn(batch, job.widths[0]), torch.ones(batch, 1)
        taken = []
        for _ in range(30):
            started = time.perf_counter()
            step(model, optimizer, inputs, labels)
            taken.append(time.perf_counter() - started)
        batch = max(8, round(batch * seconds / min(taken) / 8) * 8)
    return batch


# -- loops of people, and the package's -----------------------------------------------------------------


def random_orders(num_rows: int) -> Iterator[torch.Tensor]:
    """As a loop draws them by itself."""
    while True:
        yield torch.randperm(num_rows)


def hand_written(
    job: Job, *, epochs: int, laps: Callable[[], object] = int, orders: Iterable[torch.Tensor] | None = None
) -> nn.Module:
    """The loop as people write it who gather their batches themselves; no features. Gives the trained model."""
    model, (features, labels) = job.model(), job.data()
    optimizer = adam(model)
    draw = iter(orders if orders is not None else random_orders(job.num_rows))
    for _ in range(epochs):
        laps()
        for rows in torch.split(next(draw).to(job.device), job.batch_size):
            step(model, optimizer, features.index_select(0, rows), labels.index_select(0, rows))
    return model


def unwrapped(job: Job, *, epochs: int, laps: Callable[[], object] = int) -> nn.Module:
    """The hand-written loop with as little around torch's kernels as can be written: no eager loop can do with less.

    That is without what torch wraps around steps and gradients, with one call where its Adam makes one for each
    parameter, and without a look at anything that could have changed.
    """
    model, (features, labels) = job.model(), job.data()
    parameters = list(model.parameters())
    ask = torch.autograd.Variable._execution_engine.run_backward
    update = least_adam(parameters)
    for _ in range(epochs):
        laps()
        for rows in torch.split(torch.randperm(job.num_rows).to(job.device), job.batch_size):
            inputs, targets = features.index_select(0, rows), labels.index_select(0, rows)
            for parameter in parameters:
                parameter.grad = None
            loss = LOSS(model(inputs), targets)
            ask((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
            update()
    return model


def least_adam(parameters: list[nn.Parameter]) -> Callable[[], None]:
    """A step of Adam as in `adam`, for parameters that all have gradients."""
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    steps = [torch.zeros(()) for _ in parameters]

    @torch.no_grad()
    def update() -> None:
        grads: Any = [parameter.grad for parameter in parameters]
        torch._foreach_add_(steps, 1)
        step = steps[0].item()
        torch._foreach_lerp_(means, grads, 1 - 0.9)
        torch._foreach_mul_(squares, 0.999)
        torch._foreach_addcmul_(squares, grads, grads, 1 - 0.999)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, (1 - 0.999**step) ** 0.5)
        torch._foreach_add_(denominators, 1e-8)
        torch._foreach_addcdiv_(parameters, means, denominators, -(1e-3 / (1 - 0.9**step)))

    return update


def with_loader(job: Job, *, epochs: int, laps: Callable[[], object] = int) -> nn.Module:
    """The loop as most people write it; no features."""
    model = job.model()
    optimizer, loader = adam(model), loader_of(job)
    for _ in range(epochs):
        laps()
        for inputs, labels in loader:
            step(model, optimizer, inputs.to(job.device), labels.to(job.device))
    return model


def loader_of(job: Job) -> torch.utils.data.DataLoader[Any]:
    """The DataLoader of all peers: shuffled, in this process."""
    features, labels = job.data()
    data = torch.utils.data.TensorDataset(features.cpu(), labels.cpu())
    return torch.utils.data.DataLoader(data, batch_size=job.batch_size, shuffle=True)


def own_loop(
    job: Job, directory: str, *, epochs: int, laps: Callable[[], object] = int, every_epochs: int | None = 1
) -> nn.Module:
    """The package's loop with all features on: bars, a row per step, early stopping, a durable snapshot each epoch."""
    from resumable_trainer import EarlyStopping, Run, SnapshotPolicy

    model, data = job.model(), job.data()
    optimizer = adam(model)
    stopping = EarlyStopping("loss", mode="min", patience=FOREVER)
    policy = SnapshotPolicy(every_epochs=every_epochs)
    with Run(
        directory,
        state={"model": model, "optimizer": optimizer},
        early_stopping=stopping,
        progress=True,
        snapshots=policy,
    ) as run:
        for _ in run.epochs(epochs):
            laps()
            for inputs, labels in run.batches(data, batch_size=job.batch_size, shuffle=True):
                run.log(loss=step(model, optimizer, inputs, labels))
    return model


def trainer(
    job: Job, directory: str, *, epochs: int, laps: Callable[[], object] = int, compiled: bool = False
) -> nn.Module:
    """The package's ready-made loop, with the same features on."""
    from resumable_trainer import EarlyStopping, Trainer

    model = _Lapped(job.model(), laps)
    Trainer(
        model=model,
        loss_fn=LOSS,
        optimizer=adam(model),
        train_data=job.data(),
        batch_size=job.batch_size,
        run_dir=directory,
        early_stopping=EarlyStopping("loss", mode="min", patience=FOREVER),
        progress=True,
        **({"compile": True} if compiled else {}),
    ).fit(epochs=epochs)
    return model


def can_compile() -> bool:
    """Whether the Trainer has compiled steps."""
    import inspect

    from resumable_trainer import Trainer

    return "compile" in inspect.signature(Trainer).parameters


class _Lapped(nn.Sequential):
    """A model that says when an epoch begins: the Trainer calls `train()` once there."""

    def __init__(self, model: nn.Sequential, laps: Callable[[], object]) -> None:
        super().__init__(*model)
        self._laps = laps

    def train(self, mode: bool = True) -> _Lapped:
        """As ever; nobody evaluates in between here."""
        if mode and "_laps" in vars(self):
            self._laps()
        super().train(mode)
        return self


# -- the big state --------------------------------------------------------------------------------------


def big_state(
    num_bytes: int, *, frozen: float = 0.0, width: int = 2048, device: str = "cpu"
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of equal layers and its Adam after one step, without gradients, of about so many bytes together.

    Args:
        num_bytes: Parameters and both moments.
        frozen: Which part of them belongs to parameters that are not trained.
        width: Of the layers.
        device: Where both are.
    """
    torch.manual_seed(0)
    layer = 4 * width * width
    num_frozen = round(num_bytes * frozen / layer)
    num_trained = max(1, round(num_bytes * (1 - frozen) / 3 / layer))
    layers = [nn.Linear(width, width, bias=False, device=device) for _ in range(num_frozen + num_trained)]
    for each in layers[:num_frozen]:
        each.requires_grad_(False)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    train_once(optimizer)
    return model, optimizer


def train_once(optimizer: torch.optim.Optimizer) -> None:
    """A step with gradients that are made up; changes every trained value, and leaves no gradients."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def work_of(*, seconds: float) -> Callable[[], None]:
    """Multiplications of matrices that fit into a cache, for about so long: what forward and backward mostly are."""
    factor = torch.randn(384, 384)

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(factor, factor)

    started = time.perf_counter()
    multiply(100)
    times = round(100 * seconds / (time.perf_counter() - started)) + 1
    return lambda: multiply(times)


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All tensors of the two that are more than numbers."""
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return [tensor.detach() for tensor in [*model.state_dict().values(), *states] if tensor.numel() > 1]


def num_bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensor data."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# -- arms for workers -----------------------------------------------------------------------------------


def arm(
    laps: Laps,
    *,
    kind: str,
    job: str,
    epochs: int,
    directory: str,
    batch_size: int | None = None,
    device: str = "cpu",
) -> None:
    """One arm of the loops, for a worker.

    Args:
        laps: Called at the beginning of each epoch.
        kind: "hand-written", "unwrapped", "DataLoader", "own loop", "Trainer" or "compiled".
        job: Name of the job.
        epochs: In a turn.
        directory: For what it saves.
        batch_size: If not the job's own.
        device: Where model and data are.
    """
    laps.plan(epochs=epochs, warmup=2)
    what = job_of(job, batch_size, device)
    if kind == "hand-written":
        hand_written(what, epochs=FOREVER, laps=laps)
    elif kind == "unwrapped":
        unwrapped(what, epochs=FOREVER, laps=laps)
    elif kind == "DataLoader":
        with_loader(what, epochs=FOREVER, laps=laps)
    elif kind == "own loop":
        own_loop(what, directory, epochs=FOREVER, laps=laps)
    else:
        trainer(what, directory, epochs=FOREVER, laps=laps, compiled=kind == "compiled")
