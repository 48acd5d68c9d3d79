"""Bytes that survive power loss; free of torch, knows nothing of training.

Terms: *durable* means synced, file and directory entry alike; to *commit* is to give a finished,
synced directory its final name; a *journal* is an append-only file of rows; a *mark* is a place in
it (length and digest) that a snapshot counts up to; the *owner* is the process that holds the lock.
"""
