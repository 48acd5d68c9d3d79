"""The benchmark: what the package costs, as ratios against peers and against the machine's own limits, in one run.

    table          rows, goals, ratios; as text, Markdown and JSON
    timing         arms measured alternately, in this process or in lockstep with others
    worker         the other process: one arm, one epoch at a time
    jobs           the models and data that all arms share
    machine        the machine's own limits, measured first
    loops          time per epoch: the classic job, 60k x 64 floats, steps of 5 ms
    peers          the same job in the loops of other projects
    snapshots      1.1 GB: stall, time to durable, interference, memory, frozen parts, many small tensors
    restoring      1.1 GB put back into live tensors
    restarting     from a kill to the first resumed step, in fresh processes; `script` is what is started
    growth         the same snapshot late in a long run
    gpu            what needs a GPU

Nothing here is imported by the package or its tests of exactness. Start it with `scripts/bench`.
"""
