"""The textbook loop, made resumable: the lines that make it so end in `# <--`.

Kill it at any instant, start the same command again, and it continues.
"""

import tabular
import torch
from torch import nn

from resumable_trainer import EarlyStopping, Run  # <--


def accuracy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Share of right answers."""
    return ((outputs > 0.5) == (labels > 0.5)).float().mean()


def main() -> None:
    """Train until early stopping or the last epoch, then plot."""
    args = tabular.arguments(__doc__)
    train, (test_inputs, test_labels) = tabular.load(args)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(train[0].shape[1], 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid()
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    loss_fn = nn.BCELoss()

    early_stopping = EarlyStopping("test_accuracy", patience=args.patience)
    with Run(args.run_dir, state={"model": model, "optimizer": optimizer}, early_stopping=early_stopping) as run:  # <--
        for _epoch in run.epochs(args.epochs):  # <-- was: for epoch in range(args.epochs):
            model.train()
            for inputs, labels in run.batches(train, batch_size=10, shuffle=True):  # <-- was: in loader:
                optimizer.zero_grad()
                outputs = model(inputs)
                loss = loss_fn(outputs, labels)
                loss.backward()
                optimizer.step()
                run.log(loss=loss, accuracy=accuracy(outputs, labels))  # <-- was: print(...)

            model.eval()
            with torch.no_grad():
                outputs = model(test_inputs)
            run.log_epoch(test_loss=loss_fn(outputs, test_labels), test_accuracy=accuracy(outputs, test_labels))

        plot = run.history.plot(run.directory / "history.png", title="own loop")
        print(f"plot    {plot}")


if __name__ == "__main__":
    main()
