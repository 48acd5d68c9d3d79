"""The lines that a person reads: banner, what was resumed, what remains, how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from resumable_trainer.errors import ExitCode
from resumable_trainer.loop.divergence import in_words
from resumable_trainer.loop.interval import FIRST_SECONDS
from resumable_trainer.metrics.goodput import duration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from resumable_trainer.loop.cursor import Cursor
    from resumable_trainer.loop.divergence import Divergence, OnDivergence
    from resumable_trainer.loop.interval import Interruptions
    from resumable_trainer.loop.record import Record
    from resumable_trainer.manager import RestoreReport, StateManager
    from resumable_trainer.metrics.early_stopping import BestValue, EarlyStopping


def banner(directory: Path, state: Mapping[str, object], facts: Mapping[str, Any]) -> list[str]:
    """Run, device, size and parts."""
    parameters = sum(
        parameter.numel()
        for part in state.values()
        if isinstance(part, torch.nn.Module)
        for parameter in part.parameters()
    )
    return [
        f"run     {directory} | {facts['device']} | {parameters:,} parameters | seed {facts['seed']}"
        f" | torch {facts['torch']}, {facts['threads']} threads",
        f"parts   {', '.join(state)}",
    ]


_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
_WAYS = ("fused", "foreach", "capturable", "differentiable")


def advice(state: Mapping[str, object]) -> list[str]:
    """What a fresh run could do faster: torch's fused optimizers, where nothing speaks against them."""
    names = [type(part).__name__ for part in state.values() if _could_be_fused(part)]
    if not names:
        return []
    return [
        f"advice  {names[0]}(..., fused=True) updates all parameters in one kernel, faster for small models;"
        " the last bits of numbers differ, so not within a run"
    ]


def _could_be_fused(part: object) -> bool:
    if type(part) not in _FUSED or not isinstance(part, torch.optim.Optimizer):
        return False
    if any(group.get(way) for group in part.param_groups for way in _WAYS):
        return False
    devices = ("cpu",) if type(part) is torch.optim.Adagrad else ("cpu", "cuda")
    return all(
        parameter.device.type in devices and parameter.is_floating_point()
        for group in part.param_groups
        for parameter in group["params"]
    )


def resumed(report: RestoreReport, record: Record) -> list[str]:
    """What was restored, and from where."""
    assert report.manifest is not None
    place = f"{report.manifest.place}, step {report.manifest.position.step}"
    lines = [f"resume  {report.snapshot} ({place}; verified), {best_text(record.best)}"]
    if report.set_aside:
        lines.append(f"aside   {len(report.set_aside)} newer snapshots were set aside: {', '.join(report.set_aside)}")
    return lines


def begins_anew(report: RestoreReport, seed: int) -> list[str]:
    """What the snapshot does not hold, because no `Run` wrote it."""
    words = {
        "generators": f"generators (seeded with {seed})",
        "gradients": "gradients",
        "modes": "training modes",
        "loop": "the loop's record (averages, best, early stopping)",
    }
    absent = [*report.absent, *([] if "loop" in report.sections else ["loop"])]
    return [f"resume  not in the snapshot, so it begins anew: {', '.join(words[n] for n in absent)}"] if absent else []


def swept(names: Sequence[str]) -> list[str]:
    """Unfinished snapshots of a process that died."""
    return (
        [f"swept   {len(names)} unfinished snapshot{'s' if len(names) > 1 else ''} of an earlier launch"]
        if names
        else []
    )


def quarantined(report: RestoreReport) -> list[str]:
    """One line for each damaged snapshot."""
    return [
        f"damaged {name}: {reason}; moved to quarantine, using {report.snapshot}"
        for name, reason in report.quarantined.items()
    ]


def drift(lines: Sequence[str]) -> list[str]:
    """One line per change."""
    return [f"drift   {line}" for line in lines]


def missing_schedulers(names: Sequence[str]) -> list[str]:
    """The classic silent loss: a scheduler that starts over at each resume."""
    return [
        f"warning a learning-rate scheduler drives {name!r} and is not among the parts: it will start over at each"
        ' resume; add it: state={..., "scheduler": scheduler}'
        for name in names
    ]


