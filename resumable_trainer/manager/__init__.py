"""StateManager: the live state of a training, and its snapshots on disk.

Knows parts and snapshots, and nothing of loops: it serves `Run`, and people whose loop is somebody
else's. Holds the run's lock while open. `state/` and `snapshot/` meet in this room, and nowhere else:

    held           the run directory as this process holds it: lock, events, store
    facts          what a manifest says beside the state
    capturing      live parts to a copy in memory that later training cannot change
    saving         such a copy to a durable snapshot, beside the training, one at a time
    line           the snapshots that a run goes on from: chosen, quarantined, set aside
    applying       a snapshot back into the parts
    state_manager  StateManager, the door to all of them

What a snapshot costs the training thread: one copy of the state in memory (`stage`). Files, digests,
syncs, the commit and retention happen in a background thread, one snapshot at a time; a second one
waits. An error there is raised at the next call and at close.
"""

from resumable_trainer.manager.facts import Facts, Outcome, Rows
from resumable_trainer.manager.held import usable
from resumable_trainer.manager.line import RestoreReport
from resumable_trainer.manager.state_manager import StateManager

__all__ = ["Facts", "Outcome", "RestoreReport", "Rows", "StateManager", "usable"]
