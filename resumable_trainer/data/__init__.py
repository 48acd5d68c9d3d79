"""Data: batches whose order is a pure function of (seed, epoch), from any data, from any batch on.

Terms: a *source* gives the batches of one kind of data; the *order* of an epoch is the list of
sample indices, batch by batch; *salt* keeps apart what training and evaluation draw. Finding the
place again costs no reading of skipped samples, wherever samples can be had by index.
"""
