"""Layers cut over an axis of the mesh; whole when the axis has size 1."""
