"""Notices of the end, beside signals: the metadata services of clouds, and Slurm's end time, watched.

Each source (`cloud_sources`) is asked by one thread, in its own rhythm; it begins when training does, and only where a
source was found (by the machine's vendor, or by what the environment says). A source that fails says so once and is
asked again; nothing that it answers can harm the run. What counts is what was said last: a notice may be followed by
one that leaves less time, and may be taken back. Free of torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.loop.cloud_sources import Asked as Asked
from resumable_trainer.loop.cloud_sources import Aws, Azure, Google, Slurm, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

VARIABLE = "RESUMABLE_TRAINER_NOTICES"
AZURE_VARIABLE = "RESUMABLE_TRAINER_AZURE_IMDS"
APPROVAL_VARIABLE = "RESUMABLE_TRAINER_AZURE_APPROVE"
_AFTER_FAILURE_SECONDS = 2.0
_LOOK_SECONDS = 0.5  # how often it is looked whether the time that is needed has grown
_NO_MORE_SECONDS = 10.0  # with so little to spare nothing is asked any more: it may take as long
_DMI = Path("/sys/class/dmi/id")


def found_here(
    environment: Mapping[str, str], *, dmi: Path = _DMI, say: Callable[[str], None] = lambda line: None
) -> list[Source]:
    """The sources of this machine: asked for by name, else by its vendor; nothing is asked yet.

    An end time of Slurm's that is past already is said and not followed: the environment is an older job's, or Slurm
    lets this one go on (OverTimeLimit), and each start would leave at once, for ever.

    Args:
        environment: Of this process.
        dmi: Where the machine's vendor is told.
        say: Shows a line to a person.
    """
    chosen = environment.get(VARIABLE)
    names = {name.strip().lower() for name in chosen.split(",")} if chosen is not None else _detected(environment, dmi)
    sources: list[Source] = []
    if "aws" in names and environment.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
        sources.append(Aws(environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"))
    if "google" in names:
        sources.append(Google(environment.get("GCE_METADATA_HOST") or "metadata.google.internal"))
    if "azure" in names:
        approves = environment.get(APPROVAL_VARIABLE) == "1"
        endpoint = environment.get(AZURE_VARIABLE) or "http://169.254.169.254"
        sources.append(Azure(endpoint, os.uname().nodename, approves=approves))
    if "slurm" in names and (end := environment.get("SLURM_JOB_END_TIME", "")).isdecimal():
        if float(end) > time.time():
            sources.append(Slurm(float(end)))
        else:
            say(f"warning Slurm's end time (SLURM_JOB_END_TIME={end}) is past already: it is not followed")
    return sources


def _detected(environment: Mapping[str, str], dmi: Path) -> set[str]:
    names = {"slurm"} if environment.get("SLURM_JOB_END_TIME") else set()
    vendor = _line(dmi / "sys_vendor")
    if vendor == "Amazon EC2" or environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        names.add("aws")
    if vendor == "Google" or environment.get("GCE_METADATA_HOST"):
        names.add("google")
    is_azure = vendor == "Microsoft Corporation" and _line(dmi / "chassis_asset_tag").startswith("7783-7084-3265-9085")
    if is_azure or environment.get(AZURE_VARIABLE):
        names.add("azure")
    return names


def _line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


class Watch:
    """Asks all sources, each in a thread of its own, until it is stopped.

    Args:
        sources: Whom to ask.
        tell: Told what is asked of the run.
        seconds_needed: How long before the end the run must begin to save; asked again and again.
        say: Shows a line to a person.
    """

    def __init__(
        self,
        sources: list[Source],
        *,
        tell: Callable[[Asked, float | None], None],
        seconds_needed: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self._tell, self._needed, self._say = tell, seconds_needed, say
        self._stopped = threading.Event()
        self._sources = sources
        for source in sources:
            threading.Thread(target=self._watch, args=(source,), name=f"notices of {source.name}", daemon=True).start()

    def stop(self) -> None:
        """Ask no more; an answer that is being waited for is waited for no longer."""
        self._stopped.set()
        for source in self._sources:
            source.call_off()

    def _watch(self, source: Source) -> None:
        due: _Due | None = None
        said: set[str] = set()
        while not self._stopped.is_set():
            pause = source.every_seconds
            try:
                asked = source.ask()
            except Exception as error:  # noqa: BLE001 - whatever a metadata service answers, the run goes on
                pause = max(pause, _AFTER_FAILURE_SECONDS)  # and what it has said before still holds
                line = f"warning notices of {source.name} cannot be had ({error}); it is asked again"
                self._say_once("a failure", line, said)
            else:
                due = self._take_up(asked, said)
            if self._wait(pause, due):
                return

    def _take_up(self, asked: Asked | None, said: set[str]) -> _Due | None:
        """A request to leave, and when it is to be followed; another is passed on at once."""
        if asked is None or self._stopped.is_set():
            return None
        if not asked.leave:
            self._tell(asked, None)
            return None
        left = asked.seconds_left if asked.seconds_left is not None and math.isfinite(asked.seconds_left) else None
        due = _Due(asked, None if left is None else time.monotonic() + left)
        if (spare := due.spare_seconds(self._needed())) > 1:
            line = f"notice  {asked.source} in {left:.0f} s; training goes on for {spare:.0f} s"
            self._say_once(asked.source, line, said)
        return due

    def _wait(self, seconds: float, due: _Due | None) -> bool:
        """Until it is to be asked again, True if no more: the run was told to leave, or nobody watches any more."""
        until = time.monotonic() + seconds
        while True:
            spare = math.inf if due is None else due.spare_seconds(self._needed())
            if due is not None and spare <= 0 and not self._stopped.is_set():
                self._tell(due.asked, due.deadline)
                return True
            rest = until - time.monotonic()
            if rest <= 0 and spare > _NO_MORE_SECONDS:
                return False
            if self._stopped.wait(min(spare, _LOOK_SECONDS) if due is not None else rest):
                return True

    def _say_once(self, what: str, line: str, said: set[str]) -> None:
        if what not in said and not self._stopped.is_set():
            said.add(what)
            with contextlib.suppress(OSError, ValueError):  # a screen that is gone must not lose the notice
                self._say(line)


@dataclass(frozen=True)
class _Due:
    """A request to leave that waits for its time; `deadline` by the monotonic clock."""

    asked: Asked
    deadline: float | None

    def spare_seconds(self, needed: float) -> float:
        return 0.0 if self.deadline is None else self.deadline - time.monotonic() - needed
