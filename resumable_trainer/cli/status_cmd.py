"""`status`: where a run stands, and who runs it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from resumable_trainer.cli.output import run_directory
from resumable_trainer.metrics import goodput
from resumable_trainer.report.divergences import in_words
from resumable_trainer.report.summary import RunSummary, origin_text, summarize

if TYPE_CHECKING:
    import argparse

_MOST = 5  # divergences shown to people; --json has all


def run(args: argparse.Namespace) -> int:
    """Print the state of a run."""
    summary = summarize(run_directory(args))
    print(json.dumps(summary.to_json(), indent=2) if args.json else "\n".join(_lines(summary)))
    return 0


def _lines(summary: RunSummary) -> list[str]:
    lines = [f"run     {summary.directory}", f"state   {summary.state.replace('_', ' ')}"]
    origin = origin_text(summary.origin)
    if origin is not None:
        lines.append(f"origin  {origin}")
    newest = summary.newest
    if newest is None:
        lines.append("saved   no valid snapshot yet")
    else:
        when = newest.created[:19].replace("T", " ")
        lines.append(f"saved   {newest.name} ({newest.place}, step {newest.position.step}) at {when} UTC")
        if newest.best is not None:
            best = newest.best
            lines.append(f"best    {best.metric} {best.value:.4f} @ epoch {best.epoch + 1} (step {best.step})")
    lines += [f"diverged {in_words(divergence)}" for divergence in summary.divergences[-_MOST:]]
    if summary.holder is not None:
        lines.append(f"holder  {summary.holder}")
    if summary.goodput.launches:
        lines.append(f"goodput {goodput.in_words(summary.goodput)}")
    if summary.event is not None:
        when = str(summary.event.get("time", ""))[:19].replace("T", " ")
        lines.append(f"event   {summary.event.get('event')} at {when} UTC")
        if summary.state == "failed" and "error" in summary.event:
            lines.append(f"error   {summary.event['error']}")
    return lines
