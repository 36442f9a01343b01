"""Measure speed: each suite runs candidates side by side; results lie beside them, by machine."""
