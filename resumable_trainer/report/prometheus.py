"""The overview of runs as a text file for Prometheus' node_exporter, by prometheus-client, which is imported only here.

The file is replaced in one step: the collector never reads half of one.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from resumable_trainer.errors import UsageError
from resumable_trainer.metrics.goodput import seconds_of

if TYPE_CHECKING:
    from pathlib import Path

    from resumable_trainer.report.overview import Line

STATES = ("running", "interrupted", "finished", "stopped_early", "failed", "unreadable")


def write(lines: list[Line], path: Path) -> None:
    """Write the metrics of all runs.

    Raises:
        UsageError: prometheus-client is not installed, or the collector would not read a file of that name.
    """
    try:
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
    except ImportError as error:
        raise UsageError(
            "--prometheus needs prometheus-client, which is not installed",
            hint="pip install 'resumable-trainer[metrics]'",
        ) from error
    if path.suffix != ".prom":
        raise UsageError(f"{path} would not be read by node_exporter: its name must end in .prom", path=path)
    registry = CollectorRegistry()

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"resumable_trainer_{name}", text, ["run", *labels], registry=registry)

    step, epoch = gauge("step", "Steps in the newest snapshot"), gauge("epoch", "Epochs in the newest snapshot")
    best, saved = gauge("best", "Best value", "metric"), gauge("snapshot_age_seconds", "Age of the newest snapshot")
    state = gauge("state", "1 for the state that the run is in", "state")
    launches, interruptions = gauge("launches", "Launches"), gauge("interruptions", "Interruptions", "kind")
    share, seconds = gauge("goodput_ratio", "Share of time that counts"), gauge("seconds", "Wall time", "kind")
    now = datetime.datetime.now(datetime.UTC).timestamp()
    for line in lines:
        run = str(line.directory).encode(errors="backslashreplace").decode()
        for name in STATES:
            state.labels(run, name).set(line.state == name)
        if line.newest is not None:
            step.labels(run).set(line.newest.position.step)
            epoch.labels(run).set(line.newest.position.epoch)
            saved.labels(run).set(max(0.0, now - (seconds_of(line.newest.created) or now)))
            if line.newest.best is not None:
                best.labels(run, line.newest.best.metric).set(line.newest.best.value)
        if line.goodput is not None:
            launches.labels(run).set(line.goodput.launches)
            if line.goodput.share is not None:
                share.labels(run).set(line.goodput.share)
            for kind, count in line.goodput.interruptions.items():
                interruptions.labels(run, kind).set(count)
            for kind, value in line.goodput.seconds.items():
                seconds.labels(run, kind).set(value)
    write_to_textfile(str(path), registry)
