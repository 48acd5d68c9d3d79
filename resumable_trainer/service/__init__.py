"""Staying alive: the supervisor, and texts for systemd, cron, Slurm and Kubernetes. Free of torch."""
