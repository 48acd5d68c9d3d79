"""The ready-made loop, written with `Run` alone: whatever it can do, an own loop can do."""
