"""Predict what a run needs before it starts: parameters, FLOP, memory, time, layouts."""
