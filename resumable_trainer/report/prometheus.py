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

    from prometheus_client.core import GaugeMetricFamily

    from resumable_trainer.report.overview import Line

STATES = ("running", "interrupted", "finished", "stopped_early", "failed", "unreadable")


def write(lines: list[Line], path: Path) -> None:
    """Write the metrics of all runs.

    Raises:
        UsageError: prometheus-client is not installed, or the collector would not read a file of that name.
    """
    try:
        from prometheus_client import CollectorRegistry, write_to_textfile
        from prometheus_client.core import GaugeMetricFamily
    except ImportError as error:
        raise UsageError(
            "--prometheus needs prometheus-client, which is not installed",
            hint="pip install 'resumable-trainer[metrics]'",
        ) from error
    if path.suffix != ".prom":
        raise UsageError(f"{path} would not be read by node_exporter: its name must end in .prom", path=path)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Runs(lines, GaugeMetricFamily))
    write_to_textfile(str(path), registry)


class _Runs:
    """What a registry collects: families of finished numbers, which cost half of what live gauges do."""

    def __init__(self, lines: list[Line], family: type[GaugeMetricFamily]) -> None:
        self._lines, self._family = lines, family

    def collect(self) -> list[GaugeMetricFamily]:
        """The metrics of all runs."""

        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return self._family(f"resumable_trainer_{name}", text, labels=["run", *labels])

        step, epoch = gauge("step", "Steps in the newest snapshot"), gauge("epoch", "Epochs in the newest snapshot")
        best, saved = gauge("best", "Best value", "metric"), gauge("snapshot_age_seconds", "Age of the newest snapshot")
        state = gauge("state", "1 for the state that the run is in", "state")
        launches, interruptions = gauge("launches", "Launches"), gauge("interruptions", "Interruptions", "kind")
        share, seconds = gauge("goodput_ratio", "Share of time that counts"), gauge("seconds", "Wall time", "kind")
        now = datetime.datetime.now(datetime.UTC).timestamp()
        for line in self._lines:
            run = str(line.directory).encode(errors="backslashreplace").decode()
            for name in STATES:
                state.add_metric([run, name], line.state == name)
            if line.newest is not None:
                at, value = line.newest.position, line.newest.best
                step.add_metric([run], at.step)
                epoch.add_metric([run], at.epoch)
                saved.add_metric([run], max(0.0, now - (seconds_of(line.newest.created) or now)))
                if value is not None:
                    best.add_metric([run, value.metric], value.value)
            if line.goodput is not None:
                launches.add_metric([run], line.goodput.launches)
                if line.goodput.share is not None:
                    share.add_metric([run], line.goodput.share)
                for kind, count in line.goodput.interruptions.items():
                    interruptions.add_metric([run, kind], count)
                for kind, spent in line.goodput.seconds.items():
                    seconds.add_metric([run, kind], spent)
        return [step, epoch, best, saved, state, launches, interruptions, share, seconds]
