"""A training as a user writes it, to be killed and started again: `script.py KIND DIRECTORY EPOCHS`.

The kinds are the same job, with a checkpoint each epoch, in the loops of different projects. Tells on the file
descriptor in BENCH_TELL, if there is one: "ready" before the first step, "first" after it, "epoch" as each begins, a
digest of the parameters at the end; each with the clock that all processes share.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.jobs import CLASSIC, LOSS, adam, hand_written, loader_of, step

if TYPE_CHECKING:
    from torch import nn

_TELL = int(os.environ.get("BENCH_TELL", "-1"))


def tell(word: str) -> None:
    """Say what has happened, and when."""
    if _TELL >= 0:
        os.write(_TELL, f"{word} {time.perf_counter()}\n".encode())


class First:
    """Tells of the first step of this process."""

    def __init__(self) -> None:
        self._done = False

    def __call__(self) -> None:
        """A step is done."""
        if not self._done:
            self._done = True
            tell("first")


def imports(directory: str, epochs: int) -> nn.Module:
    """What the script imports, torch above all, and nothing else."""
    tell("first")
    return CLASSIC.model()


def bare(directory: str, epochs: int) -> nn.Module:
    """Imports and set-up, one step; nothing is resumed."""
    model, (features, labels) = CLASSIC.model(), CLASSIC.data()
    optimizer = adam(model)
    tell("ready")
    step(model, optimizer, features[:10], labels[:10])
    tell("first")
    return hand_written(CLASSIC, epochs=0)


def own(directory: str, epochs: int) -> nn.Module:
    """The package's loop."""
    from resumable_trainer import Run

    torch.manual_seed(0)
    model, data, first = CLASSIC.model(), CLASSIC.data(), First()
    optimizer = adam(model)
    with Run(directory, state={"model": model, "optimizer": optimizer}, progress=False) as run:
        for _ in run.epochs(epochs):
            tell("epoch")
            for inputs, labels in run.batches(data, batch_size=CLASSIC.batch_size, shuffle=True):
                run.log(loss=step(model, optimizer, inputs, labels))
                first()
    return model


def lightning(directory: str, epochs: int) -> nn.Module:
    """Its Trainer, with its checkpoints."""
    import lightning as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self._first = CLASSIC.model(), First()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            inputs, labels = batch
            loss: torch.Tensor = LOSS(self.model(inputs), labels)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self.model)

        def on_train_batch_end(self, *args: Any) -> None:
            self._first()

        def on_train_epoch_start(self) -> None:
            tell("epoch")

    pl.seed_everything(0, verbose=False)
    last = Path(directory) / "last.ckpt"
    module = Module()
    pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[ModelCheckpoint(directory, save_last=True, every_n_epochs=1, save_on_train_epoch_end=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
    ).fit(module, loader_of(CLASSIC), ckpt_path=str(last) if last.exists() else None)
    return module.model


def hf_trainer(directory: str, epochs: int) -> nn.Module:
    """The Trainer of transformers, with its checkpoints."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from benchmarks.peers import Samples, WithLoss

    first = First()

    class Tell(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            first()

        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            tell("epoch")

    model = WithLoss(CLASSIC.model())
    optimizer = adam(model)
    arguments = TrainingArguments(
        output_dir=directory,
        per_device_train_batch_size=CLASSIC.batch_size,
        num_train_epochs=epochs,
        max_grad_norm=0,
        logging_strategy="no",
        save_strategy="epoch",
        save_total_limit=3,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        seed=0,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    Trainer(
        model=model,
        args=arguments,
        train_dataset=Samples(CLASSIC),
        optimizers=(optimizer, constant),
        callbacks=[Tell()],
    ).train(resume_from_checkpoint=get_last_checkpoint(directory))
    return model.model


KINDS = {"imports": imports, "bare": bare, "own": own, "Lightning": lightning, "HF Trainer": hf_trainer}


def main() -> None:
    """Train, and tell what came of it."""
    warnings.simplefilter("ignore")
    kind, directory, epochs = sys.argv[1:]
    torch.set_num_threads(1)
    Path(directory).mkdir(exist_ok=True)
    model = KINDS[kind](directory, int(epochs))
    values = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    tell(f"digest:{hashlib.sha256(values).hexdigest()}")


if __name__ == "__main__":
    main()
