"""Curves of a history as a picture, with matplotlib, which is imported only here.

One panel per metric: `loss`, `train_loss` and `test_loss` share one. Per epoch: train against
test, the best test value marked; where a metric has step values, they lie behind as a thin line.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumable_trainer.errors import UsageError

if TYPE_CHECKING:
    from resumable_trainer.metrics.history import History

_PREFIXES = ("train_", "test_", "val_", "valid_", "validation_", "eval_")
_MAX_STEP_POINTS = 4000


def draw(history: History, path: str | Path, *, title: str | None = None) -> Path:
    """Draw all metrics over epochs into `path`; the suffix decides the format.

    Raises:
        UsageError: matplotlib is not installed, or the format is not one it can write.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "plotting needs matplotlib, which is not installed", hint="pip install 'resumable-trainer[plot]'"
        ) from error
    target = Path(path)
    panels = _panels(history)
    figure = Figure(figsize=(8, 1 + 3 * max(1, len(panels))), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (quantity, names) in zip(
        figure.subplots(max(1, len(panels)), squeeze=False)[:, 0], panels.items(), strict=False
    ):
        _panel(axes, history, quantity, names)
    figure.suptitle(title or "training")
    _save(figure, target)
    return target


def _save(figure: Any, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target)
    except ValueError as error:
        raise UsageError(f"cannot plot to {target}: {error}", path=target) from error


def _panels(history: History) -> dict[str, list[str]]:
    """Epoch metrics grouped by the quantity that they measure."""
    panels: dict[str, list[str]] = {}
    for name in history.names("epoch") or history.names("step"):
        panels.setdefault(_quantity(name), []).append(name)
    return panels


def _quantity(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _panel(axes: Any, history: History, quantity: str, names: list[str]) -> None:
    step_names = set(history.names("step"))
    for name in names:
        label = name if name != quantity or len(names) == 1 else f"train {name}"
        if name in step_names:
            _draw_steps(axes, history, name)
        if name in history.names("epoch"):
            _draw_epochs(axes, history, name, label)
    axes.set_xlabel("epoch")
    axes.set_ylabel(quantity)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="best")


def _draw_steps(axes: Any, history: History, name: str) -> None:
    """Step values as a thin line, placed within their epochs; thinned to what a picture can show."""
    rows = [r for r in history.to_records() if r["row"] == "step" and name in r]
    batches = 1 + max(r["batch"] for r in rows)
    points = [(r["epoch"] + (r["batch"] + 1) / batches, r[name]) for r in rows]
    stride = math.ceil(len(points) / _MAX_STEP_POINTS)
    xs, ys = zip(*points[::stride], strict=True)
    axes.plot(xs, ys, linewidth=0.6, alpha=0.25, color="C0", label=f"{name} per batch")


def _draw_epochs(axes: Any, history: History, name: str, label: str) -> None:
    rows = [r for r in history.to_records() if r["row"] == "epoch" and name in r]
    xs = [r["epoch"] + 1 for r in rows]
    ys = [r[name] for r in rows]
    line = axes.plot(xs, ys, marker=".", label=label)[0]
    finite = [(y, x) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    if name.startswith(_PREFIXES[1:]) and finite:
        pick = min if "loss" in name or "error" in name else max
        value, epoch = pick(finite, key=lambda point: point[0])
        text = f"best {name} {value:.4g}"
        axes.plot([epoch], [value], marker="*", markersize=12, color=line.get_color(), label=text)
