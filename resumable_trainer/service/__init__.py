"""Staying alive: a supervisor for places without a service manager, and hooks for people. Free of torch."""
