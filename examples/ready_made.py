"""The same job as own_loop.py with the ready-made loop; both end in the same bits.

Kill it at any instant, start the same command again, and it continues.
"""

import tabular
import torch
from torch import nn

from resumable_trainer import EarlyStopping, Trainer


def accuracy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Share of right answers."""
    return ((outputs > 0.5) == (labels > 0.5)).float().mean()


def main() -> None:
    """Train until early stopping or the last epoch, then plot."""
    args = tabular.arguments(__doc__)
    train, test = tabular.load(args)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(train[0].shape[1], 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid()
    )
    trainer = Trainer(
        model=model,
        loss_fn=nn.BCELoss(),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.001),
        train_data=train,
        test_data=test,
        batch_size=10,
        metrics={"accuracy": accuracy},
        run_dir=args.run_dir,
        early_stopping=EarlyStopping("test_accuracy", patience=args.patience),
    )
    history = trainer.fit(epochs=args.epochs)
    plot = history.plot(trainer.run.directory / "history.png", title="ready-made loop")
    print(f"plot    {plot}")


if __name__ == "__main__":
    main()
