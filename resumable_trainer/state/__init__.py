"""What a run is, in memory.

Terms: a *part* is one named piece of state, anything with `state_dict()` and `load_state_dict()`
(or a random generator); to *capture* is to turn live parts into a tree of tensors and plain
values, to *restore* is the way back; *generators* are the global random generators of Python,
NumPy, torch and every accelerator; *staging* makes copies that later training cannot change
(*on_device*: of what is on CUDA devices).
"""
