"""Trainer: the textbook loop for people who do not want to write it.

Train and test data, forward, loss, backward, step; metrics at every batch, their means per epoch
beside the test metrics on the whole test set; early stopping, snapshots, exact resume. It is built
on `Run` only: what it does is what an own loop would do.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal

import torch

from resumable_trainer.errors import SettingsError
from resumable_trainer.loop.run import Run
from resumable_trainer.loop.scalars import read_all, take
from resumable_trainer.trainer.backward import Backward

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn

    from resumable_trainer.loop.divergence import OnDivergence
    from resumable_trainer.loop.triggers import SnapshotPolicy
    from resumable_trainer.metrics.early_stopping import EarlyStopping
    from resumable_trainer.metrics.history import History
    from resumable_trainer.trainer.compiled import CompiledSteps

Metric = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor | float]"


class Trainer:
    """Trains a model on batches of (inputs, targets).

    Args:
        model: Called with the inputs of a batch.
        loss_fn: Called with (outputs, targets), gives a 0-dim tensor: the mean over the batch.
        optimizer: Over the model's parameters.
        train_data: A DataLoader, a tuple (inputs, targets) of tensors, a TensorDataset, or any
            iterable of batches.
        test_data: The same kinds; evaluated whole at the end of each epoch. None for no evaluation.
        batch_size: Samples per batch, for tensors; a DataLoader has its own.
        shuffle: Whether training tensors have another order in each epoch.
        metrics: Functions of (outputs, targets) by name, each the mean over a batch.
        scheduler: A learning-rate scheduler, stepped after each epoch; one that needs a metric
            (ReduceLROnPlateau) gets the test loss, or the training loss without test data.
        accumulate: Batches whose gradients are added up before the optimizer steps; a remainder at
            an epoch's end is stepped too.
        clip_grad_norm: Largest norm of the gradients (`torch.nn.utils.clip_grad_norm_`).
        state: Further parts to save and restore by name.
        device: Where batches are moved; default: where the model's first parameter is.
        run_dir: The run directory, as for `Run`.
        seed: As for `Run`.
        snapshots: As for `Run`.
        early_stopping: As for `Run`; epoch metrics are `loss`, each metric by name, and the same with
            `test_` before them.
        progress: As for `Run`.
        strict: As for `Run`.
        on_divergence: As for `Run`.
        compile: Make forward, loss, backward and update one compiled step, several times faster for small
            models: SGD, Adam and AdamW, on a CPU with a C++ compiler or a CUDA device. What cannot be
            compiled exactly is said in one line and runs eagerly. Numbers differ from an eager run's
            in the last bits. Loads machine code that this user's own runs have compiled (`compiled/` in the run
            directory, sealed with a secret in the user's cache directory).

    Raises:
        SettingsError: Illegal settings, all problems at once.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        train_data: Any,
        test_data: Any = None,
        batch_size: int | None = None,
        shuffle: bool = True,
        metrics: Mapping[str, Callable[[torch.Tensor, torch.Tensor], Any]] | None = None,
        scheduler: Any = None,
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
        state: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        snapshots: SnapshotPolicy | None = None,
        early_stopping: EarlyStopping | None = None,
        progress: bool | None = None,
        strict: bool = False,
        on_divergence: OnDivergence | Literal["stop", "rollback"] | None = None,
        compile: bool = False,
    ) -> None:
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._train_data, self._test_data = train_data, test_data
        self._batch_size, self._shuffle = batch_size, shuffle
        self._metrics = dict(metrics or {})
        self._scheduler = scheduler
        self._accumulate, self._clip = accumulate, clip_grad_norm
        parts = {"model": model, "optimizer": optimizer, **({} if scheduler is None else {"scheduler": scheduler})}
        self._check(accumulate, clip_grad_norm, state or {}, parts)
        self._device = torch.device(device) if device is not None else _device_of(model)
        self._on_cpu = self._device.type == "cpu"
        self._run = Run(
            run_dir,
            state={**parts, **(state or {})},
            seed=seed,
            snapshots=snapshots,
            early_stopping=early_stopping,
            progress=progress,
            strict=strict,
            on_divergence=on_divergence,
        )
        self._backward: Backward  # made by `fit`: until then the model may be compiled
        self._compiled = self._steps() if compile else None

    def _steps(self) -> CompiledSteps:
        from resumable_trainer.trainer.compiled import CompiledSteps

        self._run.says_how_it_steps = True
        return CompiledSteps(
            self._run,
            model=self._model,
            loss_fn=self._loss_fn,
            optimizer=self._optimizer,
            metrics=self._metrics,
            clip=self._clip,
            accumulate=self._accumulate,
        )

    def _check(
        self, accumulate: object, clip: float | None, state: Mapping[str, object], parts: Mapping[str, object]
    ) -> None:
        problems = []
        if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
            problems.append(f"accumulate is {accumulate!r}, it must be an int of at least 1")
        if clip is not None and not clip > 0:
            problems.append(f"clip_grad_norm is {clip!r}, it must be None or more than 0")
        problems += [f"part name {name!r} is the trainer's own" for name in state if name in parts]
        problems += [f"metric name {name!r} is the trainer's own" for name in self._metrics if name == "loss"]
        if problems:
            raise SettingsError(f"Trainer: {'; '.join(problems)}", found=problems)

    @property
    def run(self) -> Run:
        """The run, for its directory, outcome and position."""
        return self._run

    def fit(self, *, epochs: int) -> History:
        """Train until `epochs` epochs are done in total, or early stopping says so.

        Returns:
            The history of the whole run, earlier launches included.
        """
        with self._run as run:
            self._backward = Backward(self._model)
            if self._compiled is not None:
                self._compiled.begin_run()
            for _ in run.epochs(epochs):
                self._model.train()
                self._train_epoch()
                tests = self._evaluate() if self._test_data is not None else {}
                run.log_epoch(**tests)
                self._step_scheduler(tests)
            return run.history

    def _train_epoch(self) -> None:
        run, accumulate = self._run, self._accumulate
        if run.batch % accumulate == 0:
            self._optimizer.zero_grad()
        tensors = _is_tensors(self._train_data)
        settings: dict[str, Any] = {"batch_size": self._batch_size, "shuffle": self._shuffle} if tensors else {}
        train = self._train_batch
        if self._compiled is not None:
            self._compiled.begin_epoch()
            train = self._train_compiled
        for inputs, targets in run.batches(self._train_data, **settings):
            train(inputs, targets, step=accumulate == 1 or (run.batch + 1) % accumulate == 0)
        if run.batch % accumulate:
            self._step()

    def _train_compiled(self, inputs: Any, targets: Any, *, step: bool) -> None:
        assert self._compiled is not None
        values = self._compiled.train(self._moved(inputs), self._moved(targets))
        if values is None:
            self._train_batch(inputs, targets, step=step)
        else:
            self._run.log(**values)

    def _train_batch(self, inputs: Any, targets: Any, *, step: bool) -> None:
        inputs, targets = self._moved(inputs), self._moved(targets)
        outputs = self._model(inputs)
        loss = self._loss_fn(outputs, targets)
        self._backward(loss if self._accumulate == 1 else loss / self._accumulate)
        if step:
            self._step()
        if not self._metrics:
            self._run.log(loss=loss)
            return
        with torch.no_grad():
            values = {name: metric(outputs, targets) for name, metric in self._metrics.items()}
        self._run.log(loss=loss, **values)

    def _step(self) -> None:
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _evaluate(self) -> dict[str, float]:
        """Means of loss and metrics over the whole test set, weighted by samples."""
        rows: list[tuple[int, dict[str, Any]]] = []
        with _evaluating(self._model), torch.no_grad():
            for inputs, targets in self._run.evaluating(self._test_data, batch_size=self._eval_batch_size()):
                inputs, targets = self._moved(inputs), self._moved(targets)
                outputs = self._model(inputs)
                values = {"loss": self._loss_fn(outputs, targets)}
                values.update({name: metric(outputs, targets) for name, metric in self._metrics.items()})
                rows.append((len(targets), {}))
                take(values, rows[-1][1])
        read_all([row for _, row in rows])  # a device is waited for once
        totals: dict[str, float] = {}
        for weight, row in rows:
            for name, value in row.items():
                totals[name] = totals.get(name, 0.0) + float(value) * weight
        count = sum(weight for weight, _ in rows)
        return {f"test_{name}": total / count for name, total in totals.items()} if count else {}

    def _eval_batch_size(self) -> int | None:
        """Tensors are evaluated in larger batches than they are trained in; nothing is kept of them."""
        if self._batch_size is None or not _is_tensors(self._test_data):
            return None
        return max(self._batch_size, 1024)

    def _step_scheduler(self, tests: Mapping[str, float]) -> None:
        if isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step(tests.get("test_loss", self._run.averages["loss"]))
        elif self._scheduler is not None:
            self._scheduler.step()

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if self._on_cpu and value.is_cpu:  # quicker to see than that two devices are equal
                return value
            return value if value.device == self._device else value.to(self._device, non_blocking=True)
        if isinstance(value, dict):
            return {key: self._moved(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._moved(inner) for inner in value)
        return value


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _is_tensors(data: Any) -> bool:
    items: Iterable[Any] = data if isinstance(data, tuple | list) else (data,)
    return isinstance(data, torch.utils.data.TensorDataset) or all(isinstance(item, torch.Tensor) for item in items)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Any:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
