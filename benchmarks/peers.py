"""The shared jobs in the loops of other projects, each as its documentation shows it, with what costs time turned off.

No bars, no logging, no checkpoints: they do less than the package does beside them. All read the same DataLoader.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.jobs import FOREVER, LOSS, Job, adam, job_of, loader_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.worker import Laps

# Name in the table: module, distribution.
PEERS = {
    "Ignite": ("ignite", "pytorch-ignite"),
    "Accelerate": ("accelerate", "accelerate"),
    "HF Trainer": ("transformers", "transformers"),
    "Lightning": ("lightning", "lightning"),
}


def why_not(name: str) -> str | None:
    """Why a peer cannot be measured; None if it can."""
    module, distribution = PEERS[name]
    return None if importlib.util.find_spec(module) else f"{distribution} is not installed here"


def versions() -> str:
    """Of those that are here."""
    found = [f"{d} {importlib.metadata.version(d)}" for m, d in PEERS.values() if importlib.util.find_spec(m)]
    missing = [f"{d} MISSING" for m, d in PEERS.values() if not importlib.util.find_spec(m)]
    return ", ".join([f"torch {torch.__version__}", *found, *missing])


def arm(laps: Laps, *, kind: str, job: str, epochs: int, directory: str, batch_size: int | None = None) -> None:
    """A peer's loop, for a worker; as `jobs.arm`."""
    warnings.simplefilter("ignore")
    laps.plan(epochs=epochs, warmup=2)
    LOOPS[kind](job_of(job, batch_size), directory, epochs=FOREVER, laps=laps)


def ignite(job: Job, directory: str, *, epochs: int, laps: Callable[[], object]) -> nn.Module:
    """Its supervised trainer."""
    from ignite.engine import Events, create_supervised_trainer

    model = job.model()
    engine = create_supervised_trainer(model, adam(model), LOSS)
    engine.add_event_handler(Events.EPOCH_STARTED, laps)
    engine.run(loader_of(job), max_epochs=epochs)
    return model


def accelerate(job: Job, directory: str, *, epochs: int, laps: Callable[[], object]) -> nn.Module:
    """A loop over what `prepare` gave."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    bare = job.model()
    model, optimizer, loader = accelerator.prepare(bare, adam(bare), loader_of(job))
    for _ in range(epochs):
        laps()
        for inputs, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(LOSS(model(inputs), labels))
            optimizer.step()
    return bare


class WithLoss(nn.Module):
    """A model as the HF Trainer wants it: it computes its loss itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss, by its name."""
        return {"loss": LOSS(self.model(inputs), labels)}


class Samples(torch.utils.data.Dataset[Any]):
    """The job's data sample by sample, as the HF Trainer's collator wants them."""

    def __init__(self, job: Job) -> None:
        self._features, self._labels = job.data()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self._features[index], "labels": self._labels[index]}


def hf_trainer(job: Job, directory: str, *, epochs: int, laps: Callable[[], object]) -> nn.Module:
    """The Trainer of transformers."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Begin(TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            laps()

    model = WithLoss(job.model())
    optimizer = adam(model)
    arguments = TrainingArguments(
        output_dir=directory,
        per_device_train_batch_size=job.batch_size,
        num_train_epochs=epochs,
        max_grad_norm=0,  # the others do not clip
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    Trainer(
        model=model,
        args=arguments,
        train_dataset=Samples(job),
        optimizers=(optimizer, constant),
        callbacks=[Begin()],
    ).train()
    return model.model


def lightning(job: Job, directory: str, *, epochs: int, laps: Callable[[], object]) -> nn.Module:
    """A LightningModule and its Trainer."""
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            inputs, labels = batch
            loss: torch.Tensor = LOSS(self.model(inputs), labels)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self.model)

        def on_train_epoch_start(self) -> None:
            laps()

    module = Module()
    pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
    ).fit(module, loader_of(job))
    return module.model


LOOPS = {"Ignite": ignite, "Accelerate": accelerate, "HF Trainer": hf_trainer, "Lightning": lightning}
