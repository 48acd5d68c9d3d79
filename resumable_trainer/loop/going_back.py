"""Going back: a run that has diverged takes up the last good snapshot, and leaves the blamed batches out; or stops.

What counts as diverged, and which batches are blamed, is in `loop/divergence.py`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, NoReturn

from resumable_trainer.errors import DamagedSnapshotError, DivergedError, SnapshotGoneError
from resumable_trainer.loop import screen
from resumable_trainer.loop.divergence import stretches
from resumable_trainer.state.parts import has_finite_parameters

if TYPE_CHECKING:
    from resumable_trainer.loop.divergence import Divergence, Row
    from resumable_trainer.loop.keeper import Keeper


def go_back(keeper: Keeper, *, may_go_back: bool) -> str:
    """Restore the last good snapshot, and decide which batches are left out; a line for a person.

    The parts are good again on return, so that the rest of the epoch's body (an evaluation, say) runs on a model of
    finite numbers. What it does counts for nothing: the epoch begins again when it has ended.

    Args:
        keeper: The run's state; its record has found the divergence.
        may_go_back: Whether the loops can.

    Raises:
        DivergedError: The run may not go back, or cannot.
    """
    watch, settings = keeper.record.watch, keeper.settings.on_divergence
    assert watch.found is not None
    assert settings is not None
    keeper.saver.settle()
    if not keeper.settings.may_go_back or not may_go_back or watch.num_rollbacks >= settings.max_rollbacks:
        _stop(keeper, watch.found)
    found, watch = watch.found, replace(watch)
    number = watch.num_blamed(found)
    restored = _restore_last_good(keeper, found, number)
    if restored is None:
        _stop(keeper, found, "; no snapshot from before it is good")
    batches, back_to = restored
    watch.rolled_back(found, skips := stretches(batches), number)
    keeper.record.watch.keep_decisions_of(watch)
    keeper.manager.note(
        "diverged", **asdict(found), action="rollback", back_to=back_to, skip=[list(skip) for skip in skips]
    )
    return screen.rolled_back(found, back_to, skips, watch.num_rollbacks, settings)


def _restore_last_good(keeper: Keeper, found: Divergence, number: int) -> tuple[list[Row], str] | None:
    """Restore the newest snapshot from before the blamed batches whose parameters are all finite.

    One whose parameters are not finite was taken after the batch that spoilt them: then the batches before it are
    blamed, and the ones that only showed it are innocent. None if there is no such snapshot.
    """
    manager, record = keeper.manager, keeper.record
    batches = record.last_steps(until=found.step, number=number)
    for name in reversed(manager.store.names()):
        try:
            at = manager.store.manifest(name).position
        except (DamagedSnapshotError, SnapshotGoneError):
            continue
        if not batches or (at.epoch, at.batch) > batches[0][1:]:
            continue
        try:
            applied = manager.apply(manager.find(name))
        except DamagedSnapshotError as error:
            manager.quarantine(name, error.message)
            continue
        if has_finite_parameters(keeper.settings.state):
            keeper.continue_from(applied, reason=f"the run has diverged, going back to {name}")
            return batches, name
        batches = record.last_steps(until=at.step - 1, number=number)
    return None


def _stop(keeper: Keeper, found: Divergence, why: str = "") -> NoReturn:
    watch, settings, latest = keeper.record.watch, keeper.settings.on_divergence, keeper.manager.latest
    assert settings is not None
    if keeper.settings.may_go_back and watch.num_rollbacks >= settings.max_rollbacks:
        why += f"; it has gone back {watch.num_rollbacks} times already (max_rollbacks)"
    keeper.manager.note("diverged", **asdict(found), action="stop", back_to=latest, skip=[])
    kept = f"the state of before is kept as {latest}" if latest else "there is no snapshot of before"
    raise DivergedError(
        f"run {keeper.settings.directory} has diverged: {found}{why}; {kept}",
        path=keeper.settings.directory,
        step=found.step,
        found=found.value,
        expected="a finite value" if found.median is None else f"at most {settings.spike} x {found.median:.4g}",
        hint="look at that batch and the ones before it, lower the learning rate or clip gradients; or let it go"
        " back and leave them out: on_divergence='rollback'",
    )
