"""Triton kernels, one op a file. Reached only through trivium.ops."""
