"""What a run's numbers depend on, through one launch: compared with the snapshot, and written into the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resumable_trainer.errors import DriftError
from resumable_trainer.loop import identity, screen
from resumable_trainer.loop.scalars import json_values
from resumable_trainer.state.parts import scalar_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from resumable_trainer.data.sources import Source
    from resumable_trainer.loop.settings import RunSettings
    from resumable_trainer.snapshot.manifest import Manifest


class Dependence:
    """Facts of today, and those of the snapshot that the run continues from.

    Args:
        settings: Of the run; the parts are as the script has built them, before anything is restored.
        say: Shows lines to a person.
        says_how_it_steps: Whether the loop tells by itself how it steps ("steps"), when it knows.

    Attributes:
        facts: By name, as far as they are known.
        part_settings: Plain settings that the parts were built with (learning rates, patience), by name of the part.
    """

    def __init__(
        self, settings: RunSettings, *, say: Callable[[Sequence[str]], None], says_how_it_steps: bool = False
    ) -> None:
        self._directory, self._strict, self._say = settings.directory, settings.strict, say
        self._says_how_it_steps = says_how_it_steps
        self._saved: Mapping[str, Any] = {}
        self.facts = identity.current_facts(settings.command, seed=settings.seed, state=settings.state)
        found = {name: json_values(scalar_settings(part)) for name, part in settings.state.items()}
        self.part_settings = {name: plain for name, plain in found.items() if plain}

    def changed_since(self, manifest: Manifest) -> list[str]:
        """What has changed since a snapshot, a line each.

        Raises:
            DriftError: Something has, and the run is strict.
        """
        self._saved = {**identity.EAGER, **manifest.depends_on}
        facts = self.facts if self._says_how_it_steps else identity.EAGER | self.facts
        drift = identity.drift(self._saved, facts)
        drift += identity.settings_drift(manifest.settings, self.part_settings)
        self._refuse(drift)
        return drift

    def on(self, name: str, value: object) -> None:
        """Record a fact; what it was in the snapshot is compared once per launch.

        Raises:
            DriftError: It has changed since the snapshot, and the run is strict.
        """
        first = name not in self.facts
        self.facts[name] = value
        if first and name in self._saved:
            drift = identity.drift({name: self._saved[name]}, self.facts)
            self._refuse(drift)
            self._say(screen.drift(drift))

    def on_data(self, number: int, source: Source) -> None:
        """Record the data of the epoch's loop `number` over batches; once per launch."""
        name = "data" if number == 0 else f"data {number + 1}"
        if name in self.facts:
            return
        self._say([f"data    {source.describe()}"])
        self.on(name, source.fingerprint())

    def remembered(self, name: str) -> Any:
        """A fact as the snapshot has it; None if it has none, or if the data are others now."""
        data = [fact for fact in self._saved if fact == "data" or fact.startswith("data ")]
        same = all(self.facts.get(fact, self._saved[fact]) == self._saved[fact] for fact in data)
        return self._saved.get(name) if same else None

    def for_manifest(self) -> dict[str, Any]:
        """The facts as a snapshot of now is to have them."""
        if not self._says_how_it_steps:
            return self.facts
        # Of a launch that has not trained a batch yet, nothing else is known than how the run stepped before.
        return {name: self._saved[name] for name in identity.OF_STEPS if name in self._saved} | self.facts

    def _refuse(self, lines: list[str]) -> None:
        if lines and self._strict:
            raise DriftError(
                f"run {self._directory} depends on things that have changed since its snapshot:\n  "
                + "\n  ".join(lines)
                + "\n",
                path=self._directory,
                found=lines,
                hint="put them back, or start without --strict",
            )
