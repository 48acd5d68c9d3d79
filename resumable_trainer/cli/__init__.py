"""The command line: one file per command, none of which imports torch to look at a run."""
