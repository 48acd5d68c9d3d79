"""Proof that one's own job resumes exactly, got by running it: killed on purpose, or replayed.

Terms: a *trial* is one process that runs the user's script, shortened, in a scratch directory; its *trace* is what
the run told on the way, as digests; *steady* surroundings are those from which a source of chance has been taken
away (the clock, entropy, ...), *perturbed* ones are as on another day, on another machine.
"""
