"""Flat buffers, reductions, the learning rate and the update of weights."""