def remaining(cursor: Cursor, total: int, settings: EarlyStopping | None, record: Record) -> list[str]:
    """What is still to be done."""
    text = f"target  {total} epochs in total, {total - cursor.epoch} to go"
    if cursor.batch:
        text += f" (the first from batch {cursor.batch} on)"
    if settings is not None:
        text += f" | early stopping on {settings.metric}: patience {settings.patience}, {record.counters.wait} used"
    return [text]


def best_text(best: BestValue | None) -> str:
    """The best value, for a line."""
    if best is None:
        return "no best value yet"
    return f"best {best.metric} {best.value:.4f} @ epoch {best.epoch + 1}"


def best_and_latest(record: Record, manager: StateManager) -> str:
    """Best value and latest durable snapshot, for a bar."""
    parts = [] if record.best is None else [best_text(record.best)]
    if manager.latest is not None:
        parts.append(f"saved {manager.latest}")
    return " | ".join(parts)


def left(signal: str, where: str, snapshot: str | None, code: int) -> str:
    """The last line before leaving on a notice."""
    saved = f"saved as {snapshot}" if snapshot else "nothing was trained yet, nothing to save"
    return f"stopped by {signal} {where} | {saved} | exit {code}: start the same command again to continue"


def ending(directory: Path, outcome: str | None, cursor: Cursor, record: Record, latest: str | None) -> list[str]:
    """How the run ended, its best value, and where things are."""
    how = {"finished": "finished", "stopped_early": "stopped early", None: "left before its end"}[outcome]
    lines = [f"{how}: {cursor.epoch} epochs, {cursor.step} steps | {best_text(record.best)}"]
    if latest is not None:
        lines.append(f"latest  {directory / 'snapshots' / latest}")
    lines.append(f"metrics {directory / 'metrics.jsonl'}")
    return lines


def rolled_back(
    found: Divergence, back_to: str, skips: Sequence[tuple[int, int, int]], times: int, settings: OnDivergence
) -> str:
    """One line for a divergence that the run goes on from."""
    return (
        f"diverged {found}: back to {back_to}, leaving out {in_words(skips)}"
        f" (rollback {times} of at most {settings.max_rollbacks})"
    )


def left_while_going_back(latest: str | None) -> str:
    """The last line if a run that goes back is left by `break` before its epoch has begun again."""
    return (
        f"left while going back to {latest} | exit {int(ExitCode.PREEMPTED)}: start the same command again to continue"
    )


def not_finite(value: float, epoch: int) -> str:
    """One line, once, where nothing was asked to be done about it."""
    return (
        f"warning the mean loss of epoch {epoch + 1} is {value}; training goes on"
        " (on_divergence='stop' would leave, 'rollback' would go back)"
    )


def automatic(stall_seconds: float, seconds: float, known: Interruptions, max_overhead: float) -> str:
    """How often snapshots are taken, and why."""
    return (
        f"saves   each epoch, and every {duration(seconds)} within (auto): one takes {duration(stall_seconds)} of the"
        f" training, {known}, at most {max_overhead:.2%} of its time".replace(".00%", "%")
    )


def automatic_at_first(known: Interruptions) -> str:
    """The same before the first snapshot."""
    return f"saves   each epoch, and after {duration(FIRST_SECONDS)} within (auto), then as often as pays: {known}"


def status(cursor: Cursor, total: int | None, record: Record, latest: str | None, seconds_left: float | None) -> str:
    """One line for a service manager: where the run is, its best, what is durable, and the time to go."""
    parts = [f"epoch {cursor.epoch + 1}/{total}" if total else f"epoch {cursor.epoch + 1}", f"step {cursor.step}"]
    if record.best is not None:
        parts.append(best_text(record.best))
    parts.append(f"saved {latest}" if latest else "nothing saved yet")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} to go")
    return " | ".join(parts)


def late(seconds_left: float, seconds_needed: float, latest: str | None) -> str:
    """A snapshot may not be finished before the machine goes."""
    return (
        f"warning {max(0.0, seconds_left):.1f} s are left, and a snapshot usually takes {seconds_needed:.1f} s;"
        f" it is tried, and {latest or 'nothing'} is durable already"
    )
