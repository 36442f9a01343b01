"""Flat buffers, schedules, clipping and the update."""
