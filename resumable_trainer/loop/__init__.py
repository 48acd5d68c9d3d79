"""The loop: the user's own, made resumable.

Terms: a *boundary* is an instant at which a snapshot may be taken: before an epoch's first batch,
after a batch's body, and after an epoch's body; a *notice* asks the run to save (and leave) at the
next boundary; *drift* is a change in what the run depends on since the snapshot; a *launch* is one
start of the process, numbered by the lock's generation.
"""
