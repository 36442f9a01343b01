"""Checkpoints: slices in safetensors files with a manifest, published by one rename."""
