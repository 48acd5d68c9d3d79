"""A snapshot put back into the parts, and the global generators last.

Policy: all parts are compared with what was saved before the first is touched. What can be filled (see
`state.filling`) is read straight into live memory, and checked while it is read; every other part takes its state
with its own `load_state_dict`, and is compared afterwards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from resumable_trainer.errors import DamagedSnapshotError, StateMismatchError
from resumable_trainer.garbage import WithoutCollections
from resumable_trainer.manager.held import usable
from resumable_trainer.snapshot.opened import OpenSnapshot
from resumable_trainer.snapshot.tree import BAD_VALUES
from resumable_trainer.state import filling, generators, modes
from resumable_trainer.state.parts import RESERVED_NAMES, mismatches, restore_part, unfaithful

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from resumable_trainer.manager.held import HeldRun
    from resumable_trainer.manager.line import RestoreReport


class Applying:
    """Puts snapshots into the parts.

    Args:
        run: The run, held.
        state: Parts by name.

    Attributes:
        is_half_done: Whether it has failed while it wrote into the parts, and has not succeeded since.
    """

    def __init__(self, run: HeldRun, state: Mapping[str, object]) -> None:
        self.is_half_done = False
        self._run = run
        self._state = state

    def apply(self, found: RestoreReport, *, strictly: bool, watch: modes.StepWatch | None) -> RestoreReport:
        """Put the chosen snapshot into the parts.

        Args:
            found: What was chosen.
            strictly: Compare all parts first, and each afterwards with what was put in.
            watch: Is told whose gradients an optimizer step had used.

        Returns:
            The report with the other sections that were saved, and notes for a person.
        """
        assert found.manifest is not None
        path = self._run.store.path(found.manifest.name)
        with (
            WithoutCollections(),
            OpenSnapshot(path, found.manifest, is_verified=found.is_verified) as snapshot,
        ):
            with usable(self._run.directory):
                fillings, sections = self._read(snapshot, found.manifest.name, strictly=strictly)
            own = {part: sections.pop(part) for part in list(sections) if part in self._state}
            notes = self._restore_parts(snapshot, fillings, own, strictly=strictly)
        try:
            notes += self._restore_others(sections, watch)
        except BAD_VALUES as error:
            raise DamagedSnapshotError(
                f"snapshot {found.manifest.name} in {self._run.directory} holds generators, gradients or modes that"
                f" this version does not write: {error}",
                path=path,
            ) from error
        self.is_half_done = False
        return replace(
            found,
            sections=sections,
            is_verified=True,
            absent=tuple(name for name in ("generators", "gradients", "modes") if name not in sections),
            notes=tuple(notes),
        )

    def _read(
        self, snapshot: OpenSnapshot, name: str, *, strictly: bool
    ) -> tuple[dict[str, filling.Filling], dict[str, Any]]:
        """Which parts are to be filled, and all else that was saved; nothing is touched.

        Raises:
            StateMismatchError: The parts are compared, and do not fit.
        """
        parts = [part for part in self._state if part in snapshot.names]
        outlined = [part for part in parts if filling.can_plan(self._state[part])]
        trees = snapshot.outlines(outlined, filling.Stored)
        plans = {part: filling.plan(part, self._state[part], tree) for part, tree in trees.items()}
        fitting = {part: plan for part, plan in plans.items() if plan is not None}
        if strictly:
            self._check_fit(snapshot, name, {part: trees.get(part) for part in parts}, fitting=fitting)
        fillings = filling.without_overlaps(
            {part: plan for part, plan in fitting.items() if snapshot.fills(part, plan.targets)}
        )
        snapshot.check(but=fillings)
        sections, shared = snapshot.sections(but=fillings)
        if any(fillings[part].keeps_targets for part in shared):  # two parts are to hold the very same tensor again
            fillings = {}
            snapshot.check()
            sections, _ = snapshot.sections()
        return fillings, sections

    def _restore_parts(
        self,
        snapshot: OpenSnapshot,
        fillings: Mapping[str, filling.Filling],
        own: Mapping[str, Any],
        *,
        strictly: bool,
    ) -> list[str]:
        """Put the saved state into each part in turn; notes for a person."""
        notes = []
        for name, part in self._state.items():
            if name in fillings:
                self.is_half_done = True
                with usable(self._run.directory):
                    snapshot.fill(name, fillings[name].targets)
                self.is_half_done = False
                wrong = fillings[name].filled()
            else:
                restore_part(name, part, own[name])
                wrong = unfaithful(name, part, own[name]) if strictly else []
            if wrong and strictly:
                notes.append(
                    f"part {name!r} does not give back what was put in, so it may not resume exactly: {wrong[0]}"
                )
        return notes

    def _restore_others(self, sections: Mapping[str, Any], watch: modes.StepWatch | None) -> list[str]:
        """Put back what is saved beside the parts; notes for a person."""
        if "modes" in sections:
            modes.restore_modes(self._state, sections["modes"])
        used = modes.restore_gradients(self._state, sections["gradients"]) if "gradients" in sections else set()
        if watch is not None:
            watch.resume(used)
        # Invariant: generators come last, so that nothing above can draw from what was restored.
        return generators.restore_global(sections["generators"]) if "generators" in sections else []

    def _check_fit(
        self,
        snapshot: OpenSnapshot,
        name: str,
        saved: Mapping[str, object],
        *,
        fitting: Collection[str],
    ) -> None:
        """Every mismatch in one error, before anything is touched; `fitting` are parts that are known to fit."""
        unknown = [other for other in snapshot.names if other not in self._state and other not in RESERVED_NAMES]
        lines = [f"part {part!r} is not in the snapshot" for part in self._state if part not in saved]
        lines += [f"part {other!r} is in the snapshot, the script hands over none" for other in unknown]
        for part in self._state:
            if part in saved and part not in fitting:
                lines += mismatches(part, self._state[part], saved[part])
        if lines:
            snapshot.check()  # what is damaged may be taken for what does not fit
            raise StateMismatchError(
                f"snapshot {name} in {self._run.directory} does not fit the script:\n  " + "\n  ".join(lines) + "\n",
                path=self._run.directory,
                found=lines,
                hint="restore the script's old model, or start a new line with: resumable-trainer run --fresh ...",
            )
