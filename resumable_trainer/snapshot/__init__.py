"""The record on disk: a tree of named tensors and plain values. Knows nothing of training.

Terms (CONTRACT: "Words"): a *snapshot* is one committed, immutable, self-verifying directory; its
*manifest* is the JSON that describes it; the *store* is all snapshots of a run; a *section* is one
named tree in it (a part, the generators, the loop's own); *retention* says which snapshots stay;
*quarantine* holds damaged ones; *set aside* are valid ones on an abandoned line of the run.
The format is specified in FORMAT.md beside this file.
"""
