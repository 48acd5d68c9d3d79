"""A Job for Kubernetes that is started again after preemptions, and not where starting again is no use.

Written as JSON, which is YAML: nothing in a name or path can be taken for something else.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resumable_trainer.errors import ExitCode, SettingsError
from resumable_trainer.service.budget import NO_USE
from resumable_trainer.service.texts import is_utf8

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What the Job says.

    Attributes:
        directory: The run directory, absolute; its parent is the volume's mount point.
        arguments: What the container runs, the interpreter first.
        image: The container's image.
        claim: The persistent volume claim that holds the runs.
        grace_seconds: How long a pod has to save when it is told to go; a spot node may give less.
        failures: How often it is started again after failures; preemptions do not count.
    """

    directory: Path
    arguments: tuple[str, ...]
    image: str
    claim: str
    cwd: str
    grace_seconds: int = 120
    failures: int = 20


def manifest(job: Job) -> str:
    """The Job.

    Raises:
        SettingsError: A path cannot stand in a Job.
    """
    mount = str(job.directory.parent)
    if ":" in mount:
        raise SettingsError(f"k8s: {mount!r} cannot be mounted, as it has a colon", path=job.directory)
    for text in (*job.arguments, job.cwd):
        if not is_utf8(text):
            raise SettingsError(f"k8s: {text!r} cannot stand in a Job: it is no UTF-8")
    name = re.sub(r"[^a-z0-9]+", "-", job.directory.name.lower()).strip("-")[:50].strip("-") or "run"
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [int(ExitCode.PREEMPTED)]}},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": list(map(int, NO_USE))}},
    ]
    container = {
        "name": "training",
        "image": job.image,
        # No shell: it would keep the signals for itself. "$(NAME)" means a variable, "$$" a dollar.
        "command": [text.replace("$", "$$") for text in job.arguments],
        "workingDir": job.cwd,
        "volumeMounts": [{"name": "runs", "mountPath": mount}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": job.claim}}],
    }
    spec = {"backoffLimit": job.failures, "podFailurePolicy": {"rules": rules}, "template": {"spec": pod}}
    fields = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}
    return json.dumps(fields, indent=2) + "\n"
