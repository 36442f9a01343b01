"""Trivium: a Megatron-style engine for pretraining language models."""

__version__ = "0.1.0"
