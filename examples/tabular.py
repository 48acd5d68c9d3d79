"""Numeric tables with a label in the last column: read, checked, split into train and test.

Used by both examples. Every error names the file, the line and the column.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import torch

Tensors = tuple[torch.Tensor, torch.Tensor]


class TableError(ValueError):
    """The table cannot be trained on; the message says where and why."""


def arguments(description: str) -> argparse.Namespace:
    """Options that both examples share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, metavar="FILE.csv", help="numeric CSV, label last, header or none")
    parser.add_argument("--test-rows", type=int, metavar="N", help="rows at the end to test on (default: about 9 %%)")
    parser.add_argument("--epochs", type=int, default=100, help="total for the whole run (default: %(default)s)")
    parser.add_argument("--patience", type=int, default=30, help="epochs without a better test accuracy")
    parser.add_argument("--run-dir", help="where the run lives (default: runs/<name of the script>)")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Tensors, Tensors]:
    """(train, test), each (features [n, d] float32, labels [n, 1] float32 of 0 and 1)."""
    try:
        rows = read_csv(args.data) if args.data else bundled_rows()
        source = str(args.data or "the bundled data")
        return split(rows, args.test_rows, source)
    except (TableError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def bundled_rows() -> list[list[float]]:
    """Breast cancer Wisconsin (diagnostic), 569 rows of 30 features; real data, part of scikit-learn."""
    try:
        from sklearn.datasets import load_breast_cancer
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError:
        raise TableError(
            "the bundled data come with scikit-learn, which is not installed - "
            "pip install 'resumable-trainer[example]', or give a table of your own: --data FILE.csv"
        ) from None

    features, labels = load_breast_cancer(return_X_y=True)
    features = StandardScaler().fit_transform(features)
    return [[*row, label] for row, label in zip(features.tolist(), labels.tolist(), strict=True)]


def read_csv(path: Path) -> list[list[float]]:
    """Rows of finite numbers; a first line in which no cell is a number is a header."""
    rows: list[list[float]] = []
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        for cells in reader:
            line = reader.line_num
            if not cells or (not rows and line == 1 and not any(_is_number(cell) for cell in cells)):
                continue
            if rows and len(cells) != len(rows[0]):
                raise TableError(f"{path} line {line} has {len(cells)} columns, the lines before have {len(rows[0])}")
            rows.append([_number(cell, path, line, column) for column, cell in enumerate(cells, start=1)])
    if not rows:
        raise TableError(f"{path} line 1: the file holds no rows of numbers")
    if len(rows[0]) < 2:
        raise TableError(f"{path} line 1 has 1 column; features and a label need at least 2")
    return rows


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(cell: str, path: Path, line: int, column: int) -> float:
    if not _is_number(cell) or not math.isfinite(float(cell)):
        raise TableError(f"{path} line {line} column {column}: {cell!r} is not a finite number")
    return float(cell)


def split(rows: list[list[float]], test_rows: int | None, source: str) -> tuple[Tensors, Tensors]:
    """The first rows train, the last ones test; of the 768 Pima rows, 700 and 68."""
    count = len(rows)
    tests = max(1, count * 68 // 768) if test_rows is None else test_rows
    if not 0 < tests < count:
        raise TableError(
            f"{source}: {tests} test rows asked, there are {count} rows, of which one must be left to train"
        )
    label = len(rows[0])
    classes = sorted({row[-1] for row in rows})
    if len(classes) != 2:
        shown = ", ".join(f"{value:g}" for value in classes[:5])
        raise TableError(f"{source} column {label} (the label) has {len(classes)} classes ({shown}), needed are 2")
    if len({row[-1] for row in rows[:-tests]}) < 2:
        raise TableError(f"{source} lines 1 to {count - tests} (train) column {label}: one class only")
    table = torch.tensor(rows, dtype=torch.float32)
    features, labels = table[:, :-1].contiguous(), (table[:, -1:] == classes[1]).float()
    return (features[:-tests], labels[:-tests]), (features[-tests:], labels[-tests:])
