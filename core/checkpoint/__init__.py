"""Checkpoints: slices in safetensors, a manifest, published by rename; Hugging Face folders in and out."""
