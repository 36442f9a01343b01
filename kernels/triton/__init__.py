"""Triton kernels, one op a file; they know torch and Triton alone. Reached through trivium.ops."""
