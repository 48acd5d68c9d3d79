"""Where a job is killed: nasty places, chosen from what an undisturbed run of it has shown. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumable_trainer.proof.trial import Kill

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resumable_trainer.proof.trace import Moment, Trace

_TERM, _KILL = "SIGTERM", "SIGKILL"


def kills(undisturbed: Trace) -> list[Kill]:
    """In the order in which a run meets them; each is survived before the next one comes.

    Within an epoch (where the last step is in a snapshot, and where it is not), between the last optimizer step
    and the evaluation, in the evaluation (a kill, and a notice), between evaluation and the epoch's end, at the
    start of an epoch.
    """
    moments = undisturbed.moments
    chosen: list[Kill | None] = []
    epochs = sorted({moment.key[1] for moment in moments if moment.key[0] != "epoch"})
    for number, epoch in enumerate(epochs):
        here = [moment for moment in moments if moment.key[1] == epoch and moment.key[0] != "epoch"]
        chosen += _within(here, number, is_only=len(epochs) == 1)
    order = {moment.key: place for place, moment in enumerate(moments)}
    found = {kill.key: kill for kill in chosen if kill is not None}
    return sorted(found.values(), key=lambda kill: order[kill.key])


def _within(moments: Sequence[Moment], number: int, *, is_only: bool) -> list[Kill | None]:
    """Kills of one epoch: each epoch has others."""
    batches = [moment for moment in moments if moment.key[0] == "batch"]
    kinds: list[Callable[[], Kill | None]] = [
        lambda: _at(batches[3:4] or batches[-1:], _KILL, "within epoch"),
        lambda: _of(moments, "batches", _KILL, "between the last optimizer step and the evaluation of epoch"),
        lambda: _at(_evaluation(moments)[1:2], _KILL, "in the evaluation of epoch"),
    ]
    if number == 1:
        kinds = [
            lambda: _at(batches[:1], _KILL, "at the start of epoch"),
            lambda: _at(_evaluation(moments)[:1], _TERM, "in the evaluation of epoch"),
            lambda: _of(moments, "logged", _KILL, "between the evaluation and the end of epoch"),
        ]
    elif number >= 2:
        kinds = [lambda: _at(batches[2:3] or batches[-1:], _TERM, "within epoch")] if number == 2 else []
    if is_only:
        kinds.append(lambda: _at(batches[len(batches) // 2 :][:1], _TERM, "within epoch"))
        kinds.append(lambda: _at(batches[-1:], _KILL, "before the last batch of epoch"))
    return [choose() for choose in kinds]


def _evaluation(moments: Sequence[Moment]) -> list[Moment]:
    return [moment for moment in moments if moment.key[0] == "evaluating"]


def _of(moments: Sequence[Moment], place: str, signal: str, words: str) -> Kill | None:
    return _at([moment for moment in moments if moment.key[0] == place][-1:], signal, words)


def _at(moments: Sequence[Moment], signal: str, words: str) -> Kill | None:
    if not moments:
        return None
    place, epoch, batch, number = moments[0].key
    what = "killed" if signal == _KILL else "told to leave (SIGTERM)"
    return Kill(place, epoch, batch, number, signal, f"{what} {words} {epoch + 1}")  # type: ignore[arg-type] # a place
