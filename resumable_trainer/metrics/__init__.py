"""Numbers over time, free of torch.

Terms: a *row* is one line of the metric journal, of a training batch (`"row": "step"`) or of an
epoch (`"row": "epoch"`); a *column* is one metric's values over the rows of one kind; *running
averages* are the means of the step values of the epoch under way, weighted by samples; *best* is
the best value so far of the metric that early stopping watches.
"""
