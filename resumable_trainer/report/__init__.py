"""Read-only views of a run. Nothing here takes the lock, writes, or imports torch."""
