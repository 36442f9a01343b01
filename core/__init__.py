"""Trivium: a 3D-parallel engine for pretraining language models."""

__version__ = "0.1.0"
